"""Loops as people write them: statistics that no later write can change, plans that follow the model, several terms."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402
from torch_models import Tokens, labels  # noqa: E402
from torch_oracle import close, empirical, ggn  # noqa: E402

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pre_of(model, loss=CE, method=None, fisher=kf.type2, damping=0.1, **more):
    core = kf.Preconditioner(method or kf.Exact(), kf.Clocks(1, 1), kf.Schedules(damping, 0.0))
    return kt.Preconditioner(model, loss, core, fisher=fisher, **more)


def run(pre, model, *batches, scale=1.0, **told):
    """Directions of one step over micro-batches, by name."""
    model.zero_grad()
    for x, y in batches:
        with pre.capture(**told):
            f = model(x)
        (pre.loss(f, y) * scale).backward()
    pre.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same(found, wanted, rtol=1e-9):
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=rtol, atol=1e-12, msg=name)


def batch(n=8):
    torch.manual_seed(2)
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


# Statistics are taken when the loss is formed, and count once it is differentiated.


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(reduction="sum")])
@pytest.mark.parametrize("cuts", [(4, 4), (5, 3), (1, 2, 5)])
def test_micro_batches_of_a_sum_are_the_whole(loss, cuts):
    x, y = batch()
    y = torch.randn(8, 3) if isinstance(loss, nn.MSELoss) else y
    model = mlp()
    wanted = run(pre_of(model, loss), model, (x, y))
    model = mlp()
    same(run(pre_of(model, loss), model, *zip(x.split(cuts), y.split(cuts), strict=True)), wanted)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.Diagonal(), kf.CGFAC()])
def test_nothing_is_a_view_of_the_users_memory(method):
    found = []
    for spoil in (False, True):
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3))
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p)
        torch.manual_seed(3)
        x, y = torch.randn(8, 1, 3, 3), labels(8)
        pre = pre_of(model, method=method)
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        if spoil:
            x.zero_()
        pre.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    same(found[1], found[0])


@pytest.mark.parametrize("namespace", ["numpy", "torch"])
@pytest.mark.parametrize("method", [kf.SKFAC(), kf.CGFAC(), kf.RandomizedKFAC(), kf.KPSVD(), kf.FNGD()])
def test_methods_that_keep_rows_keep_their_own(method, namespace):
    """Without a bias the rows of a layer are its input's own memory."""
    found = []
    for spoil in (False, True):
        torch.manual_seed(1)
        model, (x, y) = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)), batch()
        pre = pre_of(model, method=method, namespace=namespace, fisher=kf.empirical, rows=8, samples=8)
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        if spoil:
            x.fill_(7.0)
        pre.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    same(found[1], found[0])


def test_an_input_written_before_the_loss_is_refused():
    model, (x, y) = mlp(), batch()
    pre = pre_of(model)
    with pre.capture():
        f = model(x)
    x.zero_()
    with pytest.raises(ValueError, match="'0' was overwritten"):
        pre.loss(f, y)


def test_a_loss_that_is_never_differentiated_leaves_nothing():
    x, y = batch()
    model = mlp()
    wanted = run(pre_of(model), model, (x, y))
    model = mlp()
    pre = pre_of(model)
    with pre.capture():
        f = model(50 * x)
    pre.loss(f, y)
    same(run(pre, model, (x, y)), wanted)
    model.zero_grad()
    with pre.capture():
        f = model(50 * x)
    pre.loss(f, y).backward()
    pre.discard()
    same(run(pre_of(model), model, (x, y)), wanted)


