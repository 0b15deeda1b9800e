"""Training on differential equations: what comes out, what is refused, and the command line."""

from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore_numpy import Adam, Dense, ReLU, Sequential, Tanh
from kfaccore_numpy.conv import AvgPool
from kfaccore_numpy.equations import taylor
from kfaccore_numpy.equations.network import PINN
from kfaccore_numpy.equations.problems import PROBLEMS
from kfaccore_numpy.equations.tasks import PINN_TASKS, SOLVERS
from kfaccore_numpy.equations.taylor import Slots
from kfaccore_numpy.equations.train import Ahead, fit, initial_state, step, streamed


def small(name="poisson-2d", width=8, counts=(40, 20)):
    pinn = PINN.of(PROBLEMS[name], width)
    return pinn, pinn.init(1), pinn.problem.sample(np.random.default_rng(0), *counts)


TINY = replace(PINN_TASKS["poisson-2d"], widths=(24,), counts=(150, 60))


@pytest.mark.parametrize(("name", "steps", "target"), [
    ("pinn-kfac", 150, 0.15), ("pinn-kfac-star", 150, 0.1), ("gauss-newton", 30, 0.01), ("lbfgs", 300, 0.2),
])  # fmt: skip
def test_every_solver_learns(name, steps, target):
    pinn = TINY.pinn()
    params = pinn.init(1)
    x = pinn.problem.inside(np.random.default_rng(5), 500)
    before, seen = pinn.errors(params, x), []
    for progress in fit(pinn, params, pinn.batches(*TINY.counts, 0, 0), TINY.solver(name), steps):
        seen.append(progress.loss)
    relative, absolute = pinn.errors(params, x)
    assert relative < target < before[0]
    assert absolute == pytest.approx(relative * np.sqrt((pinn.problem.solution(x) ** 2).mean()), rel=1e-12)
    if name in ("pinn-kfac", "gauss-newton"):
        assert (np.diff(seen) <= 0).all()


def test_the_grid_search_never_raises_the_loss_of_a_network():
    pinn, params, batch = small()
    solver = SOLVERS["pinn-kfac"](TINY)
    state = initial_state(pinn, params, solver)
    losses = []
    for index in range(40):
        loss, state, _ = step(pinn, params, batch, solver, state, index)
        losses.append(loss)
    assert (np.diff([*losses, pinn.loss(params, batch)]) <= 0).all()


