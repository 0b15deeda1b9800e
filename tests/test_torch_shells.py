"""The torch shells: directions, resuming, half precision, other optimizers' habits, and the step that tunes itself."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_numpy as kn  # noqa: E402
import kfaccore_torch as kt  # noqa: E402


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mlp(**options):
    return nn.Sequential(nn.Linear(4, 8, **options), nn.Tanh(), nn.Linear(8, 3, **options))


def labelled(batch=12, d=4, classes=3):
    return torch.randn(batch, d), torch.randint(0, classes, (batch,))


def core(method=None, update=1, refresh=1, damping=0.1, **options):
    return kf.Preconditioner(
        method or kf.KFAC(), clocks=kf.Clocks(update, refresh), schedules=kf.Schedules(damping, 0.9), **options
    )


def directions(model, x, y, loss=None, pre=None, scale=1.0, **settings):
    """One step of the pure preconditioner: .grad by name."""
    pre = pre or kt.Preconditioner(model, loss or nn.CrossEntropyLoss(), core(), **settings)
    model.zero_grad()
    with pre.capture():
        f = model(x)
    (pre.loss(f, y) * scale).backward()
    pre.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def equal(found, wanted, rtol=1e-10, atol=1e-12):
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(x), rtol=rtol, atol=atol, err_msg=name)


def trained(model, pre, optimizer, steps, start=0, batch=12):
    for step in range(start, start + steps):
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(batch, 4, generator=rng), torch.randint(0, 3, (batch,), generator=rng)
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("fisher", [kf.monte_carlo, kf.type2, kf.empirical])
def test_equals_the_numpy_network(fisher):
    """Same weights, same batch, same noise: directions of a convolutional network equal those of kfaccore_numpy."""
    net = kn.Sequential(
        (6, 6, 2),
        (kn.Conv2d(3, kf.Window((3, 3), padding=1)), kn.Tanh(), kn.AvgPool(6), kn.Flatten(), kn.Dense(5), kn.Dense(3)),
    )
    params = net.init(np.random.default_rng(0), np.asarray)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(3, 5), nn.Linear(5, 3)
    )
    pre = kt.Preconditioner(model, kf.SoftmaxCrossEntropy(), core(), fisher=fisher, seed=3)
    layers = dict(zip(params, pre.engine.plan.layers.values(), strict=True))
    with torch.no_grad():
        for name, layer in layers.items():
            for role, x in layer.arrays(params[name]).items():
                layer.parameters[role].copy_(torch.from_numpy(np.array(x)))
    x, y = np.random.default_rng(1).normal(size=(7, 6, 6, 2)), np.arange(7) % 3
    f, tape = net.forward(params, x)
    loss = kf.SoftmaxCrossEntropy()
    noise = kf.draw_noise(loss, f.shape, 1, np.random.default_rng([3, 0, 0]))
    draws = {kf.monte_carlo: lambda: kf.monte_carlo(loss, f, noise), kf.type2: lambda: kf.type2(loss, f)}
    gf = draws.get(fisher, lambda: kf.empirical(loss, f, y))()
    records = net.records(tape, net.backward(params, tape, gf), 7)
    grads = net.gradients(tape, net.backward(params, tape, loss.gradient(f, y)), 7, factored=False)
    wanted, _, _ = core().step(core().init(net.blocks(), x), records, grads)
    found = directions(model, torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y), pre=pre)
    for name, layer in layers.items():
        got = {role: found[path].numpy() for role, path in layer.paths.items()}
        np.testing.assert_allclose(layer.matrix(got).reshape(wanted[name].shape), wanted[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
def test_exact_on_deep_linear_networks(shared):
    """torch -> core -> torch: type-2 K-FAC is the block of the Fisher itself, solved densely."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    if shared:
        x, y = torch.randn(5, 6, 3), torch.randn(5, 6, 2)
    loss = kf.Gaussian()
    found = directions(
        model,
        x,
        y,
        loss,
        kt.Preconditioner(model, loss, core(kf.KFAC(split=kf.exact, inverse=kf.eigh)), fisher=kf.type2),
    )
    for i in (0, 1):
        p = torch.cat([model[i].weight, model[i].bias[:, None]], 1).detach()

        def f(flat, i=i, p=p):
            W = flat.reshape(p.shape)
            given = {f"{i}.weight": W[:, :-1], f"{i}.bias": W[:, -1]}
            return torch.func.functional_call(model, given, (x,)).reshape(-1)

        J = torch.autograd.functional.jacobian(f, p.reshape(-1))
        A = J.T @ J / 5 + 0.1 * torch.eye(p.numel())
        value, n = loss.value(model(x), y), loss.normaliser(model(x), y)
        g = torch.autograd.grad(value / n, [model[i].weight, model[i].bias])
        V = torch.cat([g[0], g[1][:, None]], 1).reshape(-1)
        wanted = torch.linalg.solve(A, V).reshape(p.shape)
        got = torch.cat([found[f"{i}.weight"], found[f"{i}.bias"][:, None]], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_a_repeated_batch_changes_nothing():
    model, (x, y) = mlp(), labelled()
    once = directions(model, x, y, fisher=kf.type2)
    equal(directions(model, x.repeat(3, 1), y.repeat(3), fisher=kf.type2), once)


def test_mean_and_sum():
    """A sum over 12 examples is 12 times the mean, gradient and curvature alike."""
    model, (x, y) = mlp(), labelled()
    mean = directions(model, x, y, fisher=kf.type2)
    loss = nn.CrossEntropyLoss(reduction="sum")
    pre = kt.Preconditioner(model, loss, core(damping=1.2), fisher=kf.type2)
    equal(directions(model, x, y, pre=pre), mean)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 6), (5, 7)])
