"""Losses that a user writes: what they must say of themselves, and what autograd can say for them."""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.weak import WeakIdKeyDictionary

from kfaccore_torch.handed import kept

_APART = WeakIdKeyDictionary()  # losses whose examples were seen to be independent; others of a class may not be
_FLAT = WeakIdKeyDictionary()  # and those that were said to have no curvature
_INSTEAD = (
    "Write `roots`, or `labels` for Monte-Carlo draws, or take fisher=kfaccore.empirical, with a step that does not "
    "judge the loss, such as kfaccore.Fixed"
)


@runtime_checkable
class Loss(Protocol):
    """A loss with a Fisher, in torch: f (batch, ...) as the model gives it, and the target as the loop has it.

    The training loss is value / normaliser. Examples are independent: an example's loss reads its own f alone (for a
    contrast, f of one example holds both sides of a pair). A loss that is one sum, however many micro-batches there
    are, has `reduction = "sum"` and normaliser 1. Draws keep to the losses' own scale: nothing is divided by the batch.
    """

    def value(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """Sum of the examples' losses, 0-d, differentiable."""
        ...

    def normaliser(self, f: torch.Tensor, target: Any) -> float | torch.Tensor:
        """n, what the sum is divided by: the number of examples, for a mean over them."""
        ...

    def gradient(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """Of each example's loss, like f: what the empirical Fisher is made of."""
        ...

    def roots(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """(draws, *f.shape): for each example the sum over draws of v v^T, v its numbers, is the Hessian of its loss,
        or its Fisher where the Hessian is not positive semidefinite. What type2 is made of."""
        ...

    def sampled(self, f: torch.Tensor, noise: torch.Tensor, target: Any) -> torch.Tensor:
        """Gradients at labels drawn from the model, (draws, *f.shape): mean zero, their second moment the Fisher.
        `noise` (draws, *f.shape) is uniform between 0 and 1, ends excluded. What Monte-Carlo is made of."""
        ...


class ExampleLoss:
    """Base of a `Loss` that is known by the loss of each example, and by how labels are drawn; autograd does the rest.

        class Poisson(ExampleLoss):                                # f log rates (batch, d)
            def each(self, f, target):
                return (f.exp() - target * f).sum(1)

            def labels(self, f, noise, target):                    # of one draw, noise like f
                return poisson_quantile(f.exp(), noise)

    Roots are those of each example's Hessian; ValueError where one is not positive semidefinite: write `roots` then.
    """

    def each(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """(batch,): the loss of each example."""
        raise NotImplementedError(f"{type(self).__name__} needs each(f, target) -> the loss of each example, (batch,)")

    def labels(self, f: torch.Tensor, noise: torch.Tensor, target: Any) -> Any:
        """Labels drawn from the model by uniform noise like f, as `each` takes them."""
        raise NotImplementedError(
            f"{type(self).__name__} needs labels(f, noise, target) for Monte-Carlo draws; or pass "
            f"fisher=kfaccore.type2, if the loss has second derivatives, or fisher=kfaccore.empirical with a step that "
            f"does not judge the loss, such as kfaccore.Fixed"
        )

    def value(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """The sum of `each`; ValueError where that is not a number an example."""
        return self._apart(f, target).sum()

    def _apart(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """`each`, of the shape that it needs."""
        each = self.each(f, target)
        if each.shape != f.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.each gave the shape {tuple(each.shape)} for a prediction of "
                f"{tuple(f.shape)}; need ({len(f)},), the loss of each example: take no mean over them (reduction "
                f"'none'), sum over an example's own numbers, and hold it against its own target alone"
            )
        return each

    def normaliser(self, f: torch.Tensor, target: Any) -> float | torch.Tensor:
        """The number of examples."""
        return float(len(f))

    def gradient(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """By autograd."""
        with torch.enable_grad():
            x = f.detach().requires_grad_()
            return self._slope(x, target, False)

    def _slope(self, x: torch.Tensor, target: Any, graph: bool) -> torch.Tensor:
        """The gradient; of the first batch that can tell, ValueError where an example's loss reads others."""
        if self in _APART or len(x) < 2 or type(self).value is not ExampleLoss.value:
            return torch.autograd.grad(self.value(x.clone(), target), x, create_graph=graph)[0]
        each = self._apart(x.clone(), target)  # no leaf, which the loss could not write to
        (slope,) = torch.autograd.grad(each.sum(), x, create_graph=graph, retain_graph=True)
        weight = torch.linspace(0.5, 1.5, len(x), dtype=each.dtype, device=each.device)
        (weighted,) = torch.autograd.grad((weight * each).sum(), x, retain_graph=True)
        alone = weight.reshape(-1, *(1,) * (x.ndim - 1)) * slope.detach()
        top = float(alone.abs().amax())
        if float((weighted - alone).abs().amax()) > 1e-3 * top:
            raise ValueError(
                f"{type(self).__name__}.each: the loss of an example depends on the predictions of others, so that "
                f"neither draws nor Hessians are its own. Give what is compared as one example, f (groups, members, "
                f"...), or take a loss of pairs formed from both sides' outputs"
            )
        if top > 0:
            _APART[self] = True
        return slope

    def roots(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """From the eigenvectors of each example's Hessian, one pass of autograd for each number of an example."""
        with torch.enable_grad():
            x = f.detach().requires_grad_()
            slope = self._slope(x, target, True)
            try:
                columns = [_column(part, x) for part in slope.reshape(len(f), -1).sum(0)]
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # no formula for it, or a backward that is not differentiable
                raise NotImplementedError(f"{self._second()}: {error}. {_INSTEAD}") from error
        hessian = torch.stack(columns, -1).reshape(len(f), len(columns), len(columns))
        steep = float(slope.detach().abs().amax())
        if steep > 0 and not bool(hessian.any()):
            self._flat()
        values, vectors = self._modes((hessian + hessian.mT) / 2, slope.detach())
        least, most = values.amin(), values.amax()
        rounding = 1e3 * torch.finfo(values.dtype).eps * steep
        if float(least) < -max(1e-5 * float(most), rounding):
            raise ValueError(
                f"{type(self).__name__} is not convex in f: the Hessian of an example has the eigenvalue "
                f"{float(least):.3g}; write roots(f, target) from its Fisher instead, or take Monte-Carlo draws"
            )
        return (vectors * values.clamp(min=0).sqrt()[:, None]).movedim(-1, 0).reshape(-1, *f.shape)

    def _second(self) -> str:
        return f"{type(self).__name__}.each has no second derivative, which type2 is made of"

    def _modes(self, hessian: torch.Tensor, slope: torch.Tensor) -> Any:
        """Eigenvalues and vectors of each example; FloatingPointError where only the second derivative is not finite:
        examples whose slope is not either have no modes that are, and are for the step to refuse."""
        sound = hessian.isfinite().flatten(1).all(1)
        if not bool(sound.all()):
            rows = [int(i) for i in (~sound & slope.isfinite().flatten(1).all(1)).nonzero()[:, 0]]
            if rows:
                raise FloatingPointError(
                    f"{self._second()}, at example {rows[0]} ({len(rows)} of {len(sound)}): it is not finite there, as "
                    f"that of a norm or a root at 0 is; add a little under the root, leave such numbers out, or see: "
                    f"{_INSTEAD}"
                )
        values, vectors = torch.linalg.eigh(hessian.where(sound[:, None, None], torch.zeros_like(hessian)))
        return values.where(sound[:, None], torch.full_like(values, torch.nan)), vectors

    def _flat(self) -> None:
        """Say once that there is no curvature to be had."""
        if self not in _FLAT:
            _FLAT[self] = True
            warnings.warn(
                f"{type(self).__name__} has a slope and no curvature in f: its Hessian is zero in this batch, as that "
                f"of L1, hinge and quantile losses is, or a Function with a backward of its own in it has no second "
                f"derivative. type2 measures nothing of such a loss, so that its steps stay short or stop: take "
                f"fisher=kfaccore.empirical, or write `labels` for Monte-Carlo draws, or `roots`",
                stacklevel=2,
            )

    def sampled(self, f: torch.Tensor, noise: torch.Tensor, target: Any) -> torch.Tensor:
        """The gradient at `labels`, draw by draw."""
        undo = kept({"target": target}) if len(noise) > 1 else []  # what a draw writes is not there at the next
        found = []
        for one in noise:
            found.append(self.gradient(f, self.labels(f.clone(), one, target)))
            for put in undo:
                put()
        return torch.stack(found)


def _column(part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A column of every example's Hessian, (batch, numbers); zeros where the slope is constant."""
    if not part.requires_grad:
        return torch.zeros_like(x).reshape(len(x), -1)
    (found,) = torch.autograd.grad(part, x, retain_graph=True, allow_unused=True)
    return (torch.zeros_like(x) if found is None else found).reshape(len(x), -1)
