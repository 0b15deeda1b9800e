"""Records of a trained `Sequential` over a dataset, for `kfaccore.fit` and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import numpy as np

from kfaccore import Record, SoftmaxCrossEntropy, draw_noise, empirical, forward_only, monte_carlo, type2

if TYPE_CHECKING:
    from kfaccore_numpy.network import Sequential

Array = Any
Params = dict[str, Array]
Pair = tuple[Array, Array]


@dataclass(frozen=True)
class Stream:
    """{layer: Record} of each batch, as often as it is asked for, the same draws every time.

    batches   anything that can be iterated again and gives (x, y)
    fisher    kfaccore's monte_carlo, type2, empirical or forward_only
    draws     of monte_carlo, a function of (seed, batch)

    n is a batch's share of the mean loss, so shares add up.
    """

    network: Sequential
    params: Params
    loss: Any
    batches: Iterable[Pair]
    fisher: Callable = monte_carlo
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        known = (monte_carlo, type2, empirical, forward_only)
        if self.fisher not in known:
            raise ValueError(f"fisher is {self.fisher!r}; need one of kfaccore's {[f.__name__ for f in known]}")

    def __len__(self) -> int:
        """Of the batches, where they have one."""
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Record]]:
        for number, (x, y) in enumerate(self.batches):
            f, tape = self.network.forward(self.params, x)
            g = self.network.backward(self.params, tape, self._drawn(f, y, number))
            if self.fisher is forward_only:
                g = {name: x[:0, ...] for name, x in g.items()}
            g = {name: g[name] for name in self.network.blocks()}
            yield self.network.records(tape, g, float(self.loss.normaliser(f, y)))

    def _drawn(self, f: Array, y: Array, number: int) -> Array:
        """(draws, *f.shape)."""
        xp = aac.array_namespace(f)
        if self.fisher is forward_only:
            return xp.zeros_like(f)[None, ...]  # one draw, for its shapes
        if self.fisher is type2:
            return type2(self.loss, f, y)
        if self.fisher is empirical:
            return empirical(self.loss, f, y)
        noise = draw_noise(self.loss, tuple(f.shape), self.draws, np.random.default_rng([self.seed, number]))
        return monte_carlo(self.loss, f, xp.asarray(noise), y)


@dataclass(frozen=True)
class Pulled:
    """{layer: Record} of each batch whose draws are given: `pull(f, y)` (draws, *f.shape) at the prediction."""

    network: Sequential
    params: Params
    batches: Iterable[Pair]
    pull: Callable[[Array, Array], Array]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Record]]:
        for x, y in self.batches:
            f, tape = self.network.forward(self.params, x)
            g = self.network.backward(self.params, tape, self.pull(f, y))
            g = {name: g[name] for name in self.network.blocks()}
            yield self.network.records(tape, g, float(f.shape[0]))


def outputs(network: Sequential, params: Params, batches: Iterable[Pair]) -> Pulled:
    """A stream whose draws are the units of the prediction (batch, units), for `P.covariance`."""

    def pull(f: Array, y: Array) -> Array:
        xp = aac.array_namespace(f)
        if f.ndim != 2:
            raise ValueError(f"outputs got a prediction of shape {tuple(f.shape)}; need (batch, units)")
        eye = xp.eye(f.shape[1], dtype=f.dtype)
        return xp.zeros_like(f)[None, ...] + eye[:, None, :]

    return Pulled(network, params, batches, pull)


def measured(
    network: Sequential, params: Params, gradient: Callable[[Array, Array], Array], batches: Iterable[Pair]
) -> Pulled:
    """A stream of one draw, gradient(f, y) -> like f: that of each example's measurement in its own prediction."""

    def pull(f: Array, y: Array) -> Array:
        found = gradient(f, y)
        if tuple(found.shape) != tuple(f.shape):
            raise ValueError(f"gradient gave shape {tuple(found.shape)}; need that of the prediction, {tuple(f.shape)}")
        return found[None, ...]

    return Pulled(network, params, batches, pull)


def margin(f: Array, y: Array) -> Array:
    """The gradient of f_y - log sum of exp of the others, the log odds of the label, for `measured`."""
    xp = aac.array_namespace(f)
    own = xp.arange(f.shape[1])[None, :] == y[:, None]
    # the others are a model of their own, in which the label has no chance
    return -SoftmaxCrossEntropy().gradient(xp.where(own, -xp.inf * xp.ones_like(f), f), y)
