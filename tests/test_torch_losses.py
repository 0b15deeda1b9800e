"""Losses of torch: draws and normaliser reproduce the training loss's own derivatives."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402
from kfaccore_torch import known_losses, own_objective  # noqa: E402
from kfaccore_torch.losses import objective  # noqa: E402

WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])
TOKENS = torch.tensor([[0, 2], [1, -100], [2, 2], [1, 0]])
PROBABILITIES = torch.softmax(torch.arange(12.0, dtype=torch.float64).reshape(4, 3) % 5, 1)
SOFT = PROBABILITIES * torch.tensor([[0.0], [0.5], [1.0], [2.5]], dtype=torch.float64)
CASES = {
    "labels": (nn.CrossEntropyLoss(), (4, 3), LABELS),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), (4, 3), LABELS),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), (4, 3), LABELS),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), (4, 3), LABELS),
    "weights, smoothing": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), (4, 3), LABELS),
    "ignored": (nn.CrossEntropyLoss(ignore_index=2), (4, 3), LABELS),
    "tokens": (nn.CrossEntropyLoss(), (4, 3, 2), TOKENS),
    "tokens, weights": (nn.CrossEntropyLoss(weight=WEIGHTS), (4, 3, 2), TOKENS),
    "squares": (nn.MSELoss(), (4, 3), None),
    "sum of squares": (nn.MSELoss(reduction="sum"), (4, 3), None),
    "squares of images": (nn.MSELoss(), (4, 2, 3), None),
    "logits": (nn.BCEWithLogitsLoss(), (4, 3), None),
    "sum of logits": (nn.BCEWithLogitsLoss(reduction="sum"), (4, 3), None),
    "logits, weighted": (nn.BCEWithLogitsLoss(WEIGHTS[:, None].expand(3, 3)[:1], pos_weight=1 + WEIGHTS), (4, 3), None),
    "sum of logits, weighted": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS, reduction="sum"), (4, 3), None),
    "one logit": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS[:1]), (4,), None),
    "one number": (nn.MSELoss(), (4,), None),
    "soft labels": (nn.CrossEntropyLoss(), (4, 3), PROBABILITIES),
    "soft labels, of any sum": (nn.CrossEntropyLoss(label_smoothing=0.1), (4, 3), SOFT),
    "soft labels, weights": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1, reduction="sum"), (4, 3), SOFT),
    "soft labels of tokens": (nn.CrossEntropyLoss(WEIGHTS), (4, 3, 2), torch.stack([SOFT, PROBABILITIES], 2)),
    "core softmax": (kf.SoftmaxCrossEntropy(), (4, 3), LABELS),
    "core tokens": (kf.SoftmaxCrossEntropy(ignore=-100), (4, 2, 3), TOKENS),
    "core gaussian": (kf.Gaussian(), (4, 3), None),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def prepared(case):
    torch.manual_seed(0)
    loss, shape, target = case
    f = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return objective(loss), f, torch.rand(shape, dtype=torch.float64) if target is None else target


@cases
def test_the_gradient(case):
    found, f, target = prepared(case)
    value = found.value(f, target)
    (wanted,) = torch.autograd.grad(value, f)
    draws = found.draws(kf.empirical, 1, f, target, np.random.default_rng(0))
    torch.testing.assert_close(draws.sum(0) / found.share(f, target), wanted, rtol=1e-12, atol=1e-13)


@cases
def test_the_hessian(case):
    """Type-2 draws over n are the Hessian of the training loss, exactly, smoothing or not."""
    found, f, target = prepared(case)
    H = torch.autograd.functional.hessian(lambda f: found.value(f, target), f.detach())
    draws = found.draws(kf.type2, 1, f, target, np.random.default_rng(0))
    n, size = found.share(f, target), f[0].numel()
    H = H.reshape(4, size, 4, size)
    for i in range(4):
        rows = draws[:, i].reshape(-1, size)
        torch.testing.assert_close(rows.T @ rows / n, H[i, :, i], rtol=1e-10, atol=1e-12)


@cases
def test_sampled_draws_are_unbiased(case):
    found, f, target = prepared(case)
    many = found.draws(kf.monte_carlo, 40000, f, target, np.random.default_rng(0))
    exact = found.draws(kf.type2, 1, f, target, np.random.default_rng(0))
    assert many.dtype == torch.float64
    for i in range(4):
        rows, roots = (x[:, i].reshape(len(x), -1) for x in (many, exact))
        assert (rows.T @ rows - roots.T @ roots).abs().max() < 0.03 * (1 + (roots.T @ roots).abs().max())


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "reduction 'none'"),
        (nn.MSELoss(reduction="none"), "reduction 'none'"),
        (nn.NLLLoss(), "use CrossEntropyLoss"),
        (nn.BCELoss(), "logits"),
        (nn.HuberLoss(), "no Fisher here"),
        (lambda f, y: f.sum(), "no Fisher here"),
        (None, "no Fisher here"),
    ],
)
def test_refused(loss, words):
    with pytest.raises(ValueError, match=words):
        objective(loss)


class Heads(nn.Module):
    """Two heads on one trunk, of fixed start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.b, self.h, self.k = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        z = self.b(x).tanh()
        return {"a": self.h(z), "b": self.k(z)}


