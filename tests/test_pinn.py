"""K-FAC for networks that solve differential equations: Taylor slots, records and the step, against autodiff."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.linalg import kronsum
from kfaccore.record import Factored
from kfaccore.record.jacobian import products
from kfaccore.step.quadratic import curvature, minimiser, slope
from kfaccore_numpy import GELU, Dense, Sequential, Sigmoid, Tanh
from kfaccore_numpy.activations import Activation
from kfaccore_numpy.equations import taylor
from kfaccore_numpy.equations.network import PINN, term_record
from kfaccore_numpy.equations.problems import PROBLEMS
from kfaccore_numpy.equations.smooth import smooth
from kfaccore_numpy.equations.taylor import Slots


@dataclass(frozen=True)
class Line(Activation):
    """No activation at all."""


@smooth(Line)
def _line(z):
    yield z
    yield np.ones_like(z)
    yield np.zeros_like(z)
    yield np.zeros_like(z)


def network(d, activation=Tanh(), widths=(6, 5), outputs=1):  # noqa: B008 frozen
    return Sequential((d,), (*(x for w in widths for x in (Dense(w), activation)), Dense(outputs)))


def made(rng, d=3, activation=Tanh(), widths=(6, 5), batch=4):  # noqa: B008 frozen
    net = network(d, activation, widths)
    return net, net.init(rng, np.float64), rng.normal(size=(batch, d))


def close(x, y, tolerance=1e-12):
    x, y = np.asarray(x), np.asarray(y)
    return x.shape == y.shape and np.abs(x - y).max() <= tolerance * np.abs(y).max()


def relative(x, y):
    return np.linalg.norm(np.asarray(x) - y) / np.linalg.norm(y)


# An independent network: PyTorch's autodiff.


def torch_network(activation):
    torch = pytest.importorskip("torch")
    bends = {
        Tanh: torch.tanh,
        Sigmoid: torch.sigmoid,
        GELU: lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        Line: lambda z: z,
    }

    def u(weights, x):
        for i, W in enumerate(weights):
            x = bends[type(activation)](x) if i else x
            x = x @ W[:, :-1].T + W[:, -1]
        return x[0]

    return torch, u


def torch_slots(activation, params, x):
    """Value, gradient and Hessian of u at every point."""
    torch, u = torch_network(activation)
    weights = [torch.tensor(W) for W in params.values()]
    points, rev = torch.tensor(x), torch.func.jacrev  # forward mode warns in some releases

    def alone(point):
        return u(weights, point)

    found = (torch.vmap(f)(points) for f in (alone, rev(alone), rev(rev(alone))))
    return [v.numpy() for v in found]


COEFFICIENTS = {
    "laplacian": lambda rng, d: np.eye(d),
    "space only": lambda rng, d: np.diag([0.0] + [1.0] * (d - 1)),
    "negative": lambda rng, d: -np.diag(rng.uniform(1, 2, d)),
    "symmetric": lambda rng, d: (lambda c: c + c.T)(rng.normal(size=(d, d))),
    "not symmetric": lambda rng, d: rng.normal(size=(d, d)),
    "outer products": lambda rng, d: sum(np.outer(v, v) for v in rng.normal(size=(2, d))),
}
smooth_ones = pytest.mark.parametrize("activation", [Tanh(), Sigmoid(), GELU()], ids=lambda a: type(a).__name__)


@smooth_ones
@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_second_order_slot_is_the_contracted_hessian(activation, kind, rng):
    """PINN-1: the second slot is sum_ij c_ij d_ij u, by autodiff."""
    net, params, x = made(rng, activation=activation)
    c = COEFFICIENTS[kind](rng, 3)
    got = taylor.forward(net, params, x, Slots.operator(c)).second[:, 0]
    assert close(got, np.einsum("ij,bij->b", c, torch_slots(activation, params, x)[2]), 1e-10)


@smooth_ones
def test_value_gradient_and_hessian_from_the_slots(activation, rng):
    """PINN-2: u, d_i u and d_ij u from the slots are autodiff's."""
    net, params, x = made(rng, activation=activation)
    value, gradient, hessian = torch_slots(activation, params, x)
    found = taylor.forward(net, params, x, Slots.laplacian(3))
    assert close(found.value[:, 0], value, 1e-12)
    assert close(found.first[..., 0].T, gradient, 1e-11)
    for i in range(3):
        for j in range(3):
            c = np.zeros((3, 3))
            c[i, j] = 1.0
            assert close(taylor.forward(net, params, x, Slots.operator(c)).second[:, 0], hessian[:, i, j], 1e-10)