def test_micro_batches(sizes):
    model, (x, y) = mlp(), labelled()
    whole = directions(model, x, y, fisher=kf.type2)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(), fisher=kf.type2)
    model.zero_grad()
    for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
        with pre.capture():
            f = model(part)
        (pre.loss(f, labels) * len(part) / 12).backward()
    pre.step()
    equal({name: p.grad for name, p in model.named_parameters()}, whole)


def test_loss_scale_passes_through():
    """Directions are linear in the gradient, records never see the scale: unscale before or after."""
    model, (x, y) = mlp(), labelled()
    once = directions(model, x, y)
    scaled = directions(model, x, y, scale=1024.0)
    equal({name: g / 1024 for name, g in scaled.items()}, once)


def test_a_non_finite_gradient_gives_zero_and_a_code():
    model, (x, y) = mlp(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    found = directions(model, x, y, pre=pre, scale=float("inf"))
    assert all(bool((g == 0).all()) for g in found.values())
    assert set(pre.info.counts()) == {kf.Code.NONFINITE}


class Outer(torch.amp.GradScaler):
    """One of a user's own."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("times", [0.25, 2.0, 1024.0, None], ids=str)
@pytest.mark.parametrize("init", [None, 0.125, 2.0**16, 0.0], ids=["none", "small", "large", "disabled"])
@pytest.mark.filterwarnings("ignore:the loss was multiplied")
def test_what_is_not_finite_is_shown_to_a_scaler_and_to_nobody_else(init, times, bad):
    """Whatever the loss is multiplied by: how large that is tells nothing of a scaler."""
    model, (x, y) = mlp(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    scaler = Outer("cpu", init_scale=init or 1.0, enabled=bool(init))
    x[0, 0] = bad
    with pre.capture():
        f = model(x)
    loss = pre.loss(f, y)
    loss = (times * loss + 0.0 * model[0].weight.sum()) if times else loss
    (loss if init is None else scaler.scale([loss])[0]).backward()
    pre.step()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert bool(found.isnan().any()) == bool(init)
    assert bool(found.isfinite().all()) != bool(init)


def scaled_loop(unscale, steps=4):
    """Losses that overflow at the scaler's first scale: scales after each step, and whether the weights moved."""
    torch.set_default_dtype(torch.float32)
    model, (x, y) = mlp(), labelled()
    x *= 50
    model[1] = nn.Identity()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(update=2, refresh=2), fisher=kf.type2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-16)
    found = []
    for _ in range(steps):
        before = model[0].weight.detach().clone()
        with pre.capture():
            f = model(x)
        scaler.scale(pre.loss(f, y)).backward()
        if unscale:
            scaler.unscale_(sgd)
        pre.step()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        found.append((scaler.get_scale(), not torch.equal(before, model[0].weight)))
    return found