def test_a_micro_batch_that_misses_a_layer_counts_there():
    """Experts: the second micro-batch reaches one of them only."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.e = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

        def forward(self, x):
            second = x[:, 0] > 0
            z = x.new_zeros(len(x), 3).index_add(0, (~second).nonzero()[:, 0], self.e[0](x[~second]))
            return z.index_add(0, second.nonzero()[:, 0], self.e[1](x[second]))

    x, y = batch()
    x[:, 0] = torch.tensor([1.0, 1, -1, 1, -1, 1, 1, 1])
    loss = nn.CrossEntropyLoss(reduction="sum")
    model = Two()
    wanted = run(pre_of(model, loss), model, (x, y))
    model = Two()
    same(run(pre_of(model, loss), model, *zip(x.split(5), y.split(5), strict=True)), wanted)
    only = x[[0, 1, 3]], y[[0, 1, 3]]
    pre, before = pre_of(model, loss), model.e[0].weight.detach().clone()
    run(pre, model, only)
    assert torch.equal(model.e[0].weight, before)
    kt.Optimizer(model, CE).step(*only)
    assert torch.equal(model.e[0].weight, before)
    assert not torch.equal(model.e[1].weight, before)


def test_empty_micro_batches_add_nothing():
    x, y = batch()
    for loss in (CE, nn.CrossEntropyLoss(reduction="sum")):
        model = mlp()
        wanted = run(pre_of(model, loss), model, (x, y))
        model = mlp()
        pre = pre_of(model, loss)
        model.zero_grad()
        for a, b in ((x[:0], y[:0]), (x, y), (x, torch.full_like(y, -100))):
            with pre.capture():
                f = model(a)
            value = pre.loss(f, b)
            if bool((b != -100).any()):
                value.backward()
        pre.step()
        same({n: p.grad for n, p in model.named_parameters()}, wanted)


# The plan follows the model.


@pytest.mark.parametrize("shell", ["preconditioner", "optimizer"])
def test_a_layer_thawed_later_is_trained_as_the_others(shell):
    x, y = batch()
    model = mlp()
    model[0].requires_grad_(False)
    if shell == "optimizer":
        optimizer = kt.Optimizer(model, CE)
        optimizer.step(x, y)
        model[0].requires_grad_(True)
        before = model[0].weight.detach().clone()
        optimizer.step(x, y)
        assert not torch.equal(before, model[0].weight)
        assert set(optimizer.engine.plan.layers) == {"0", "2"}
        return
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(5, 10), kf.Schedules(0.1, 0.0))
    pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
    for thaw in (False, True):
        model[0].requires_grad_(thaw)
        model.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        plain = model[0].weight.grad.clone() if thaw else None
        pre.step()
    assert not torch.equal(plain, model[0].weight.grad)
    assert set(pre.info.counts()) == {kf.Code.OK}
    assert pre.engine.state.step == 2


def test_parameters_replaced_keep_their_state_where_sizes_agree():
    x, y = batch()
    model = mlp()
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.9)))
    run(pre, model, (x, y))
    kept = pre.engine.state.layers["0"]
    model[2] = nn.Linear(5, 3)
    model.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    plain = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    model.zero_grad()
    with pre.capture():
        f = model(x)
    assert pre.engine.state.layers["0"] is kept
    pre.loss(f, y).backward()
    pre.step()
    assert all(not torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    model[2] = nn.Linear(5, 4)
    run(pre, model, (x, y))
    assert pre.engine.state.layers["2"].G.shape[-1] == 4
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="changed between"):
        pre.step()


def test_a_copy_of_the_model_is_not_the_model():
    model, (x, y) = mlp(), batch()
    pre, other = pre_of(model), copy.deepcopy(model)
    with pre.capture():
        f = other(x)
    with pytest.raises(ValueError, match="no captured call lies behind"):
        pre.loss(f, y)
    model, pre = copy.deepcopy((model, pre))
    assert not torch.equal(
        *(run(p, m, (x, y))["0.weight"] for p, m in ((pre, model), (pre_of(other, damping=9.0), other)))
    )


class Roundabout(nn.Module):
    """A known parameter as another layer's input, or a harmless use of it."""

    def __init__(self, way):
        super().__init__()
        self.way, self.e, self.p, self.o = way, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        w = self.e.weight
        if self.way == "input":
            return self.o(self.e(x) @ self.p(w))
        if self.way == "made like":
            return self.o(self.p(self.e(x + w.new_zeros(4)) + torch.zeros_like(w[0])).to(w.dtype))
        if self.way == "detached":
            return self.o(self.p(self.e(x) * w.detach().norm()))
        return self.o(self.p(self.e(x)) * w.norm())


@pytest.mark.parametrize("way", ["input", "made like", "detached", "norm"])
def test_uses_past_a_layer_are_seen(way):
    model, (x, y) = Roundabout(way), batch()
    pre = pre_of(model)
    if way in ("made like", "detached"):
        run(pre, model, (x, y))
        return
    with pytest.raises(ValueError, match=r"'e\.weight' .*skip"):
        run(pre, model, (x, y))