def cauchy(f, x, axis, order, radius=0.25, points=32):
    """The `order`-th derivative along one axis of an analytic function: Cauchy's integral, accurate to rounding."""
    total = np.zeros(len(x), dtype=complex)
    for k in range(points):
        turn = np.exp(2j * np.pi * k / points)
        moved = x.astype(complex)
        moved[:, axis] += radius * turn
        total += f(moved) * turn**-order
    return (total / points).real * [1, 1, 2][order] / radius**order


@pytest.mark.parametrize("name", PROBLEMS)
def test_manufactured_solutions_have_zero_residual(name, rng):
    """PINN-3: the residual of each problem's own solution is 0."""
    problem = PROBLEMS[name]
    (x, y), (b, values) = problem.sample(rng, 50, 40)
    d = problem.d
    first = np.stack([cauchy(problem.solution, x, i, 1) for i in range(d)])[:, :, None]
    weights = np.diag(problem.equation.slots.second)
    second = sum(w * cauchy(problem.solution, x, i, 2) for i, w in enumerate(weights))[:, None]
    u = taylor.Coefficients(problem.solution(x)[:, None], first, second)
    scale = max(1.0, np.abs(second).max())
    assert np.abs(problem.equation.residual(u, x, y)).max() <= 1e-9 * scale
    data = taylor.Coefficients(problem.solution(b)[:, None])
    assert np.abs(problem.terms[1].residual(data, b, values)).max() == 0
    assert problem.outside(x) == problem.outside(b) == 0
    low, high = np.asarray(problem.box).T
    on = np.isclose(b, low), np.isclose(b, high)
    assert (on[0] | on[1]).any(1).all()
    if name in ("poisson-2d", "heat-1d"):  # all faces; of time only the start
        assert [side.any(0).tolist() for side in on] == [[True, True], [name == "poisson-2d", True]]


