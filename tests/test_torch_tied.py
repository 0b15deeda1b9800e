"""An embedding tied to the output layer: the exact block, and both ways of approximating it."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch.own import apart  # noqa: E402
from torch_oracle import close, empirical, ggn  # noqa: E402

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Language(nn.Module):
    """Tokens in, logits of tokens out, with one table; `way` says how the head is written."""

    def __init__(self, way="modules", padding=None):
        super().__init__()
        self.way = way
        self.table, self.mix = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=way == "bias")
        self.head.weight = self.table.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.table(x).cumsum(1)))
        if self.way == "matmul":
            h = h @ self.table.weight.T
        elif self.way == "einsum":
            h = torch.einsum("bsd,vd->bsv", h, self.table.weight)
        elif self.way == "functional":
            h = F.linear(h, self.table.weight)
        else:
            h = self.head(h)
        return h.mean(1) if self.way == "pooled" else h.transpose(1, 2)


def batch(way="modules"):
    x = torch.randint(0, 7, (4, 5))
    return x, torch.randint(0, 7, (4,) if way == "pooled" else (4, 5))


@pytest.mark.parametrize("way", ["modules", "bias", "matmul", "einsum", "functional", "pooled"])
def test_the_record_is_the_exact_block(way):
    model, (x, y) = Language(way, padding=3 if way == "functional" else None), batch(way)
    plan = kt.plan(model, x)
    assert not plan.uncovered
    assert type(plan.layers["table"].kind).__name__ == "Tied"
    found, grads = kt.records(model, CE, x, y, fisher=kf.type2)
    own, _ = kt.records(model, CE, x, y, fisher=kf.empirical)
    wanted = torch.autograd.grad(CE(model(x), y), model.table.weight, retain_graph=True)[0]
    np.testing.assert_allclose(np.asarray(grads["table"]), wanted.numpy(), rtol=1e-10)
    losses = F.cross_entropy(model(x), y, reduction="none").reshape(4, -1).sum(1)
    n = y.numel()
    for name, layer in plan.layers.items():
        close(kf.dense(found[name]), ggn(model, lambda f: CE(f, y), x, layer))
        close(kf.dense(own[name]), empirical(losses, n, layer))


def test_products_with_other_layers_are_exact():
    """Several draws stand as examples of the table's record, in the order that other layers have them in."""
    model, (x, y) = Language("pooled"), batch("pooled")
    found, _ = kt.records(model, CE, x, y, fisher=kf.type2)
    layers = kt.plan(model, x).layers
    f = model(x)
    H = torch.autograd.functional.hessian(lambda f: CE(f, y), f.detach()).reshape(28, 28).numpy()
    total = np.zeros(28)
    images = 0.0
    rng = np.random.default_rng(0)
    for name in ("table", "mix"):
        layer = layers[name]
        v = rng.standard_normal(layer.kind.block().d_out * layer.kind.block().d_in)
        v = v.reshape(layer.kind.block().d_out, -1)
        parts = layer.arrays(v)
        for i, number in enumerate(f.reshape(-1)):
            grads = torch.autograd.grad(number, list(layer.parameters.values()), retain_graph=True)
            pairs = zip(grads, layer.parameters, strict=True)
            total[i] += sum(float((g * torch.as_tensor(np.array(parts[role]))).sum()) for g, role in pairs)
        record = found[name]
        z = np.einsum("oi,bsi->bso", v, np.asarray(record.rows())[0])
        images = images + np.einsum("dbso,bso->db", np.asarray(record.g)[:, 0], z).reshape(-1)
    close(np.sum(images**2) / 4, total @ H @ total)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_micro_batches_add_up(method):
    """What scales a row is the row's own: however a batch is cut, the direction of the table is the same."""
    x, y = batch()
    found = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        torch.manual_seed(1)
        model = Language()
        core = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(1e-3, 0.9))
        pre = kt.Preconditioner(model, CE, core, fisher=kf.type2)
        for part in parts:
            with pre.capture():
                f = model(x[part])
            (pre.loss(f, y[part]) * (len(x[part]) / 4)).backward()
        pre.step()
        found.append(model.table.weight.grad)
    close(found[1].numpy(), found[0].numpy())


def test_the_factors_keep_the_trace_of_rows_of_no_gradient_too():
    """Type-2 draws of one position leave later tokens without a gradient: such a row has no part in either factor."""
    model, (x, y) = Language(), batch()
    record = kt.records(model, CE, x, y, fisher=kf.type2)[0]["table"]
    a = np.asarray(record.a)[0]
    g = np.asarray(record.g)[0, 0]
    assert np.any(np.all(a == 0, -1))
    assert np.all(g[np.all(a == 0, -1)] == 0)
    np.testing.assert_allclose(np.linalg.norm(a[np.any(a != 0, -1)], axis=-1), 1.0, rtol=1e-12)
    rows = np.einsum("bsi,bso->bsoi", a, g)
    assert (g**2).sum() == pytest.approx((rows**2).sum(), rel=1e-12)