@pytest.mark.parametrize("unscale", [True, False])
def test_an_overflow_reaches_the_scaler(unscale):
    found = scaled_loop(unscale, 8)
    scales = [scale for scale, _ in found]
    assert scales[0] == 2.0**111
    assert not found[0][1]
    assert scales[-1] == scales[-2]
    assert found[-1][1]
    assert all(moved == (scale == last) for (scale, moved), last in zip(found[1:], scales, strict=False))


def test_the_optimizer_scales_what_is_float16():
    """Steps under a scaler are those without; where gradients overflow nothing moves and the scale falls."""
    torch.set_default_dtype(torch.float32)
    x, y = labelled(64)
    wanted, model = mlp(), mlp()
    model.load_state_dict(wanted.state_dict())
    plain = kt.Optimizer(wanted, nn.CrossEntropyLoss(), core(step=kf.Fixed(0.3)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled = kt.Optimizer(model, nn.CrossEntropyLoss(), core(step=kf.Fixed(0.3)), scaler=scaler)
    assert [scaled.step(x, y) for _ in range(3)] == [plain.step(x, y) for _ in range(3)]

    model, losses, moved = mlp(), [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), scaler=scaler)
    for _ in range(40):
        before = model[0].weight.detach().clone()
        with torch.autocast("cpu", dtype=torch.float16):
            losses.append(optimizer.step(x, y))
        moved.append(not torch.equal(before, model[0].weight))
    assert not moved[0]
    assert all(moved[-3:])
    assert scaler.get_scale() < 2.0**40
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


def test_an_open_autocast_does_not_keep_old_weights():
    """It caches its casts of weights, which the step has changed since."""
    torch.set_default_dtype(torch.float32)
    model, (x, y) = mlp(), labelled()
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core(step=kf.Fixed(0.5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (optimizer.step(x, y) for _ in range(2))
    assert second < first

    searched = kt.Optimizer(mlp(), nn.CrossEntropyLoss(), core(damping=1e-6, step=kf.LineSearch(cap=1e4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [searched.step(x, y) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("namespace", ["numpy", "torch"])
def test_the_cores_own_products_are_not_under_autocast(namespace):
    torch.set_default_dtype(torch.float32)
    model, (x, y) = mlp(), labelled()
    found = []
    for inside in (True, False):
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(), fisher=kf.type2, namespace=namespace)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss = pre.loss(f, y)
        loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            pre.step()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    """bfloat16 weights: factors in float32, directions back in bfloat16, close to those of float32."""
    torch.set_default_dtype(torch.float32)
    x, y = labelled()
    model = mlp()
    wanted = directions(model, x, y, fisher=kf.type2)
    low = copy.deepcopy(model).to(dtype)
    pre = kt.Preconditioner(low, nn.CrossEntropyLoss(), core(), fisher=kf.type2)
    found = directions(low, x.to(dtype), y, pre=pre)
    assert pre.engine.state.layers["0"].A.dtype == np.float32
    for name, g in found.items():
        assert g.dtype == dtype
        assert (g.float() - wanted[name]).norm() <= 0.05 * wanted[name].norm()


def test_autocast():
    torch.set_default_dtype(torch.float32)
    model, (x, y) = mlp(), labelled()
    wanted = directions(model, x, y, fisher=kf.type2)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(), fisher=kf.type2)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pre.capture():
            f = model(x)
        loss = pre.loss(f, y)
    assert f.dtype == torch.bfloat16
    loss.backward()
    pre.step()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert (p.grad - wanted[name]).norm() <= 0.05 * wanted[name].norm()


def test_resumes_bit_for_bit(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = mlp()
        return model, kt.Preconditioner(model, nn.CrossEntropyLoss(), core(update=2, refresh=4)), torch.optim.SGD

    model, pre, make = fresh()
    optimizer = make(model.parameters(), 0.1, 0.9)
    whole = trained(model, pre, optimizer, 10)
    model, pre, make = fresh()
    optimizer = make(model.parameters(), 0.1, 0.9)
    trained(model, pre, optimizer, 5)
    saved = io.BytesIO()
    torch.save([model.state_dict(), pre.state_dict(), optimizer.state_dict()], saved)
    for namespace in ("numpy", "torch"):
        model, _, make = fresh()
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(update=2, refresh=4), namespace=namespace)
        optimizer = make(model.parameters(), 0.1, 0.9)
        saved.seek(0)
        states = torch.load(saved, weights_only=True)
        for thing, state in zip((model, pre, optimizer), states, strict=True):
            thing.load_state_dict(state)
        continued = trained(model, pre, optimizer, 5, start=5)
        for a, b in zip(continued, whole, strict=True):
            assert torch.equal(a, b) if namespace == "numpy" else torch.allclose(a, b, rtol=1e-9)


def test_a_state_of_another_model_is_refused():
    pre = kt.Preconditioner(mlp(), nn.CrossEntropyLoss(), core())
    other = kt.Preconditioner(nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss(), core())
    before = pre.engine.state
    with pytest.raises(ValueError, match=r"other leaves|leaf .* has shape"):
        pre.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not a state of kfaccore"):
        pre.load_state_dict({"param_groups": []})
    assert pre.engine.state is before


@pytest.mark.parametrize("make", ["foreach", "groups", "closure", "adam"])
def test_other_optimizers(make):
    torch.manual_seed(3)
    model, (x, y) = mlp(), labelled(64)
    y = (x @ torch.randn(4, 3)).argmax(1)
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    parameters = list(model.parameters())
    optimizer = {
        "foreach": lambda: torch.optim.SGD(parameters, 0.3, foreach=True),
        "groups": lambda: torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}], 0.3),
        "closure": lambda: torch.optim.LBFGS(parameters, 0.3, max_iter=1),
        "adam": lambda: torch.optim.AdamW(parameters, 0.02),
    }[make]()

    def closure():
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        loss = pre.loss(f, y)
        loss.backward()
        pre.step()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_clipping_before_and_after():
    model, (x, y) = mlp(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    once = directions(model, x, y)
    with pre.capture():
        f = model(x)
    model.zero_grad()
    pre.loss(f, y).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    pre.step()
    equal({n: p.grad for n, p in model.named_parameters()}, {n: g * 1e-3 / norm for n, g in once.items()}, rtol=1e-5)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert sum((p.grad**2).sum() for p in model.parameters()) ** 0.5 <= 1e-6


def test_records_cost_nothing_when_not_due():
    model, (x, y) = mlp(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(update=3))
    calls = []
    measured = pre.engine.measured
    pre.engine.measured = lambda *given, **more: calls.append(pre.engine.state.step) or measured(*given, **more)
    for _ in range(7):
        directions(model, x, y, pre=pre)
    assert calls == [0, 3, 6]


def test_forgotten_calls_are_named():
    model, (x, y) = mlp(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    with pytest.raises(ValueError, match="run the model inside"):
        pre.loss(model(x), y)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="got no records"):
        pre.step()
    with pytest.raises(ValueError, match="need one of"):
        kt.Preconditioner(model, nn.CrossEntropyLoss(), core(), fisher=kf.dense)
    with pytest.raises(ValueError, match="Optimizer instead"):
        kt.Preconditioner(model, nn.CrossEntropyLoss(), core(step=kf.SelfTuning()))
    with torch.no_grad(), pre.capture():
        f = model(x)
    with pytest.raises(ValueError, match="requires_grad=False"):
        pre.loss(f, y)


class Mixed(nn.Module):
    """Covered layers beside parameters that are changed before they meet an example."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.never = nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.normed(x) * nn.functional.softplus(self.scale)) + 0.0 * self.never.prod()


def test_uncovered_parameters_keep_their_gradient():
    model, (x, y) = Mixed(), labelled()
    pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core())
    found = directions(model, x, y, pre=pre)
    named = dict(model.named_parameters())
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(named.values()))
    for name, wanted in zip(named, plain, strict=True):
        covered = name.startswith("fc.") or name == "normed.bias"
        assert torch.equal(found[name], wanted) != covered, name
    text = str(pre.report())
    for words in ("WeightNormInterface", "SoftplusBackward0", "ProdBackward0", "fc.weight fc.bias"):
        assert words in text
    assert 0 < pre.report().share < 0.5
    strict = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(), strict=True)
    with strict.capture():
        f = model(x)
    with pytest.raises(ValueError, match=r"strict: 4 parameters are not covered") as error:
        strict.loss(f, y)
    assert "normed.parametrizations.weight.original0" in str(error.value)
    with pytest.raises(ValueError, match="strict: 1 parameters are not covered"):
        kt.Preconditioner(mlp(), nn.CrossEntropyLoss(), core(), strict=True, skip=("0.weight",))


def test_the_report():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Conv1d(8, 4, 3, groups=2), nn.LayerNorm(8), nn.Linear(8, 2))
    methods = {"0": kf.KFAC(), "1": kf.EKFAC(), "2.weight": kf.Diagonal(), "2.bias": kf.Identity(), "3": kf.Exact()}
    report = kt.Preconditioner(model, nn.CrossEntropyLoss(), core(methods), skip=()).report()
    assert report.share == 1.0
    assert [row.quality.split(" ")[0] for row in report.rows] == [
        "approximate", "approximate", "diagonal", "identity", "exact",
    ]  # fmt: skip
    assert "A 50 diagonal" in report.rows[0].factors
    assert "2 groups" in report.rows[1].factors
    state = kf.Preconditioner(methods).init(
        {n: layer.kind.block() for n, layer in kt.plan(model).layers.items()}, np.zeros(1, np.float32)
    )
    for row, layer in zip(report.rows, state.layers.values(), strict=True):
        assert row.bytes == sum(np.asarray(x).nbytes for x in kf.flatten(layer).values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.DataParallel(mlp()), "DistributedDataParallel"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (lambda: nn.Sequential(nn.Linear(4, 3)).requires_grad_(False), "no parameter of Sequential is covered"),
    ],
)
def test_models_that_are_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        kt.Preconditioner(make(), nn.CrossEntropyLoss(), core())
    with pytest.raises(ValueError, match="matches no parameter"):
        kt.Preconditioner(mlp(), nn.CrossEntropyLoss(), core(), skip=("head.*",))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(5, 4, sparse=True), "sparse"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.EmbeddingBag(5, 4, mode="max"), "maxima"),
    ],
)
def test_reasons(module, reason):
    model = nn.Sequential(module, nn.Linear(4, 3)).float()
    assert "1" in kt.plan(model).layers
    found = kt.plan(model, torch.randint(0, 5, (4, 2)))
    assert "1" in found.layers
    assert reason in found.uncovered["0.weight"]


# The one object that takes the whole step.


def test_factored_and_dense_directions_agree():
    """Fewer rows than width: the direction is built from output gradients, and .grad stays None."""
    torch.manual_seed(5)
    wide = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y = labelled()
    dense = directions(copy.deepcopy(wide), x, y)
    model = copy.deepcopy(wide)
    kt.Optimizer(model, nn.CrossEntropyLoss(), core(step=kf.Fixed(1.0))).step(x, y)
    moved = {n: p.detach() - q.detach() for (n, q), p in zip(model.named_parameters(), wide.parameters(), strict=True)}
    assert all(p.grad is None for p in model.parameters())
    equal(moved, dense, rtol=1e-8)


def test_it_tunes_itself():
    torch.manual_seed(1)
    model, (x, y) = mlp(), labelled(64)
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss())
    losses = [optimizer.step(x, y) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert {"alpha", "mu", "damping", "ratio", "rejected"} <= set(optimizer.info.step)
    assert all(p.grad is None for p in model.parameters())


def test_a_step_taken_back_leaves_the_old_bits():
    class Never(kf.SelfTuning):
        def judge(self, motion, share, before, after):
            return 0.0, motion

    model, (x, y) = mlp(), labelled()
    model.append(nn.BatchNorm1d(3))
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), core(step=Never()))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_second_look_sees_the_same_dropout_and_leaves_statistics_alone():
    seen = []

    class Noisy(nn.Module):
        def forward(self, x):
            seen.append(torch.rand(1).item())
            return x

    model, (x, y) = mlp(), labelled()
    model.insert(1, nn.BatchNorm1d(8))
    model.insert(2, Noisy())
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss())
    torch.manual_seed(9)
    optimizer.step(x, y)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert int(model[1].num_batches_tracked) == 1
    optimizer.step(x, y)
    assert seen[2] != seen[0]


def test_l2_and_weight_decay():
    model, (x, y) = mlp(), labelled()
    kept = copy.deepcopy(model)
    schedules = kf.Schedules(0.1, 0.9, l2=0.01)
    decayed = kf.Schedules(0.1, 0.9, weight_decay=0.01)
    clocks = kf.Clocks(1, 1)
    before = kt.Optimizer(
        model, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks, schedules, step=kf.Fixed(0.5))
    ).step(x, y)
    plain = float(nn.functional.cross_entropy(kept(x), y).detach())
    penalty = 0.005 * sum(float((p.detach() ** 2).sum()) for p in kept.parameters())
    assert before == pytest.approx(plain + penalty, rel=1e-12)
    other = copy.deepcopy(kept)
    kt.Optimizer(other, nn.CrossEntropyLoss(), core(step=kf.Fixed(0.5))).step(x, y)
    shrunk = copy.deepcopy(kept)
    kt.Optimizer(shrunk, nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC(), clocks, decayed, step=kf.Fixed(0.5))).step(
        x, y
    )
    for p, q, old, with_l2 in zip(
        shrunk.parameters(), other.parameters(), kept.parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q - 0.5 * 0.01 * old, rtol=1e-10, atol=1e-12)
        assert not torch.equal(with_l2, q)


def test_the_rest_is_trained_by_another_optimizer():
    model, (x, y) = Mixed(), labelled()
    with pytest.raises(ValueError, match=r"pass rest=torch.optim.Adam") as error:
        kt.Optimizer(model, nn.CrossEntropyLoss(), uncovered=None).step(x, y)
    assert "normed.parametrizations.weight.original0" in str(error.value)
    optimizer = kt.Optimizer(model, nn.CrossEntropyLoss(), rest=lambda p: torch.optim.SGD(p, 0.1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.scale)[0]
    optimizer.step(x, y)
    torch.testing.assert_close(model.scale.detach(), before["scale"] - 0.1 * plain)
    saved = optimizer.state_dict()
    assert "rest" in saved
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="outside K-FAC"):
        optimizer.load_state_dict({k: v for k, v in saved.items() if k != "rest"})


def test_the_optimizer_resumes_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        model = mlp()
        return model, kt.Optimizer(model, nn.CrossEntropyLoss())

    def run(model, optimizer, start, end):
        for step in range(start, end):
            rng = torch.Generator().manual_seed(step)
            optimizer.step(torch.randn(12, 4, generator=rng), torch.randint(0, 3, (12,), generator=rng))
        return [p.detach().clone() for p in model.parameters()]

    model, optimizer = fresh()
    whole = run(model, optimizer, 0, 12)
    model, optimizer = fresh()
    run(model, optimizer, 0, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model, optimizer = fresh()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(model, optimizer, 6, 12), whole, strict=True))


def test_float16_predictions_are_refused():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).to(torch.float16)

    with pytest.raises(ValueError, match="float16"):
        kt.Optimizer(Low(), nn.CrossEntropyLoss()).step(*labelled())


def test_inputs_of_several_kinds():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.fc(a + b)

    x, y = labelled()
    values = []
    for inputs in ((x, x), {"a": x, "b": x}):
        torch.manual_seed(0)
        values.append(kt.Optimizer(Two(), nn.CrossEntropyLoss()).step(inputs, y))
    assert values[0] == values[1]


def test_a_packed_sequence_is_one_input():
    """Though it is a tuple."""

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, packed):
            return self.out(self.gru(packed)[1][0])

    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 4, 3), [5, 4, 2, 1])
    found = []
    for inputs in (packed, (packed,)):
        torch.manual_seed(0)
        optimizer = kt.Optimizer(Read(), nn.CrossEntropyLoss())
        found.append([optimizer.step(inputs, torch.tensor([0, 1, 1, 0])) for _ in range(3)])
    assert found[0] == found[1]


GIVEN = {
    "parameters": (lambda m: kt.Preconditioner(m.parameters(), nn.CrossEntropyLoss()), TypeError, "class generator"),
    "optimizer": (lambda m: kt.Optimizer(torch.optim.SGD(m.parameters(), 0.1), nn.MSELoss()), TypeError, "class SGD"),
    "rate": (lambda m: kt.Preconditioner(m, nn.MSELoss(), lr=0.1), TypeError, r"\['lr'\].*of the torch optimizer"),
    "damping": (lambda m: kt.Optimizer(m, nn.MSELoss(), damping=0.1), TypeError, r"\['damping'\].*Schedules\(damping"),
    "function": (lambda m: kt.Optimizer(m, nn.functional.cross_entropy), ValueError, r"give nn\.CrossEntropyLoss\(\)"),
    "class": (lambda m: kt.Optimizer(m, nn.MSELoss), ValueError, r"give an instance, MSELoss\(\)"),
    "other loss": (lambda m: kt.Optimizer(m, nn.HuberLoss()), ValueError, r"ExampleLoss it needs.*each\(f, target\)"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_none_of_ours_says_what_to_give(given):
    make, kind, words = GIVEN[given]
    with pytest.raises(kind, match=words):
        make(mlp())


def test_a_token_mask_leaves_padding_out():
    """Positions that do not exist change neither factors nor directions, whatever they hold."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4, 4), torch.randint(0, 3, (6, 4))
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:, 3] = False
    y[:, 3] = -100
    found = []
    for value in (0.0, 50.0):
        x[:, 3] = value
        pre = kt.Preconditioner(model, kf.SoftmaxCrossEntropy(ignore=-100), core(), fisher=kf.type2)
        model.zero_grad()
        with pre.capture(mask=mask):
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    equal(found[0], found[1])
    unpadded = kt.Preconditioner(model, kf.SoftmaxCrossEntropy(), core(), fisher=kf.type2)
    equal(directions(model, x[:, :3], y[:, :3], pre=unpadded), found[0])


def test_saved_records(tmp_path):
    """Per-example gradients of the file are those of torch.func; the mean gradient is the loss's own."""
    model, (x, y) = mlp(), labelled()
    kt.save_records(tmp_path / "r", model, nn.CrossEntropyLoss(), x, y, fisher=kf.empirical)
    found, grads = kf.load_records(tmp_path / "r")[:2]
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for name in ("0", "2"):
        J = torch.cat([each[f"{name}.weight"], each[f"{name}.bias"][..., None]], -1).numpy()
        np.testing.assert_allclose(np.asarray(found[name].examples())[0, 0], J, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(np.asarray(grads[name]).reshape(J[0].shape), J.mean(0), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [kf.FNGD, kf.GlobalFNGD])
@pytest.mark.parametrize("share", ["mean_vector", "position", "sample", "scalar_rate"])
def test_fngd_shares_coefficients_as_in_numpy(share, kind, monkeypatch):
    """Two epochs of four steps: later ones take no record and no solve, and equal the NumPy shell's."""
    from kfaccore import xp
    from kfaccore.methods.rows import fngd

    solves, original = [], xp.spd_inverse
    monkeypatch.setattr(xp, "spd_inverse", lambda x: solves.append(1) or original(x))
    net = kn.Sequential((4,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
    params = net.init(np.random.default_rng(0), np.asarray)
    loss, method = kf.SoftmaxCrossEntropy(), kind(share=getattr(fngd, share), steps=4)
    chosen = {"network" if kind is kf.GlobalFNGD else "methods": method}
    pre = kf.Preconditioner(**chosen, clocks=kf.Clocks(1, 1), schedules=kf.Schedules(0.1), step=kf.Fixed(0.2))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    blocks = {name: kf.Block(b.d_out, b.d_in, rows=8, samples=32) for name, b in net.blocks().items()}
    ours = kt.Optimizer(model, loss, pre, fisher=kf.empirical, samples=32, rows=8)
    state = pre.init(blocks, np.zeros(1))
    with torch.no_grad():
        for W, layer in zip(params.values(), ours.engine.plan.layers.values(), strict=True):
            for role, x in layer.arrays(W).items():
                layer.parameters[role].copy_(torch.from_numpy(np.array(x)))
    for step in range(8):
        assert ours.engine.due == (step < 4)
        rng = np.random.default_rng(step)
        x, y, ids = rng.normal(size=(8, 4)), rng.integers(0, 3, 8), np.arange(8) + 8 * (step % 4)
        _, state, _ = kn.step(net, params, (x, y), loss, pre, state, step, rng, ids=ids)
        ours.step(torch.from_numpy(x), torch.from_numpy(y), ids=torch.from_numpy(ids))
        for W, layer in zip(params.values(), ours.engine.plan.layers.values(), strict=True):
            got = layer.matrix({role: p.detach().numpy() for role, p in layer.parameters.items()})
            np.testing.assert_allclose(got, W, rtol=1e-9, atol=1e-11)
    assert len(solves) == 2 * 4 * (1 if kind is kf.GlobalFNGD else 2)  # two shells, four steps, one system or a layer


def test_fngd_says_what_it_needs():
    for given in ({"methods": kf.FNGD()}, {"network": kf.GlobalFNGD()}):
        with pytest.raises(ValueError, match=r"FNGD.* takes .*fisher=kfaccore\.empirical"):
            kt.Optimizer(mlp(), nn.CrossEntropyLoss(), kf.Preconditioner(**given, step=kf.Fixed(0.1)))
    model = nn.Sequential(nn.Conv1d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3))
    ours = kt.Optimizer(model, nn.CrossEntropyLoss(), core(kf.FNGD(steps=1), step=kf.Fixed(0.1)), fisher=kf.empirical)
    x, y = labelled()
    ours.step(x[:, :, None], y)
    with pytest.raises(ValueError, match=r"layers \['0'\] are not linear layers"):
        ours.step(x[:, :, None], y)