NORMS = {
    "poisson-2d": 0.5,
    "poisson-5d": 1.581,
    "poisson-10d": 1.0,
    "poisson-100d": 1.0,
    "heat-1d": 0.317,
    "heat-4d": 1.906,
    "fokker-planck-9d": 38.6,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_root_mean_squares_of_the_solutions(name, rng):
    problem = PROBLEMS[name]
    assert np.sqrt((problem.solution(problem.inside(rng, 20000)) ** 2).mean()) == pytest.approx(NORMS[name], rel=0.03)


def small(rng, name="heat-4d", interior=7, boundary=5):
    pinn = PINN.of(PROBLEMS[name], 6, 5)
    params = pinn.init(3)
    return pinn, params, pinn.problem.sample(rng, interior, boundary)


def complex_jacobian(pinn, params, batch):
    """d r / d W of each term by complex steps: {layer: [(points, d_out, d_in), ...]}."""
    found = {}
    for name, W in params.items():
        columns = []
        for i in range(W.size):
            bumped = {**params, name: W.astype(complex)}
            bumped[name].flat[i] += 1e-30j
            columns.append([r.imag / 1e-30 for r in pinn.residuals(bumped, batch)])
        found[name] = [np.stack(c, -1).reshape(-1, *W.shape) for c in zip(*columns, strict=True)]
    return found


@pytest.mark.parametrize("name", ["poisson-2d", "heat-4d", "fokker-planck-9d"])
def test_jacobian_from_records(name, rng):
    """PINN-4: dr_n / dW = sum_s g_ns Z_ns^T, by complex steps."""
    pinn, params, batch = small(rng, name)
    captured = pinn.capture(params, batch)
    for layer, terms in complex_jacobian(pinn, params, batch).items():
        for term, want in zip(captured.records[layer], terms, strict=True):
            assert close(term.examples()[0, 0], want, 1e-11)


@pytest.mark.parametrize("name", ["poisson-5d", "fokker-planck-9d"])
def test_products_against_finite_differences(name, rng):
    """PINN-4: J v = sum_l <J_l, v_l>, by finite differences of the residuals."""
    pinn, params, batch = small(rng, name)
    records = pinn.capture(params, batch).records
    v = {n: rng.normal(size=(1, *W.shape)) for n, W in params.items()}
    h = 2e-4
    at = {s: pinn.residuals({n: W + s * h * v[n][0] for n, W in params.items()}, batch) for s in (-2, -1, 1, 2)}
    for t in range(2):
        got = sum(products(records[n][t], v[n])[0][0] for n in params)
        assert close(got, (8 * (at[1][t] - at[-1][t]) - at[2][t] + at[-2][t]) / (12 * h), 1e-8)


def test_products_against_torch(rng):
    """PINN-4: J v of the interior term, by PyTorch's autodiff."""
    pinn, params, batch = small(rng, "poisson-5d")
    torch, u = torch_network(Tanh())
    v = {n: rng.normal(size=(1, *W.shape)) for n, W in params.items()}
    points, rev = torch.tensor(batch[0][0]), torch.func.jacrev

    def residuals(*weights):
        return torch.vmap(lambda x: rev(rev(lambda p: u(weights, p)))(x).trace())(points)

    weights, along = ([torch.tensor(W.reshape(W.shape[-2:])) for W in p.values()] for p in (params, v))
    jacobian = rev(residuals, argnums=tuple(range(len(weights))))(*weights)
    want = sum((J * w).sum((1, 2)) for J, w in zip(jacobian, along, strict=True)).numpy()
    records = pinn.capture(params, batch).records
    assert close(sum(products(records[n][0], v[n])[0][0] for n in params), want, 1e-10)


def test_gradient_is_that_of_the_loss(rng):
    """PINN-13: V = sum_t (1/B_t) sum_n r_n J_n, and the loss is sum_t mean(r^2) / 2."""
    pinn, params, batch = small(rng, "fokker-planck-9d")
    found = pinn.capture(params, batch)
    jacobian = complex_jacobian(pinn, params, batch)
    for layer in params:
        want = sum(np.einsum("b,boi->oi", r / len(r), J) for r, J in zip(found.residuals, jacobian[layer], strict=True))
        assert close(found.grads[layer], want, 1e-11)
    assert found.loss == pytest.approx(pinn.loss(params, batch), rel=1e-13)
    assert found.loss == pytest.approx(sum(0.5 * (r**2).mean() for r in found.residuals), rel=1e-13)


def test_exact_block_from_all_pairs_of_slots(rng):
    """PINN-5: J^T J / B = (1/B) sum_n sum_st (g_s g_t^T) (x) (Z_s Z_t^T)."""
    pinn, params, batch = small(rng)
    records = pinn.capture(params, batch).records
    for layer, terms in complex_jacobian(pinn, params, batch).items():
        for term, J in zip(records[layer], terms, strict=True):
            rows = J.reshape(len(J), -1)
            assert close(kf.dense(term)[0], rows.T @ rows / len(J), 1e-11)
            Z, g = term.a[0], term.g[0, 0]  # and with all pairs of slots, as the sum over s and s' is written
            pairs = np.einsum("bso,btp,bsi,btj->oipj", g, g, Z, Z, optimize=True) / len(J)
            assert close(pairs.reshape(rows.shape[1], -1), kf.dense(term)[0], 1e-12)


def kronecker(record):
    """G (x) A of one record with all positions as rows."""
    a, g = (x.reshape(-1, x.shape[-1]) for x in (record.a[0], record.g[0, 0]))
    return np.kron(g.T @ g / record.n, a.T @ a / len(a))


def test_expand_is_not_exact_even_for_one_point(rng):
    """PINN-6: G (x) A of expand is far from the Gramian of one point, in every layer."""
    pinn, params, batch = small(rng, "poisson-2d", 1, 1)
    for layer, (term, _) in pinn.capture(params, batch).records.items():
        assert relative(kronecker(kf.expand(term)), kf.dense(term)[0]) > 0.3, layer


def linear_record(rng, seeds, slots, d=3):
    """Records of a deep linear net at 6 points with these seeds (one a slot)."""
    net, params, x = made(rng, d, Line(), (5, 4), 6)
    _, tape = taylor.record_forward(net, params, x, slots)
    g = taylor.backward(net, params, tape, np.broadcast_to(seeds[:, None, None], (len(seeds), 6, 1)).copy(), slots)
    return {name: term_record(a, g[name], 6) for name, a in tape.inputs.items()}


def test_reduce_is_exact_in_deep_linear_nets(rng):
    """PINN-7: with equal seeds reduce is the Gramian of a deep linear net; expand is not."""
    for name, record in linear_record(rng, np.ones(4), Slots(3, True)).items():
        exact = kf.dense(record)[0]
        assert relative(kronecker(kf.reduce(record)), exact) < 1e-14, name
        assert relative(kronecker(kf.expand(record)), exact) > 0.1, name
        v = rng.normal(size=(1, record.d_out, record.d_in))
        method = kf.PINNKFAC(terms=1, sharing=kf.reduce)
        state = kf.settle(method, record)
        assert close(method.matvec(state, v, kf.Hyper(0, 0.0, 0.0)).ravel(), exact @ v.ravel(), 1e-12)


def test_unequal_seeds_move_to_the_inputs(rng):
    """PINN-7: reduce of s_i Z_i and g_i / s_i is the Gramian where seeds s_i differ."""
    c = np.array([1.0, -2.0, 0.5, 3.0])
    for record in linear_record(rng, c, Slots(3, True)).values():
        moved = kf.Record(record.a * c[:, None], record.g / c[:, None], record.n)
        assert relative(kronecker(kf.reduce(moved)), kf.dense(record)[0]) < 1e-14
        assert relative(kronecker(kf.reduce(record)), kf.dense(record)[0]) > 1e-3


def test_the_laplacian_of_a_linear_net_is_zero_but_its_factors_are_not(rng):
    """PINN-7: under a pure Laplacian a linear net has J = 0 in every layer, but not G (x) A = 0."""
    for record in linear_record(rng, np.array([0.0, 0, 0, 0, 1]), Slots.laplacian(3)).values():
        assert not kf.dense(record).any()
        assert np.linalg.norm(kronecker(kf.expand(record))) > 0


def test_a_sum_over_slots_is_exact_for_the_last_layer(rng):
    """PINN-8: sum_s G_s (x) A_s is the Gramian of the last layer under a Laplacian."""
    pinn, params, batch = small(rng, "poisson-2d")
    record = pinn.capture(params, batch).records["dense4"][0]
    total = 0.0
    for s in range(record.shared):
        a, g = record.a[0, :, s], record.g[0, 0, :, s]
        total = total + np.kron(g.T @ g / len(g), a.T @ a / len(a))
    assert relative(total, kf.dense(record)[0]) < 1e-14
    assert relative(kronecker(kf.expand(record)), kf.dense(record)[0]) > 0.3


def test_the_boundary_term_is_ordinary_kfac(rng):
    """PINN-9: the boundary's direction is K-FAC's of the network's plain records."""
    pinn, params, batch = small(rng, "poisson-5d")
    x = batch[1][0]
    f, tape = pinn.network.forward(params, x)
    plain = pinn.network.records(tape, pinn.network.backward(params, tape, np.ones((1, *f.shape))), float(len(x)))
    for name, (_, term) in pinn.capture(params, batch).records.items():
        v = rng.normal(size=(1, term.d_out, term.d_in))
        method = kf.PINNKFAC(terms=1)
        want = kf.direction(plain[name], v, kf.KFAC(split=kf.per_factor), 1e-3)
        got = method.solve(kf.settle(method, (term,)), v, kf.Hyper(0, 0.0, 1e-3)).direction
        assert close(got, want, 1e-10)


# The solve over terms.


def spd(rng, d, condition):
    Q = np.linalg.qr(rng.normal(size=(2, d, d)))[0]
    return (Q * np.logspace(0, -np.log10(condition), d)) @ Q.transpose(0, 2, 1)


def dense_sum(pairs):
    return np.stack([sum(np.kron(G[b], A[b]) for G, A in pairs) for b in range(2)])


@pytest.mark.parametrize("condition", [10.0, 1e3])
def test_kronecker_sum_against_dense(condition, xp, rng):
    """PINN-10: K_G ((K_G^T V K_A) / (1 + s_G s_A^T)) K_A^T solves G_1 X A_1 + G_2 X A_2 = V."""
    pairs = [(spd(rng, 4, condition), spd(rng, 6, condition)) for _ in range(2)]  # condition^2 of each product
    V = rng.normal(size=(2, 4, 6))
    want = np.stack([np.linalg.solve(M, v.ravel()) for M, v in zip(dense_sum(pairs), V, strict=True)])
    found, code = kronsum.pair(*(xp.put(x) for pair in pairs for x in pair))
    assert close(xp.get(kronsum.solve(found, xp.put(V))).reshape(2, -1), want, 1e-8 if condition > 10 else 1e-12)
    assert not xp.get(code).any()


def test_three_terms_by_conjugate_gradients(xp, rng):
    """PINN-10: CG preconditioned by two terms solves sum_t G_t X A_t = V of three."""
    pairs = [(spd(rng, 4, 100.0), spd(rng, 5, 100.0)) for _ in range(3)]
    V = rng.normal(size=(2, 4, 5))
    want = np.stack([np.linalg.solve(M, v.ravel()) for M, v in zip(dense_sum(pairs), V, strict=True)])
    put = [tuple(xp.put(x) for x in pair) for pair in pairs]
    found, _ = kronsum.pair(*put[0], put[1][0] + put[2][0], put[1][1] + put[2][1])
    got, count, residual = kronsum.conjugate_gradients(put, found, xp.put(V), 1e-12, 60)
    assert close(xp.get(got).reshape(2, -1), want, 1e-9)
    assert 0 < float(xp.get(count)) < 60
    assert (xp.get(residual) <= 1e-12).all()


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_direction_is_the_stated_formula(terms, xp, rng):
    """PINN-10: x solves sum_t (G_t + damping I) x (A_t + damping I) = V with each term's own n, in every namespace."""
    shapes = [(5, 3, 7.0), (4, 1, 2.0), (6, 2, 3.0)][:terms]
    arrays = [(rng.normal(size=(b, s, 4)), rng.normal(size=(b, s, 3)), n) for b, s, n in shapes]
    record = tuple(kf.Record(xp.put(a), xp.put(g), n) for a, g, n in arrays)
    V, damping, M = rng.normal(size=(1, 3, 4)), 1e-3, 0.0
    for a, g, n in arrays:
        a, g = a.reshape(-1, 4), g.reshape(-1, 3)
        M = M + np.kron(g.T @ g / n + damping * np.eye(3), a.T @ a / len(a) + damping * np.eye(4))
    method = kf.PINNKFAC(terms=terms)
    state = kf.settle(method, record, damping=damping)
    solution = method.solve(state, xp.put(V), kf.Hyper(0, 0.0, damping))
    assert close(xp.get(solution.direction).ravel(), np.linalg.solve(M, V.ravel()), 1e-9)
    assert xp.get(solution.code).tolist() == [kf.Code.OK]
    undamped = sum(np.einsum("op,pi,ij->oj", g2, V[0], a2) for a2, g2 in (_factors(*x) for x in arrays))
    assert close(xp.get(method.matvec(state, xp.put(V), kf.Hyper(0, 0.0, 0.0)))[0], undamped, 1e-12)


def _factors(a, g, n):
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return a.T @ a / len(a), g.T @ g / n


def test_too_few_iterations_are_a_code(rng):
    record = tuple(kf.Record(rng.normal(size=(3, 4)), rng.normal(size=(3, 3)), 3.0) for _ in range(3))
    method = kf.PINNKFAC(terms=3, iterations=1)
    solution = method.solve(kf.settle(method, record, damping=1e-6), rng.normal(size=(1, 3, 4)), kf.Hyper(0, 0.0, 1e-6))
    assert solution.code.tolist() == [kf.Code.UNCONVERGED]


def test_averages_start_from_the_identity(rng):
    """The published form: after one update A = decay I + (1 - decay) A_batch, without a correction."""
    record = (kf.Record(rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), 5.0),)
    method, hyper = kf.PINNKFAC(terms=1, start=1.0), kf.Hyper(0, 0.7, 1e-3)
    state = method.init(kf.Block(3, 4), record[0].g)
    state = method.update(state, method.measure(state, record, hyper), hyper)
    A, G = _factors(record[0].a[0], record[0].g[0, 0], 5.0)
    assert close(state.terms[0].A[0] / state.terms[0].weight, 0.7 * np.eye(4) + 0.3 * A)
    assert close(state.terms[0].G[0] / state.terms[0].weight, 0.7 * np.eye(3) + 0.3 * G)