def test_derivatives_taken_after_the_capture_are_refused():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    pre = pre_of(model, nn.MSELoss())
    x = torch.randn(6, 2, requires_grad=True)
    with pre.capture():
        u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="create_graph=True"):
        pre.loss(torch.cat([u, du], 1), torch.randn(6, 3))


@pytest.mark.parametrize("bias", [None, "changed", "copied"])
def test_a_layer_called_with_another_bias_is_named(bias):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            own = self.a.bias.clone()
            if bias == "changed":
                own[:1].zero_()
            return F.linear(x, self.a.weight, None if bias is None else own)

    model, (x, y) = Odd(), batch()
    pre = pre_of(model)
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    pre.step()
    why = {None: "did not take part", "changed": "goes into CopySlices", "copied": ""}[bias]
    assert set(pre.engine.plan.layers["a"].paths.values()) == ({"a.weight"} if why else {"a.weight", "a.bias"})
    assert why in pre.engine.plan.uncovered.get("a.bias", "")


@pytest.mark.parametrize("shell", ["preconditioner", "optimizer"])
def test_views_changed_in_place_are_covered_in_both_shells(shell):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Flatten(1), nn.Linear(12, 3))
    x, y = torch.randn(5, 2, 4), labels(5)
    if shell == "optimizer":
        before = model[0].weight.detach().clone()
        optimizer = kt.Optimizer(model, CE)
        optimizer.step(x, y)  # five examples with drawn labels: the slope may be all noise, and then nothing moves
        optimizer.step(x, y)  # a batch that is known has no noise to leave out
        assert not torch.equal(before, model[0].weight)
    else:
        plain = torch.autograd.grad(CE(model(x), y), model[0].weight)[0]
        assert not torch.equal(run(pre_of(model), model, (x, y))["0.weight"], plain)


# Masks by layer.