def test_balanced_factors_keep_both_traces():
    """tr A tr G is the sum over both terms of their own tr A tr G."""
    model, (x, y) = Language(), batch()
    record = kt.records(model, CE, x, y, fisher=kf.empirical)[0]["table"]
    a = np.asarray(record.a).reshape(4, 10, 4)
    g = np.asarray(record.g).reshape(4, 10, 7)
    squares = [(a[:, part] ** 2).sum() / 20 for part in (slice(0, 5), slice(5, 10))]
    assert squares[0] == pytest.approx(squares[1], rel=1e-12)
    terms = sum((a[:, p] ** 2).sum() / 20 * (g[:, p] ** 2).sum() / record.n for p in (slice(0, 5), slice(5, 10)))
    expanded = kf.expand(record)
    A = np.einsum("bsi,bsj->ij", np.asarray(expanded.rows())[0], np.asarray(expanded.rows())[0]) / 40
    G = np.einsum("bso,bsp->op", np.asarray(expanded.g)[0, 0], np.asarray(expanded.g)[0, 0]) / record.n
    assert np.trace(A) * np.trace(G) == pytest.approx(terms, rel=1e-12)


def distance(method, record, exact):
    """Relative error of a method's undamped curvature, in the Frobenius norm."""
    block = kf.Block.of(record)
    state = kf.settle(method, record, method.cycles, 1e-8)
    eye = np.eye(block.d_out * block.d_in).reshape(-1, 1, block.d_out, block.d_in)
    hyper = kf.Hyper(0, 0.0, 0.0)
    found = np.stack([np.asarray(method.matvec(state, v, hyper)).reshape(-1) for v in eye])
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def test_both_candidates_against_the_exact_block():
    """One K-FAC block of both sums is nearer than either sum alone; two terms are nearer still."""
    model, (x, y) = Language(), batch()
    record = kt.records(model, CE, x, y, fisher=kf.type2)[0]["table"]
    exact = np.asarray(kf.dense(record))[0]
    one = distance(kf.KFAC(), record, exact)
    two = distance(kf.Deflation(), record, exact)
    a, g = np.asarray(record.a), np.asarray(record.g)
    half = record.shared // 2
    head = distance(kf.KFAC(), kf.Record(a[:, :, :half], g[..., :half, :], record.n), exact)
    table = distance(kf.KFAC(), kf.Record(a[:, :, half:], g[..., half:, :], record.n), exact)
    print(one, two, head, table)
    assert one < min(head, table)
    assert two < one


def test_tied_models_train():
    model, (x, y) = Language("bias"), batch()
    optimizer = kt.Optimizer(model, CE)
    losses = [optimizer.step(x, y) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert "both sums of a tied table" in str(optimizer.report())
    assert optimizer.report().share == 1.0


def test_without_draws_the_head_alone_is_measured():
    model, (x, y) = Language(), batch()
    (record,) = (kt.records(model, CE, x, y, fisher=kf.forward_only)[0]["table"],)
    assert (record.draws, record.shared, record.d_in) == (0, 5, 4)


@pytest.mark.parametrize("method", [kf.KFAC(sharing=kf.reduce), kf.TKFAC(sharing=kf.reduce)])
def test_a_method_of_mean_rows_is_refused_by_name(method):
    """The mean of a head's inputs and a table's gradients would be the mean of two kinds."""
    model, (x, y) = Language(), batch()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"table.* is table and output layer"):
        kt.Optimizer(model, CE, core=kf.Preconditioner(method, step=kf.SelfTuning())).step(x, y)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_other_layers_may_share_by_means():
    model, (x, y) = Language(), batch()
    methods = dict.fromkeys(kt.plan(model, x).layers, kf.KFAC(sharing=kf.reduce)) | {"table": kf.KFAC()}
    assert np.isfinite(kt.Optimizer(model, CE, core=kf.Preconditioner(methods, step=kf.SelfTuning())).step(x, y))


@pytest.mark.parametrize("shell", ["Optimizer", "Preconditioner"])
def test_a_rule_that_leaves_examples_out_measures_a_tied_table_all_the_same(shell):
    """Its draws are so many times the examples: none of them is the loss's own."""
    found = []
    for own in (True, False):
        torch.manual_seed(0)
        model, (x, y) = Language(), batch()
        noise = kf.Noise(own=own)
        if shell == "Optimizer":
            made = kt.Optimizer(model, CE, core=kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning(noise=noise)))
            made.step(x, y)
        else:
            core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), step=kf.Fixed(0.1, rescale=noise))
            made = kt.Preconditioner(model, CE, core)
            with made.capture():
                f = model(x)
            made.loss(f, y).backward()
            made.step()
        assert "table" not in apart(made.engine)
        found.append(kf.flatten(made.engine.state.layers["table"]))
    first, second = found
    assert any(np.asarray(value).any() for name, value in first.items() if "G" in name)
    for name, value in first.items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(second[name]), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("sharing", ["examples", "ragged"])
def test_a_bag_of_the_table_is_measured_as_its_tokens(mode, sharing):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(7, 5, mode=mode, padding_idx=2)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens, offsets=None):
            return self.head(torch.tanh(self.table(tokens, offsets)))

    model, y = Bag(), torch.tensor([1, 0, 6])
    x = torch.tensor([[1, 2, 3], [4, 4, 0], [6, 5, 2]])
    inputs = (x,) if sharing == "examples" else (x.reshape(-1), torch.tensor([0, 2, 6]))
    found, _ = kt.records(model, CE, inputs, y, fisher=kf.empirical)
    (layer,) = kt.plan(model, *inputs).layers.values()
    losses = F.cross_entropy(model(*inputs), y, reduction="none")
    close(kf.dense(found["table"]), empirical(losses, 3, layer))