def test_one_bad_term_leaves_all_averages(rng):
    good = tuple(kf.Record(rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), 5.0) for _ in range(2))
    bad = (good[0], kf.Record(np.full((5, 4), np.nan), rng.normal(size=(5, 3)), 5.0))
    method, hyper = kf.PINNKFAC(), kf.Hyper(0, 0.5, 1e-3)
    state = kf.settle(method, good)
    with np.errstate(invalid="ignore"):
        after = method.update(state, method.measure(state, bad, hyper), hyper)
    for x, y in zip(kf.tree.leaves(state), kf.tree.leaves(after), strict=True):
        assert np.array_equal(x, y)


def test_factors_without_damping_are_lifted_and_said_so(rng):
    record = tuple(kf.Record(rng.normal(size=(2, 4)), rng.normal(size=(2, 3)), 2.0) for _ in range(2))
    method = kf.PINNKFAC()
    solution = method.solve(kf.settle(method, record, damping=0.0), rng.normal(size=(1, 3, 4)), kf.Hyper(0, 0.0, 0.0))
    assert solution.code.tolist() == [kf.Code.JITTERED]
    assert np.isfinite(solution.direction).all()


# Steps.


def model_of(pinn, params, batch, directions, damping):
    """(Q, down) of the damped quadratic model from the dense Jacobian of all layers."""
    jacobian = complex_jacobian(pinn, params, batch)
    J = [np.concatenate([jacobian[n][t].reshape(len(batch[t][0]), -1) for n in params], 1) for t in range(2)]
    v = np.stack([np.concatenate([x[n].ravel() for n in params]) for x in directions])
    G = sum(j.T @ j / len(j) for j in J) + damping * np.eye(v.shape[1])
    grad = sum(j.T @ r / len(j) for j, r in zip(J, pinn.residuals(params, batch), strict=True))
    return v @ G @ v.T, v @ grad


