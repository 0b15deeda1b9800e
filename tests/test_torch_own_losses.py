"""Losses that a user writes: what has no curvature, and what is no example's own, is named."""

from __future__ import annotations

import warnings

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_double")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(8) % 3


def told(loss, f=X, y=Y, fisher=kf.type2):
    """Warnings of two losses formed on a captured forward."""
    model = nn.Linear(3, 3)
    pre = kt.Preconditioner(model, loss, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)), fisher=fisher)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            with pre.capture():
                out = model(f)
            pre.loss(out, y).backward()
            pre.step()
    return [str(one.message) for one in seen]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, y):
        p = f.softmax(1)
        ctx.save_for_backward(p, y)
        return -p.gather(1, y[:, None])[:, 0].log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        p, y = ctx.saved_tensors
        return (p - nn.functional.one_hot(y, 3)) * g[:, None], None


def test_a_loss_without_curvature_is_named_once():
    class Distance(kt.ExampleLoss):
        def each(self, f, y):
            return (f - y[:, None]).abs().sum(1)

    class Fused(kt.ExampleLoss):
        def each(self, f, y):
            return Once.apply(f, y)

    for loss in (Distance(), Fused()):
        (text,) = told(loss)
        assert f"{type(loss).__name__} has a slope and no curvature" in text
        assert not told(loss)


def test_one_with_curvature_somewhere_or_at_its_minimum_is_not():
    class Huber(kt.ExampleLoss):
        def each(self, f, y):
            return nn.functional.huber_loss(f, y[:, None].to(f).expand_as(f), reduction="none").sum(1)

    class Margin(kt.ExampleLoss):
        def each(self, f, y):
            return (f - 1e3).clamp(min=0).sum(1)

    assert not told(Huber())
    assert not told(Margin())


class Ranked(kt.ExampleLoss):
    """How far each is behind the others of the batch."""

    def each(self, f, y):
        return nn.functional.softplus(f[:, 0] - f[:, :1]).mean(0)


class AgainstMean(kt.ExampleLoss):
    def each(self, f, y):
        return ((f - f.mean(0)) ** 2).sum(1)


@pytest.mark.parametrize("fisher", [kf.type2, kf.empirical])
@pytest.mark.parametrize("loss", [Ranked(), AgainstMean()], ids=lambda x: type(x).__name__)
def test_examples_that_are_compared_with_others_are_refused(loss, fisher):
    with pytest.raises(ValueError, match="each: the loss of an example depends on the predictions of others"):
        told(loss, fisher=fisher)


def test_what_others_only_scale_is_an_examples_own():
    class Scaled(kt.ExampleLoss):
        def each(self, f, y):
            return ((f - y[:, None]) ** 2).sum(1) / f.detach().std()

    assert not told(Scaled())


def test_rounding_is_no_eigenvalue_below_zero():
    class Linear(kt.ExampleLoss):
        """As good as flat: what is left of its Hessian is rounding."""

        def each(self, f, y):
            return 1e3 * f.sum(1) + 1e-14 * (f[:, 0] ** 2 - f[:, 1] ** 2)

    roots = Linear().roots(X, Y)
    assert roots.abs().max() < 1e-6


class Each(kt.ExampleLoss):
    """A function as a loss: what holds of one instance says nothing of another."""

    def __init__(self, function):
        self.function = function

    def each(self, f, y):
        return self.function(f, y)


def test_losses_of_one_class_are_asked_one_by_one():
    f, y = torch.randn(6, 2), torch.arange(6)
    first = Each(lambda f, y: (f**2).sum(1))
    first.gradient(f, y)
    with pytest.raises(ValueError, match="each: the loss of an example depends on the predictions of others"):
        Each(Ranked().each).gradient(f, y)
    with pytest.warns(UserWarning, match="Each has a slope and no curvature"):
        Each(lambda f, y: f.abs().sum(1)).roots(f, y)
    with pytest.warns(UserWarning, match="Each has a slope and no curvature"):
        Each(lambda f, y: f.sum(1)).roots(f, y)


class Speech(kt.ExampleLoss):
    def each(self, f, y):
        long = torch.full((len(f),), f.shape[1])
        return nn.functional.ctc_loss(f.log_softmax(-1).transpose(0, 1), y, long, long // 3, reduction="none")


class Joints(kt.ExampleLoss):
    def each(self, f, y):
        return f.norm(dim=1)


def test_a_loss_without_a_second_derivative_is_named_with_what_works():
    f, y = torch.randn(3, 8, 4), torch.randint(1, 4, (3, 2))
    with pytest.raises(NotImplementedError, match=r"Speech.each has no second derivative.*kfaccore.empirical"):
        Speech().roots(f, y)
    with pytest.raises(NotImplementedError, match=r"Speech needs labels.*kfaccore.empirical"):
        Speech().sampled(f, torch.rand(1, *f.shape), y)
    assert bool(Speech().gradient(f, y).isfinite().all())


def test_a_second_derivative_that_is_not_finite_is_named():
    f = torch.randn(4, 3)
    f[2] = 0.0
    with pytest.raises(FloatingPointError, match=r"Joints.each has no second derivative.*example 2 \(1 of 4\)"):
        Joints().roots(f, None)


def test_an_example_that_is_not_finite_itself_has_no_finite_roots():
    f = torch.randn(4, 3)
    right = Joints().roots(f, None)
    f[2] = torch.nan
    found = Joints().roots(f, None)
    assert bool(found[:, 2].isnan().any())
    torch.testing.assert_close(found[:, [0, 1, 3]], right[:, [0, 1, 3]], rtol=1e-12, atol=1e-14)
