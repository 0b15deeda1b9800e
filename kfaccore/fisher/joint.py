"""Several outputs, each with a loss of its own: the training loss is their weighted sum.

Source: Martens 2020 (1412.1193), section 9: the GGN of a sum is the sum of the heads' GGNs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kfaccore.fisher import draws as single
from kfaccore.fisher.losses import Bernoulli, Gaussian, Loss, SoftmaxCrossEntropy
from kfaccore.xp.arrays import Array, device_of, namespace

if TYPE_CHECKING:
    import numpy as np

Heads = Mapping[str, Array]
ENDED = (SoftmaxCrossEntropy, Bernoulli, Gaussian)


@dataclass(frozen=True, init=False)
class Joint:
    """sum_h weight_h mean_h over heads h; predictions, targets, masks and draws are dicts by head.

    losses    head -> SoftmaxCrossEntropy, Bernoulli or Gaussian
    weights   head -> a positive number; 1 where none is given

    n of a record is the number of examples B. A head's draws carry sqrt(weight B / its own normaliser), so that
    F = (1/B) sum of vec(J) vec(J)^T is the sum of the heads' Fishers; one in which nothing counts adds nothing:

        type2         the columns of each head in turn, the other heads zero: exact
        monte_carlo   labels of all heads at once, drawn independently: products of two heads vanish in expectation
        empirical     the gradient of the whole loss, an example
    """

    losses: tuple[tuple[str, Loss], ...]
    weights: tuple[tuple[str, float], ...]

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, float] | None = None) -> None:
        given = dict(weights or {})
        unknown = sorted(set(given) - set(losses))
        if not losses or unknown:
            raise ValueError(f"Joint has losses for {sorted(losses)} and weights for unknown heads {unknown}")
        if any(not weight > 0 for weight in given.values()):
            raise ValueError(f"weights are {given}; need positive numbers, leave a head out to drop it")
        object.__setattr__(self, "losses", tuple(losses.items()))
        object.__setattr__(self, "weights", tuple((head, float(given.get(head, 1.0))) for head in losses))

    @property
    def nonnegative(self) -> bool:
        """Whether it cannot be below 0: of heads with losses of kfaccore, where none can."""
        return all(isinstance(loss, ENDED) and loss.nonnegative for _, loss in self.losses)

    def value(self, f: Mapping[str, Array], target: Heads, mask: Heads | None = None) -> Array:
        """B times the training loss, 0-d; divide by `normaliser` for the loss itself."""
        self.check(f)
        total: Any = 0.0
        for head, loss in self.losses:
            args = f[head], target[head], (mask or {}).get(head)
            total = total + dict(self.weights)[head] * loss.value(*args) / _or_one(loss.normaliser(*args))
        return total * self.normaliser(f, target, mask)

    def normaliser(self, f: Mapping[str, Array], target: Heads | None = None, mask: Heads | None = None) -> Any:
        """The number of examples, which all heads have; 0 where the targets leave nothing that counts in any head."""
        self.check(f)
        examples = float(next(iter(f.values())).shape[0])
        if target is None:
            return examples
        total: Any = sum(loss.normaliser(f[head], target[head], (mask or {}).get(head)) for head, loss in self.losses)
        if isinstance(total, int | float):
            return examples if total else 0.0
        xp = namespace(total)
        return xp.where(total == 0, total, xp.full_like(total, examples))

    def check(self, f: Mapping[str, Array]) -> None:
        """ValueError for predictions of other heads or of batches that differ."""
        heads = [head for head, _ in self.losses]
        if not isinstance(f, Mapping) or set(f) != set(heads):
            raise ValueError(
                f"Joint needs a prediction for each of {heads}, got {sorted(f) if isinstance(f, Mapping) else type(f)}"
            )
        sizes = {head: f[head].shape[0] for head in heads}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the heads have batches of {sizes} examples; need one batch")

    def draws(
        self,
        fisher: Callable,
        f: Mapping[str, Array],
        target: Heads | None,
        mask: Heads | None,
        noise: Heads | None = None,
    ) -> dict[str, Array]:
        """{head: (draws, *f.shape)}: one of `type2`, `monte_carlo` and `empirical` for all heads."""
        self.check(f)
        found = {}
        for head, loss in self.losses:
            y: Any = (target or {}).get(head)
            m = (mask or {}).get(head)
            if fisher is single.monte_carlo:
                v = single.monte_carlo(loss, f[head], (noise or {})[head], y, m)
            else:
                v = fisher(loss, f[head], y, m)
            scale = dict(self.weights)[head] * self.normaliser(f) / _or_one(loss.normaliser(f[head], y, m))
            # the empirical draw is the gradient itself, which weight B / n multiplies; the others enter F squared
            found[head] = v * (scale if fisher is single.empirical else scale**0.5)
        return self.padded(found) if fisher is single.type2 else found

    def noise(self, f: Mapping[str, Array], draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Noise for `monte_carlo`, head by head from one generator."""
        return {head: single.draw_noise(loss, tuple(f[head].shape), draws, rng) for head, loss in self.losses}

    @staticmethod
    def padded(draws: Mapping[str, Array]) -> dict[str, Array]:
        """Draws of each head in turn, zero in the other heads: {head: (sum of draws, *f.shape)}."""
        counts = {head: v.shape[0] for head, v in draws.items()}
        total = sum(counts.values())
        before = 0
        found = {}
        for head, v in draws.items():
            xp = namespace(v)
            where = {"dtype": v.dtype, "device": device_of(v)}
            sides = [xp.zeros((k, *v.shape[1:]), **where) for k in (before, total - before - counts[head])]
            found[head] = xp.concat([sides[0], v, sides[1]])
            before += counts[head]
        return found


def _or_one(n: Any) -> Any:
    """What a head is divided by, 1 in the place of 0: where nothing counts value and draws are zero already."""
    if isinstance(n, int | float):
        return n or 1.0
    xp = namespace(n)
    return xp.where(n == 0, xp.ones_like(n), n)