def test_alpha_and_mu_minimise_the_exact_model(rng):
    """PINN-11: (alpha, mu) = Q^-1 (slopes) with Q of the damped Gramian, and no point of a grid is lower."""
    pinn, params, batch = small(rng)
    c = pinn.capture(params, batch)
    pair = [{n: rng.normal(size=(1, *W.shape)) for n, W in params.items()} for _ in range(2)]
    Q, down = model_of(pinn, params, batch, pair, 0.0)
    assert close(curvature(c.records, pair), Q, 1e-10)
    assert close([slope(c.grads, {n: v[0] for n, v in p.items()}) for p in pair], down, 1e-10)
    rule, damping = kf.Quadratic(1e-3), 1e-3
    Q, down = model_of(pinn, params, batch, pair, damping)
    motion = kf.tree.map(lambda x: x, rule.init(pair[1]))
    updates, motion, told = rule(motion, pair[0], {n: g[None] for n, g in c.grads.items()}, c.records)
    alpha, mu = np.linalg.solve(Q, down)
    assert (told["alpha"], told["mu"]) == (pytest.approx(alpha, rel=1e-9), pytest.approx(mu, rel=1e-9))
    for n in params:
        assert close(updates[n], alpha * pair[0][n] + mu * pair[1][n], 1e-9)
        assert np.array_equal(motion.previous[n], updates[n])
    best = -down @ np.linalg.solve(Q, down) / 2
    assert told["predicted"] == pytest.approx(best, rel=1e-9)
    spread = np.linspace(0.5, 1.5, 21)  # and no point of a grid around it is lower
    grid = np.array([[a * alpha, m * mu] for a in spread for m in spread])
    assert best <= (-grid @ down + np.einsum("ki,ij,kj->k", grid, Q, grid) / 2).min() + 1e-15