class Coder(nn.Module):
    """An encoder and a decoder of different lengths; the encoder's layer is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.enc, self.dec, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, z, mask):
        h = torch.tanh(self.enc(torch.tanh(self.enc(x)))) * mask[..., None]
        return self.o(torch.tanh(self.dec(z)) + h.sum(1, keepdim=True)).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(5, 3), (4, 4)])
def test_masks_go_by_layer(lengths):
    long, short = lengths
    first = torch.arange(long)[None] < torch.tensor([[long], [2], [1]])
    second = torch.arange(short)[None] < torch.tensor([[short], [1], [2]])
    y = labels(3, short).masked_fill(~second, -100)
    found = []
    for value in (0.0, 50.0):
        torch.manual_seed(2)
        x = torch.randn(3, long, 4).masked_fill(~first[..., None], value)
        z = torch.randn(3, short, 4).masked_fill(~second[..., None], value)
        model = Coder()
        pre = pre_of(model, method=kf.KFAC())
        with pre.capture(masks={"enc": first, "dec": second, "o": second}):
            f = model(x, z, first)
        pre.loss(f, y).backward()
        pre.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    same(found[1], found[0])


def test_masks_that_fit_nothing():
    model, x, y = Tokens(), torch.randn(4, 5, 3), labels(4, 5)
    for told, words in (
        ({"mask": torch.ones(4, 6).bool()}, "fits no layer"),
        ({"masks": {"b": torch.ones(4, 5).bool()}}, "match none"),
        ({"masks": {"a": torch.ones(4, 6).bool()}}, "does not fit layer 'a'"),
        ({"mask": torch.ones(3, 5).bool()}, "fits no layer"),
    ):
        with pytest.raises(ValueError, match=words):
            kt.records(model, CE, x, y, **told)


def test_a_mask_is_repeated_over_heads_and_refused_where_axes_are_alike():
    class Attended(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.n, self.o, self.heads = nn.LayerNorm(4), nn.Linear(4, 3), heads

        def forward(self, x):
            return self.o(self.n(x.unflatten(-1, (self.heads, 4)).transpose(1, 2)).mean((1, 2)))

    mask = torch.arange(5)[None] < torch.tensor([[5], [3]])
    found, _ = kt.records(Attended(2), CE, torch.randn(2, 5, 8), labels(2), mask=mask)
    kept = found["n.weight"].mask.reshape(2, 2, 5)
    assert (kept[:, 0] == mask.numpy()).all()
    assert (kept[:, 1] == mask.numpy()).all()
    with pytest.raises(ValueError, match="several axes"):
        kt.records(Attended(5), CE, torch.randn(2, 5, 20), labels(2), mask=mask)


# Nothing is global.


def test_threads_do_not_see_each_other():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            gate.wait()
            return self.o(self.a(x, x, x, need_weights=False)[0].mean(1))

    gate, found, linear, first = threading.Barrier(3), [], F.linear, Slow()
    x, y = torch.randn(5, 6, 4), labels(5)

    def one(model):
        for _ in range(5):
            found.append(kt.records(model, CE, x, y, fisher=kf.empirical)[0])
            assert F.linear is linear

    threads = [threading.Thread(target=one, args=(copy.deepcopy(first),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for records in found:
        for name, record in records.items():
            np.testing.assert_array_equal(record.g, found[0][name].g)
            assert record.shared == found[0][name].shared


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_shells_travel(way):
    x, y = batch()
    model = mlp()
    pre = pre_of(model)
    run(pre, model, (x, y))
    other_model, other = way((model, pre))
    same(run(other, other_model, (x, y)), run(pre, model, (x, y)))
    model.zero_grad()
    with pre.capture():
        f = model(x)
    pre.loss(f, y).backward()
    other_model, other = way((model, pre))  # in the middle of a step: what waits stays behind
    same(run(other, other_model, (x, y)), run(pre, model, (x, y)))
    optimizer = kt.Optimizer(model, CE)
    optimizer.step(x, y)
    again_model, again = way((model, optimizer))
    assert again.step(x, y) == optimizer.step(x, y)
    torch.testing.assert_close(again_model[0].weight, model[0].weight, rtol=0, atol=0)
    for thing in (pre.report(), kt.plan(model), kt.Settings(), pre.info, kf.Joint({"a": kf.Gaussian()})):
        way(thing)


# Several terms and heads.


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.u, self.v = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return {"u": self.u(h), "v": self.v(h)}


def both(f, y):
    return CE(f["u"], y["u"]) + 0.5 * F.mse_loss(f["v"], y["v"])


def flat(f):
    return torch.cat([f["u"], f["v"]], 1)


@pytest.mark.parametrize("fisher", [kf.type2, kf.monte_carlo, kf.empirical])
def test_joint_is_the_fisher_of_the_sum(fisher):
    model, (x, labelled) = Heads(), batch(4)
    y = {"u": labelled, "v": torch.randn(4, 2)}
    joint = kf.Joint({"u": CE, "v": nn.MSELoss()}, {"v": 0.5})
    layers = kt.plan(model).layers
    count = 400 if fisher is kf.monte_carlo else 1
    found = [kt.records(model, joint, x, y, fisher=fisher, seed=seed) for seed in range(count)]
    f = model(x)
    for name, layer in layers.items():
        got = np.stack([kf.dense(records[name]) for records, _ in found])
        if fisher is kf.empirical:
            u = F.cross_entropy(f["u"], y["u"], reduction="none")
            v = ((f["v"] - y["v"]) ** 2).sum(1) / 2
            wanted = empirical(list(u + 0.5 * v), 4, layer)
        else:
            wanted = ggn(lambda x: flat(model(x)), lambda z: both({"u": z[:, :3], "v": z[:, 3:]}, y), x, layer)
        close(got.mean(0), wanted, 1e-10 if count == 1 else 0.25)


def test_joint_in_the_core_equals_the_heads():
    rng = np.random.default_rng(0)
    f = {"u": rng.normal(size=(4, 3)), "v": rng.normal(size=(4, 2))}
    y = {"u": np.array([0, 2, 1, 1]), "v": rng.normal(size=(4, 2))}
    joint = kf.Joint({"u": kf.SoftmaxCrossEntropy(), "v": kf.Gaussian()}, {"v": 3.0})
    draws = kf.type2(joint, f, y)
    assert {head: v.shape for head, v in draws.items()} == {"u": (5, 4, 3), "v": (5, 4, 2)}
    v = np.concatenate([draws["u"], draws["v"]], -1)
    H = np.einsum("vbi,vbj->bij", v, v)
    softmax = kf.type2(kf.SoftmaxCrossEntropy(), f["u"])
    np.testing.assert_allclose(H[:, :3, :3], np.einsum("vbi,vbj->bij", softmax, softmax))
    np.testing.assert_allclose(H[:, 3:, 3:], np.broadcast_to(3 * np.eye(2), (4, 2, 2)))
    assert np.abs(H[:, :3, 3:]).max() == 0
    many = kf.monte_carlo(joint, f, joint.noise(f, 20000, rng), y)
    w = np.concatenate([many["u"], many["v"]], -1)
    assert np.abs(np.einsum("vbi,vbj->bij", w, w) - H).max() < 0.1
    own = kf.empirical(joint, f, y)
    np.testing.assert_allclose(own["v"][0], 3 * (f["v"] - y["v"]))
    value = kf.SoftmaxCrossEntropy().value(f["u"], y["u"]) / 4 + 3 * kf.Gaussian().value(f["v"], y["v"]) / 4
    np.testing.assert_allclose(joint.value(f, y) / joint.normaliser(f, y), value)
    for given, words in ((lambda: kf.Joint({}), "losses"), (lambda: kf.Joint({"a": CE}, {"b": 1}), "unknown heads")):
        with pytest.raises(ValueError, match=words):
            given()
    with pytest.raises(ValueError, match="prediction for each"):
        kf.type2(joint, {"u": f["u"]}, y)


def test_two_losses_on_one_forward_add():
    x, y = batch()
    t = torch.randn(8, 2)

    class Split(Heads):
        def forward(self, x):
            found = super().forward(x)
            return found["u"], found["v"]

    model, whole = Split(), Heads()
    pre = pre_of(model, CE)
    mse = pre_of(whole, kf.Joint({"u": CE, "v": CE}))
    z = (t[:, 0] > 0).long().index_fill(0, torch.arange(3), -100)  # shares of 8 and of 5
    with pre.capture():
        u, v = model(x)
    (pre.loss(u, y) + pre.loss(v, z)).backward()
    pre.step()
    same({n: p.grad for n, p in model.named_parameters()}, run(mse, whole, (x, {"u": y, "v": z})))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_weighted_losses_on_one_forward(share):
    """Mixed labels: F is the sum of both losses' own F by their weights, here of J^T H J."""
    x, y = batch()
    z = y.flip(0)
    model = nn.Linear(x.shape[1], 3)
    pre = pre_of(model)
    with pre.capture():
        f = model(x)
    (pre.loss(f, y, weight=share) + pre.loss(f, z, weight=1 - share)).backward()
    (layer,) = pre.engine.plan.layers.values()
    before = layer.matrix({role: p.grad.clone() for role, p in layer.parameters.items()})
    pre.step()
    after = layer.matrix({role: p.grad for role, p in layer.parameters.items()})
    block = ggn(model, lambda f: share * CE(f, y) + (1 - share) * CE(f, z), x, layer)[0] + 0.1 * np.eye(15)
    wanted = np.linalg.solve(block, np.asarray(before).reshape(-1))
    np.testing.assert_allclose(np.asarray(after).reshape(-1), wanted, rtol=1e-9)