def test_same_seed_same_bits():
    ends = []
    for _ in range(2):
        pinn = TINY.pinn()
        params = pinn.init(2)
        for _ in fit(pinn, params, pinn.batches(*TINY.counts, 2, 3), TINY.solver("pinn-kfac-star"), 5):
            pass
        ends.append(params)
    assert all(np.array_equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.parametrize("name", ["pinn-kfac-star", "gauss-newton", "pinn-kfac"])
@pytest.mark.parametrize("every", [0, 1, 4])
def test_a_forward_kept_for_the_next_step_changes_no_bit(name, every, monkeypatch):
    ends, counts = [], []
    for kept in (False, True):
        pinn, solver = TINY.pinn(), TINY.solver(name)
        if name == "pinn-kfac-star":
            rule = kf.Quadratic(1e-6, tolerance=np.inf)  # no step is taken back
            solver = kf.Preconditioner(kf.PINNKFAC(start=1.0), schedules=kf.Schedules(1e-6, 0.7), step=rule)
        params, batches, forwards = pinn.init(2), pinn.batches(*TINY.counts, every, 3), []
        monkeypatch.setattr(PINN, "forward", lambda *a, real=PINN.forward, n=forwards: n.append(1) or real(*a))
        state, ahead, losses = initial_state(pinn, params, solver), Ahead(pinn) if kept else None, []
        for index in range(8):
            loss, state, _ = step(pinn, params, next(batches), solver, state, index, ahead=ahead)
            losses.append(loss)
        monkeypatch.undo()
        ends.append((losses, params, state))
        counts.append(len(forwards))
    assert ends[0][0] == ends[1][0]
    for x, y in zip(*(kf.tree.leaves(end[1:]) for end in ends), strict=True):
        assert np.array_equal(x, y)
    if name == "pinn-kfac-star":  # of 8 steps, one forward each: those that judged are those that began the next
        assert counts == [8, {0: 9, 1: 8, 4: 10}[every]]


def test_a_kept_forward_is_dropped_when_anything_changed():
    pinn, params, batch = small()
    want = pinn.capture(params, batch)

    def same(found):
        return found.loss == want.loss and all(np.array_equal(found.grads[n], want.grads[n]) for n in params)

    ahead = Ahead(pinn)
    assert ahead.loss(params, batch) == want.loss
    assert same(ahead.capture(params, batch))
    assert ahead.passed is None  # used once
    ahead.loss(params, batch)
    params["dense0"][0, 0] += 1.0  # in place
    assert not same(ahead.capture(params, batch))
    params["dense0"][0, 0] -= 1.0
    ahead.loss(params, batch)
    old, batch[0][1][0] = batch[0][1][0], 7.0
    assert ahead.capture(params, batch).loss == pinn.capture(params, batch).loss != want.loss
    batch[0][1][0] = old
    ahead.loss(params, batch)
    fewer = [(x[:5], y[:5]) for x, y in batch]
    assert ahead.capture(params, fewer).loss == pinn.capture(params, fewer).loss


def test_batches_are_drawn_anew_on_their_clock():
    pinn, _, _ = small()
    stream = pinn.batches(10, 5, 3, 0)
    x = [next(stream)[0][0] for _ in range(7)]
    assert [np.array_equal(x[i], x[i + 1]) for i in range(6)] == [True, True, False, True, True, False]
    stream = pinn.batches(10, 5, 0, 0)
    assert np.array_equal(next(stream)[0][0], next(stream)[0][0])


def test_statistics_in_parts_are_those_of_the_whole():
    pinn, params, batch = small("heat-4d", counts=(41, 23))
    solver = SOLVERS["pinn-kfac"](TINY)
    state = initial_state(pinn, params, solver)
    whole = pinn.capture(params, batch)
    found = streamed(pinn, params, batch, solver, state, 60)
    assert len(list(pinn.parts(params, batch, 60))) > 3
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, record in whole.records.items():
        np.testing.assert_allclose(found.grads[name], whole.grads[name], rtol=1e-11, atol=1e-13)
        want = solver.methods.measure(state.layers[name], record, kf.Hyper(0, 0.0, 0.0))
        for x, y in zip(kf.tree.leaves(found.records[name]), kf.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)
    updates, *_ = solver.step(state, found.records, found.grads)
    others, *_ = solver.step(initial_state(pinn, params, solver), whole.records, whole.grads)
    for name in updates:
        np.testing.assert_allclose(updates[name], others[name], rtol=1e-6, atol=1e-9)


def test_a_hundred_dimensions_in_memory_that_does_not_grow_with_the_points():
    solver, peaks = SOLVERS["pinn-kfac"](TINY), []
    for points, rows in ((64, 0), (64, 512), (128, 512)):
        pinn, params, batch = small("poisson-100d", 32, (points, points))
        state = initial_state(pinn, params, solver)
        tracemalloc.start()
        step(pinn, dict(params), batch, solver, state, 0, rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 3
    assert peaks[2] < 1.05 * peaks[1]


def test_statistics_and_inverses_keep_their_clocks():
    pinn, params, batch = small()
    solver = SOLVERS["pinn-kfac-star"](replace(TINY, clocks=(2, 4)))
    state, seen = initial_state(pinn, params, solver), []
    for index in range(6):
        weight = float(state.layers["dense0"].weight[0]), state.layers["dense0"].terms[0].A.copy()
        _, state, info = step(pinn, params, batch, solver, state, index)
        moved = not np.array_equal(weight[1], state.layers["dense0"].terms[0].A)
        seen.append((info.updated, info.refreshed, moved))
    both, neither = (True, True, True), (False, False, False)
    assert seen == [both, neither, (True, False, True), neither, both, neither]


# What is refused.


def test_a_missing_boundary_set_is_refused():
    pinn, params, batch = small()
    with pytest.raises(ValueError, match="has 1 sets of points; need 2: interior, boundary"):
        pinn.capture(params, batch[:1])


def test_points_outside_the_domain_are_refused():
    pinn, params, batch = small()
    batch[0][0][3, 1] = 1.5
    with pytest.raises(ValueError, match=r"1 of 40 interior points are outside the domain \(\(0.0, 1.0\)"):
        pinn.capture(params, batch)
    batch[0][0][3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 40 interior points are outside"):
        pinn.capture(params, batch)


def test_wrong_shapes_are_refused():
    pinn, params, ((x, y), b) = small()
    for points in ((x[:, :1], y), (x, y[:-1]), (x[:0], y[:0])):
        with pytest.raises(ValueError, match=r"the interior points of poisson-2d have shape .* need \(points, 2\)"):
            pinn.capture(params, (points, b))


def test_relu_under_a_laplacian_is_refused_with_the_reason():
    network = Sequential((2,), (Dense(4), ReLU(), Dense(1)))
    pinn = PINN(PROBLEMS["poisson-2d"], network)
    batch = pinn.problem.sample(np.random.default_rng(0), 5, 5)
    with pytest.raises(ValueError, match="ReLU under a second-order operator: its second derivative is zero"):
        pinn.capture(pinn.init(0), batch)
    value = taylor.forward(network, pinn.init(0), batch[0][0], Slots(2)).value
    np.testing.assert_allclose(value, network.forward(pinn.init(0), batch[0][0])[0])  # without one it is fine


def test_other_layers_are_refused():
    class Odd(Tanh):
        pass

    batch = np.zeros((3, 2))
    for layers, message in (
        ((Dense(4), Tanh()), "ends in Tanh"),
        ((Dense(4), Dense(1)), "layer 1 is Dense"),
        ((Tanh(), Dense(1)), "layer 0 is Tanh"),
        ((Dense(4), Odd(), Dense(1)), "register value and three derivatives with @smooth"),
    ):
        network = Sequential((2,), layers)
        with pytest.raises(TypeError, match=message):
            taylor.forward(network, network.init(np.random.default_rng(0), np.float64), batch, Slots.laplacian(2))
    assert AvgPool  # images have no Taylor rule here
    with pytest.raises(ValueError, match=r"second has shape \(3, 3\)"):
        Slots(2, True, tuple(map(tuple, np.eye(3))))


def test_mixed_dtypes_are_refused():
    pinn, params, batch = small()
    single = {name: W.astype(np.float32) for name, W in params.items()}
    with pytest.raises(TypeError, match="parameters are float32, interior points float64 and data float64; need one"):
        pinn.capture(single, batch)


@pytest.mark.parametrize("name", ["pinn-kfac", "pinn-kfac-star"])
def test_float32_with_tiny_damping_is_warned_about_with_the_number(name):
    pinn, params, batch = small()
    single = {name: W.astype(np.float32) for name, W in params.items()}
    points = [(x.astype(np.float32), y.astype(np.float32)) for x, y in batch]
    solver = SOLVERS[name](replace(TINY, kfac=(1e-12, 0.5, 0.5), star=(1e-12, 0.5)))
    with pytest.warns(RuntimeWarning, match=r"damping 1e-12 is below 1.2e-07, the rounding of float32"):
        step(pinn, single, points, solver, initial_state(pinn, single, solver), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(pinn, params, batch, solver, initial_state(pinn, params, solver), 0)
        assert single["dense0"].dtype == np.float32


def test_methods_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match=r"PINNKFAC.terms is 0; need a whole number of at least 1"):
        kf.PINNKFAC(terms=0)
    with pytest.raises(ValueError, match="a split that shifts each factor"):
        kf.PINNKFAC(split=kf.exact)
    with pytest.raises(TypeError, match="embedding"):
        kf.PINNKFAC().init(kf.Block(2, 3, diagonal_in=True), np.zeros(1))
    with pytest.raises(ValueError, match=r"Quadratic.damping is 0"):
        kf.Quadratic(0.0)
    with pytest.raises(ValueError, match=r"GridSearch.momentum is 1.0; need a number in \[0, 1\)"):
        kf.GridSearch(1.0)
    record = kf.Record(np.ones((2, 3)), np.ones((2, 2)), 2.0)
    with pytest.raises(ValueError, match="record has 1 terms; this PINNKFAC needs a tuple of 2"):
        kf.settle(kf.PINNKFAC(), record)
    pinn, params, batch = small()
    tuning = kf.Preconditioner(kf.PINNKFAC(), step=kf.SelfTuning())
    with pytest.raises(ValueError, match=r"cannot model several loss terms; use Quadratic\(\) or GridSearch\(\)"):
        step(pinn, params, batch, tuning, initial_state(pinn, params, tuning), 0)
    penalised = kf.Preconditioner(kf.PINNKFAC(), schedules=kf.Schedules(1e-3, l2=0.1))
    with pytest.raises(ValueError, match="leave l2 and weight_decay 0"):
        next(fit(pinn, params, iter([batch]), penalised, 1))


def test_the_quadratic_step_is_halved_while_the_loss_rises():
    rule = kf.Quadratic(1e-3)
    motion = rule.init({"x": np.ones((1, 1, 1))})
    assert rule.judge(motion, 1.0, 1.0, 1.4) == (1.0, motion)
    assert rule.judge(motion, 1.0, 1.0, 1.6) == (0.5, motion)
    share, after = rule.judge(motion, 0.25, 1.0, 0.9)
    assert (share, float(after.previous["x"][0, 0, 0])) == (0.25, 0.25)
    share, after = rule.judge(motion, 2.0**-15, 1.0, np.nan)
    assert (share, after.rejected, after.code) == (0.0, 1, kf.Code.UNCONVERGED)
    assert not after.previous["x"].any()
    assert replace(rule, tolerance=np.inf).judge(motion, 1.0, 1.0, 9.0) == (1.0, motion)


def test_adam_is_the_ordinary_one():
    pinn, params, batch = small()
    solver = Adam(1e-2)
    loss, _, info = step(pinn, params, batch, solver, initial_state(pinn, params, solver), 0)
    assert info is None
    assert loss > pinn.loss(params, batch)