def test_without_a_previous_update_one_number_is_left(rng):
    """PINN-11: with no last update mu = 0 and alpha = slope / curvature."""
    pinn, params, batch = small(rng)
    c = pinn.capture(params, batch)
    rule = kf.Quadratic(1e-3)
    zeros = {n: np.zeros((1, *W.shape)) for n, W in params.items()}
    direction = {n: rng.normal(size=(1, *W.shape)) for n, W in params.items()}
    _, _, told = rule(rule.init(zeros), direction, {n: g[None] for n, g in c.grads.items()}, c.records)
    Q, down = model_of(pinn, params, batch, [direction], 1e-3)
    assert told["alpha"] == pytest.approx(down[0] / Q[0, 0], rel=1e-9)
    assert told["mu"] == 0
    first = kf.Quadratic(1e-3, first=1e-6)
    _, motion, told = first(first.init(zeros), direction, {n: g[None] for n, g in c.grads.items()}, c.records)
    assert (told["alpha"], told["mu"], motion.steps) == (1e-6, 0.0, 1)


def test_model_decrease_is_never_positive(rng):
    """PINN-11: -<s, down> + s^T Q s / 2 <= 0 at the minimiser, also for singular Q."""
    for _ in range(300):
        rows = rng.normal(size=(rng.integers(1, 4), 2)) * 10.0 ** rng.uniform(-8, 8, 2)
        if rng.random() < 0.3:
            rows[:, 1] = rows[:, 0] * rng.choice([0.0, 1.0, -2.0])
        Q = rows.T @ rows
        down = Q @ rng.normal(size=2) if rng.random() < 0.5 else rng.normal(size=2) * np.sqrt(np.diag(Q))
        step = minimiser(Q, down)
        decrease = -step @ down + step @ Q @ step / 2
        assert np.isfinite(step).all()
        assert decrease <= 1e-12 * np.abs(step * down).max()
    assert not minimiser(np.array([[np.nan, 0], [0, 1.0]]), np.ones(2)).any()
    assert not minimiser(np.zeros((2, 2)), np.zeros(2)).any()