def test_weights_given_past_the_loss_are_named():
    x, y = batch()
    model = nn.Linear(x.shape[1], 3)
    pre = pre_of(model, CE)
    with pre.capture():
        f = model(x)
    (0.3 * pre.loss(f, y) + 0.7 * pre.loss(f, y.flip(0))).backward()
    with pytest.raises(ValueError, match="multiplied by"):
        pre.step()
    pre.discard()
    with pre.capture():
        f = model(x)
    (2.0 * (pre.loss(f, y) + pre.loss(f, y.flip(0)))).backward()  # one factor for both, as a scaler's
    pre.step()


@pytest.mark.parametrize(("weights", "named"), [((1, 0.1), True), ((1, 1), False), ((3 / 8, 5 / 8), False)])
def test_forwards_that_weigh_otherwise_than_their_examples_are_named(weights, named):
    x, y = batch()
    model = mlp()
    pre = pre_of(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for part, weight in zip((slice(0, 3), slice(3, 8)), weights, strict=True):
            with pre.capture():
                f = model(x[part])
            (weight * pre.loss(f, y[part])).backward()
        pre.step()
    assert any("curvatures count by [3.0, 5.0]" in str(w.message) for w in told) == named


def test_a_term_without_curvature_is_noticed_once():
    x, y = batch()
    for declare in (False, True):
        model = mlp()
        pre = pre_of(model)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                model.zero_grad()
                with pre.capture():
                    f = model(x)
                term = (model[0](x) ** 2).mean()
                (pre.loss(f, y) + (pre.extra(term) if declare else term)).backward()
                pre.step()
        assert sum("no curvature" in str(w.message) for w in told) == (not declare)
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the loss was multiplied by 7")
        run(pre_of(model), model, (x, y), scale=7.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_empirical_fisher_of_squares_is_made_of_the_losses_own_gradients(reduction):
    model, (x, _) = mlp(), batch()
    y = torch.randn(8, 3)
    found, _ = kt.records(model, nn.MSELoss(reduction=reduction), x, y, fisher=kf.empirical)
    n = 24 if reduction == "mean" else 1
    losses = ((model(x) - y) ** 2).sum(1)
    for name, layer in kt.plan(model).layers.items():
        close(kf.dense(found[name]), empirical(losses, n, layer))


# Messages.


def test_messages():
    x, y = batch()
    model = mlp()
    pre = pre_of(model)

    def step(inside=lambda: model(x), loss=True, target=y, backward=True):
        pre.discard()
        model.zero_grad()
        with pre.capture():
            f = inside()
        if loss:
            value = pre.loss(f, target)
            if backward:
                value.backward()
        if not loss or not backward:
            CE(model(x), y).backward()
        pre.step()

    class Output(dict):
        logits = None

    cases = [
        (lambda: step(inside=lambda: Output(logits=model(x))), "output.logits"),
        (lambda: step(loss=False), "captured, but pre.loss was not called"),
        (lambda: step(backward=False), "never differentiated"),
        (lambda: step(inside=lambda: model(x[:0]), target=y[:0]), "the batch is empty"),
        (lambda: step(target=torch.full_like(y, -100)), "all labels of the batch are ignored"),
        (lambda: kt.Optimizer(model, CE).step(x[:0], y[:0]), "the batch is empty"),
        (lambda: kt.Optimizer(model, CE).step(x, torch.full_like(y, -100)), "all labels of the batch are ignored"),
        (lambda: kt.Preconditioner(model, nn.BCELoss()), "drop the sigmoid.*BCEWithLogitsLoss"),
        (lambda: kt.Preconditioner(model, nn.NLLLoss()), "drop the log-softmax.*CrossEntropyLoss"),
    ]
    for case, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            case()
    with pre.capture():
        f = model(x)
    g = model(2 * x)
    pre.loss(torch.cat([f, g]), torch.cat([y, y])).backward()  # calls outside the capture are in the graph too
    pre.step()


def test_a_second_head_says_what_to_do():
    x, y = batch()
    model = Heads()
    pre = pre_of(model)
    with pre.capture():
        f = model(x)
    (pre.loss(f["u"], y) + pre.extra(f["v"].square().mean())).backward()
    with pytest.raises(ValueError, match=r"layers \['v'\] .*pre\.loss too.*Joint"):
        pre.step()


@pytest.mark.parametrize("way", ["second", "first"])
def test_masks_of_two_losses_on_one_forward(way):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x).transpose(1, 2), self.b(x).transpose(1, 2)

    model, x, y = Two(), torch.randn(3, 5, 4), labels(3, 5)
    pre = pre_of(model)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [2]])
    with pre.capture(masks={"b" if way == "second" else "a": mask}):
        f, g = model(x)
    (pre.loss(f, y) + pre.loss(g, y)).backward()
    pre.step()