@pytest.mark.usefixtures("torch_double")
def test_a_joint_of_sums_is_of_their_weighted_sum():
    """F of one batch is the sum over heads of weight times each head's own F; n is 1, or 0 where nothing counts."""
    y = {"a": torch.tensor([0, 2, -100, 1]), "b": torch.zeros(4, 2)}
    model, x = Heads(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parts = {"a": nn.CrossEntropyLoss(reduction="sum"), "b": nn.MSELoss(reduction="sum")}
    joint = kf.Joint(parts, {"b": 0.5})
    found, _ = kt.records(model, joint, x, y, fisher=kf.type2)
    alone = {
        head: kt.records(model, part, x, y[head], fisher=kf.type2, output=head)[0]["b"] for head, part in parts.items()
    }
    wanted = kf.dense(alone["a"]) + 0.5 * kf.dense(alone["b"])
    np.testing.assert_allclose(kf.dense(found["b"]), wanted, rtol=1e-10, atol=1e-14)
    assert (objective(joint).total, objective(joint).share(model(x), y)) == (True, 1.0)
    nothing = {"a": torch.full((4,), -100)}
    assert objective(kf.Joint({"a": parts["a"]})).share({"a": model(x)["a"]}, nothing) == 0.0


def test_a_joint_of_a_sum_and_a_mean_is_refused():
    joint = kf.Joint({"a": nn.CrossEntropyLoss(reduction="sum"), "b": nn.MSELoss()})
    with pytest.raises(ValueError, match=r"sum losses for \['a'\] and mean losses for \['b'\].*one reduction"):
        objective(joint)


@pytest.mark.usefixtures("torch_double")
@pytest.mark.parametrize("far", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("silent", [nn.CrossEntropyLoss(), kf.SoftmaxCrossEntropy(ignore=-100)], ids=["torch", "core"])
def test_a_head_without_labels_adds_nothing(silent, far, monkeypatch):
    """Value and slope are those of the other head; of no head at all the batch is refused, where the host knows, or
    its loss is NaN."""
    if far:
        for module in (known_losses, own_objective):
            monkeypatch.setattr(module, "known_at_once", lambda x: not x.numel())
    model, x = Heads(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    f, y = model(x), {"a": torch.tensor([0, 2, 1, 1]), "b": torch.full((4,), -100)}
    joint, alone = objective(kf.Joint({"a": silent, "b": silent}, {"a": 0.5})), nn.CrossEntropyLoss()
    value = joint.value(f, y)
    torch.testing.assert_close(value, 0.5 * alone(f["a"], y["a"]), rtol=1e-13, atol=0.0)
    slopes = torch.autograd.grad(value, [model.b.weight, model.k.weight], retain_graph=True)
    (wanted,) = torch.autograd.grad(0.5 * alone(f["a"], y["a"]), [model.b.weight], retain_graph=True)
    torch.testing.assert_close(slopes[0], wanted, rtol=1e-12, atol=1e-15)
    assert not slopes[1].any()
    assert joint.share(f, y) == 4.0
    none = {"a": y["b"], "b": y["b"]}
    if far:
        assert joint.value(f, none).isnan()
        return
    assert joint.share(f, none) == 0.0
    with pytest.raises(ValueError, match="all labels of the batch are ignored"):
        kt.Optimizer(model, kf.Joint({"a": silent, "b": silent})).step(x, none)


def test_a_label_without_a_class_is_refused():
    """By a loss that is not finite: the host waits for no label."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    optimizer = kt.Optimizer(model, kf.SoftmaxCrossEntropy())
    assert np.isfinite(float(optimizer.step(x, torch.tensor([1, 2, 0, 1]))))
    before = model.weight.detach().clone()
    assert np.isnan(float(optimizer.step(x, torch.tensor([1, 2, 3, 1]))))
    assert torch.equal(model.weight, before)
    assert np.isfinite(float(optimizer.step(x, torch.tensor([1, 2, 0, 1]))))
    assert not torch.equal(model.weight, before)


def temperature(loss):
    loss.register_forward_pre_hook(lambda module, given: (given[0] / 0.5, given[1]))


def doubled(loss):
    loss.register_forward_hook(lambda module, given, value: 2 * value)


def bound_anew(loss):
    loss.forward = lambda f, y: nn.functional.cross_entropy(f / 0.5, y)


def logged(loss):
    loss.register_forward_hook(lambda module, given, value: None)


@pytest.mark.parametrize("change", [temperature, doubled, bound_anew, logged])
def test_a_loss_that_is_not_what_its_class_does_is_refused(change):
    """By hooks or by a `forward` of the instance; hooks that only look are none of our business."""
    torch.manual_seed(0)
    model, loss = nn.Linear(3, 4), nn.CrossEntropyLoss()
    change(loss)
    pre = kt.Preconditioner(model, loss, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    with pre.capture():
        f = model(torch.randn(6, 3))
    y = torch.randint(4, (6,))
    if change is logged:
        pre.loss(f, y).backward()
        pre.step()
    else:
        with pytest.raises(ValueError, match="CrossEntropyLoss has hooks or a `forward` of its own"):
            pre.loss(f, y)


HEADS = {"a": nn.MSELoss(), "b": nn.CrossEntropyLoss()}
UNLABELLED = {
    "cross entropy": (nn.CrossEntropyLoss(), None, "CrossEntropyLoss got a target of type NoneType"),
    "a list": (nn.CrossEntropyLoss(), [0, 1, 2, 0, 1], "CrossEntropyLoss got a target of type list"),
    "weights of labels": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), None, "BCEWithLogitsLoss got a target"),
    "squares": (nn.MSELoss(), None, "MSELoss got a target of type NoneType"),
    "of the core": (kf.SoftmaxCrossEntropy(), None, "SoftmaxCrossEntropy got a target of type NoneType"),
    "heads": (kf.Joint(HEADS), None, r"a dict of targets for \['a', 'b'\], got NoneType"),
    "one of two heads": (kf.Joint(HEADS), {"a": torch.ones(5, 3)}, r"targets for \['a', 'b'\], got \['a'\]"),
}


@pytest.mark.parametrize("attached", [False, True], ids=["loss", "attach"])
@pytest.mark.parametrize("case", UNLABELLED)
def test_a_target_that_is_none_is_named(case, attached):
    loss, target, words = UNLABELLED[case]
    model = nn.Linear(3, 3)
    pre = kt.Preconditioner(model, loss, fisher=kf.type2 if "heads" in case else kf.empirical)
    with pre.capture():
        f = model(torch.ones(5, 3))
    value = f.sum()
    f = {"a": f, "b": 2 * f} if isinstance(loss, kf.Joint) else f
    with pytest.raises(TypeError, match=words):
        pre.attach(value, f, target) if attached else pre.loss(f, target)


def test_a_curvature_that_needs_no_labels_asks_for_none():
    """Of squares whose value was formed elsewhere."""
    found = []
    for target in (None, torch.zeros(5, 3)):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        pre = kt.Preconditioner(model, nn.MSELoss(), fisher=kf.type2)
        with pre.capture():
            f = model(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
        pre.attach((f**2).mean(), f, target).backward()
        pre.step()
        found.append(model.weight.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)