def search(rule, f, before, motion=None):
    """What the preconditioner's `judge` does along one direction: (rate, motion, tries) of a loss f(rate)."""
    opt = kf.Preconditioner(kf.Identity(), step=rule)
    state = opt.init({"x": kf.Block(1, 1)}, np.zeros(1))
    if motion is not None:
        state = replace(state, step=1, motion=motion)
    record = {"x": kf.Record(np.ones((1, 1)), np.ones((1, 1)), 1.0)}
    updates, state, _ = opt.step(state, record, {"x": np.ones((1, 1))})
    where, tries = [float(updates["x"][0, 0])], []

    def place(share):
        where[0] = share * float(updates["x"][0, 0])

    def loss():
        tries.append(where[0])
        return f(where[0])

    share, state = opt.judge(state, before, place, loss)
    assert where[0] == share * float(updates["x"][0, 0])
    return where[0], state.motion, tries


@pytest.mark.parametrize("best", [1.0, 0.3, 2.0**-7, 3e-6, 2.0**-30])
def test_grid_search_finds_the_minimum_of_the_grid(best):
    """PINN-12: the rate is the best of 2^-30 ... 1, from wherever the last search ended."""
    rule, grid = kf.GridSearch(0.0), 2.0 ** np.arange(-30, 1)

    def f(s):
        return (np.log(s) - np.log(best)) ** 2

    rate, motion, tries = search(rule, f, 1e9)
    assert rate == grid[np.argmin(f(grid))]
    assert motion.rate == rate
    again, motion, tries = search(rule, f, 1e9, motion)
    assert again == rate
    assert len(tries) <= 4  # the next search starts there


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_grid_search_never_increases_the_loss(rng):
    """PINN-12: the loss at the rate taken is below the one before, or nothing is taken."""
    taken = 0
    for seed in range(60):
        values = dict(zip(range(31), np.random.default_rng(seed).normal(size=31) + rng.uniform(-2, 2), strict=True))
        values[seed % 31] = np.nan
        values[(seed + 7) % 31] = np.inf

        def f(s, values=values):
            return values[round(-np.log2(s))]

        rate, motion, _ = search(kf.GridSearch(0.0), f, 0.0)
        if rate:
            taken += 1
            assert f(rate) < 0
            for near in (2 * rate, rate / 2):
                assert not 2.0**-30 <= near <= 1 or not f(near) < f(rate)
        else:
            assert not any(v < 0 for v in values.values())
            assert (motion.rejected, motion.code) == (1, kf.Code.UNCONVERGED)
    assert 5 < taken < 60
    assert search(kf.GridSearch(), lambda s: np.nan, 1.0)[0] == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_the_two_published_forms_of_momentum(scaled, rng):
    """Code: m <- mu m + x, update a m. Text: m <- a (mu m + x), update m."""
    rule, m, want = kf.GridSearch(0.5, scaled=scaled), 0.0, []
    motion = rule.init({"x": np.zeros((1, 1, 1))})
    for k, target in enumerate([0.25, 0.5, 0.125]):
        x = float(rng.uniform(1, 2))
        updates, motion, told = rule(motion, {"x": np.full((1, 1), x)}, {})
        share, asked = 1.0, None
        while asked != share:  # the loss is lowest where the rate is `target`
            share = asked if asked is not None else share
            asked, motion = rule.judge(motion, share, 100.0, abs(np.log2(share * told["alpha"] / target)))
        m = 0.5 * m + x
        want.append(target * m)
        assert share * float(updates["x"][0, 0]) == pytest.approx(want[k])
        m = target * m if scaled else m