# Records and forward-only statistics.


def test_records_take_one_backward_for_all_layers(monkeypatch):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)])
    counted, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: counted.append(1) or grad(*given, **more))
    kt.records(model, CE, torch.randn(5, 4), labels(5))
    assert len(counted) == 2 + 1 + 1
    counted.clear()
    found, _ = kt.records(model, CE, torch.randn(5, 4), labels(5), fisher=kf.forward_only)
    assert len(counted) == 2 + 1
    assert {record.draws for record in found.values()} == {0}


def test_records_of_any_draws_and_of_a_split_sum():
    model, (x, y) = mlp(), batch()
    v = torch.randn(6, 8, 3)
    found, _ = kt.records(model, nn.CrossEntropyLoss(reduction="sum"), x, y, draws=v, parts=4)
    layers, f = kt.plan(model).layers, model(x)
    for name, record in found.items():
        assert (record.draws, record.n) == (6, 0.25)
        wanted = empirical([(f[i] * v[d, i]).sum() for d in range(6) for i in range(8)], 0.25, layers[name])
        close(kf.dense(record), wanted)


def test_group_norm_of_channels_last():
    """torch crashes when asked for the gain's gradient alone, so the oracle looks at plain memory."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(5, 2, 5, 5), labels(5)
    plain = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)
    found, _ = kt.records(model, CE, x.to(memory_format=torch.channels_last), y, fisher=kf.type2)
    for name, layer in kt.plan(plain).layers.items():
        close(kf.dense(found[name]), ggn(plain, lambda f: CE(f, y), x, layer))


def test_forward_only_takes_no_draw():
    x, y = batch()
    model = mlp()
    pre = pre_of(model, method=kf.KFAC(), fisher=kf.forward_only)
    found = run(pre, model, (x, y))
    a = torch.cat([x, torch.ones(8, 1)], 1)
    plain = torch.autograd.grad(CE(model(x), y), [model[0].weight, model[0].bias])
    V = torch.cat([plain[0], plain[1][:, None]], 1)
    got = torch.cat([found["0.weight"], found["0.bias"][:, None]], 1)
    direction = np.asarray(kf.direction(kf.Record(a.numpy(), np.zeros((0, 1, 8, 1, 5)), 8), V.numpy(), kf.KFAC(), 0.1))
    torch.testing.assert_close(got, torch.from_numpy(direction).reshape(got.shape))
    kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1)), fisher=kf.forward_only).step(x, y)


def test_mixing_is_marked():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = batch()
    pre = pre_of(model, method=kf.KFAC())
    run(pre, model, (x, y))
    rows = {row.parameters[0]: row.quality for row in pre.report().rows}
    assert "several examples" in rows["0.weight"]
    assert "several examples" not in rows["3.weight"]
    assert bool(pre.info.layers["0"]["mixes"])
    assert "mixes" not in pre.info.layers.get("3", {})
    fngd = kf.Preconditioner(kf.FNGD(), kf.Clocks(1, 1), kf.Schedules(0.1), step=kf.Fixed(0.1))
    with pytest.raises(ValueError, match=r"mix examples.*FNGD"):
        kt.Optimizer(model, CE, fngd, fisher=kf.empirical).step(x, y)


@pytest.mark.parametrize("shell", ["Preconditioner", "Optimizer"])
@pytest.mark.parametrize("method", [kf.Exact(), kf.KFAC(), kf.KFAC(sharing=kf.reduce), kf.EKFAC()])
def test_rows_that_mix_examples_are_laid_out_as_the_method_needs(shell, method):
    """What a shell has measured is what the method measures of records that hold all such rows in one example, which
    are right in the mean; a method that cannot tell is given images as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2, momentum=0.0), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(4, 1, 3, 3), torch.randint(0, 3, (4,))
    records, _ = kt.records(model, nn.CrossEntropyLoss(), x, y, fisher=kf.type2)
    core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.1, 0.9), step=kf.Fixed(0.1))
    if shell == "Optimizer":
        own = kt.Optimizer(model, nn.CrossEntropyLoss(), core, fisher=kf.type2)
        own.step(x, y)
    else:
        own = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, fisher=kf.type2)
        with own.capture():
            f = model(x)
        own.loss(f, y).backward()
        own.step()
    assert records["0"].batch == 1
    for name, record in records.items():
        first = method.init(kf.Block.of(record), np.zeros(1))
        hyper = kf.Hyper(0, 0.9, 0.1)
        wanted = kf.flatten(method.refresh(method.update(first, method.measure(first, record, hyper), hyper), hyper))
        for path, leaf in kf.flatten(own.engine.state.layers[name]).items():
            if "Q" not in path and "/S" not in path:  # eigenvectors have no sign
                np.testing.assert_allclose(leaf, wanted[path], rtol=1e-9, atol=1e-12, err_msg=f"{name} {path}")