def test_gauss_newton_is_the_damped_least_squares_step(rng):
    """PINN-14: x = (J^T J + c I)^-1 J^T r of all terms, rows and residuals over sqrt(B_t)."""
    pinn, params, batch = small(rng, "fokker-planck-9d")
    c = pinn.capture(params, batch)
    solver = kf.GaussNewton(damping=1e-4)
    updates, state, info = solver.step(solver.init(), c.records, c.residuals)
    J = complex_jacobian(pinn, params, batch)
    rows = np.concatenate([np.concatenate([J[n][t].reshape(n_t, -1) for n in params], 1) / n_t**0.5
                           for t, n_t in enumerate((7, 5))])  # fmt: skip
    r = np.concatenate([x / len(x) ** 0.5 for x in c.residuals])
    assert info["damping"] == pytest.approx(1e-4 * np.sum(rows**2), rel=1e-10)
    want = np.linalg.solve(rows.T @ rows + info["damping"] * np.eye(rows.shape[1]), rows.T @ r)
    assert close(np.concatenate([updates[n].ravel() for n in params]), want, 1e-8)
    assert state.slope == pytest.approx(want @ rows.T @ r, rel=1e-9)
    assert state.curvature == pytest.approx(np.sum((rows @ want) ** 2), rel=1e-9)


def test_gauss_newton_backs_off_and_its_damping_follows(rng):
    solver = kf.GaussNewton(points=4)
    state = kf.network.gauss_newton.State(damping=1e-3, slope=2.0, curvature=2.0)
    placed = []
    assert solver.judge(state, 1.0, placed.append, lambda: 0.0)[1].damping == 5e-4  # as predicted: less
    share, after = solver.judge(state, 1.0, placed.append, iter([np.nan, 3.0, 0.9]).__next__)
    assert (share, placed, after.damping) == (0.25, [0.5, 0.25], 2e-3)
    share, after = solver.judge(state, 1.0, placed.append, lambda: 2.0)
    assert (share, placed[-1], after.damping, after.stuck) == (0.0, 0.0, 0.1, 1)


def test_gauss_newton_refuses_draws_and_survives_nan(rng):
    record = kf.Record(rng.normal(size=(4, 3)), rng.normal(size=(2, 4, 2)), 4.0)
    with pytest.raises(ValueError, match="2 draws; a residual has one gradient"):
        kf.GaussNewton().step(kf.GaussNewton().init(), {"x": record}, [np.ones(4)])
    record = kf.Record(np.full((4, 3), np.nan), rng.normal(size=(4, 2)), 4.0)
    updates, _, info = kf.GaussNewton().step(kf.GaussNewton().init(), {"x": record}, [np.ones(4)])
    assert not updates["x"].any()
    assert info["code"].tolist() == [kf.Code.NONFINITE]


def test_factored_gradients_have_the_same_slope(rng):
    a, g, v = rng.normal(size=(5, 4)), rng.normal(size=(5, 3)), rng.normal(size=(1, 3, 4))
    grad = Factored(a, g, 5.0)
    assert slope({"x": grad}, {"x": v}) == pytest.approx(np.sum(grad.dense() * v), rel=1e-12)


def test_terms_of_one_output_are_named_under_a_network_of_two(rng):
    pinn, _, batch = small(rng, "poisson-2d")
    two = replace(pinn, network=Sequential((2,), (Dense(4), Tanh(), Dense(2))))
    params = two.network.init(np.random.default_rng(0), np.float64)
    with pytest.raises(ValueError, match=r"seeds of the interior term .*outputs of the network\) \(\d+, \d+, 2\)"):
        two.capture(params, batch)
