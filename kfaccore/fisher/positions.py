"""Which label positions of a prediction count, and what stands in them.

Positions that are masked or ignored hold anything, NaN too, and are zero in whatever is made of them. A label that does
not exist and a mask's entry that is no flag are refused where the host holds them, and NaN on a device, which is not
waited for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kfaccore.record.masks import flags
from kfaccore.xp.arrays import Array, device_of, is_numpy, namespace, widen
from kfaccore.xp.integers import signed


@dataclass(frozen=True)
class Positions:
    """Of a prediction f (batch, *positions, outputs); arrays are bool (batch, *positions).

    valid   which count; None: all
    good    which hold what a flag and a label are; None: the host knows that all do
    """

    valid: Array | None = None
    good: Array | None = None

    def of(self, x: Array) -> Array:
        """x ([draws,] *f.shape), zero where it does not count, NaN where it is not good."""
        x = self.zeroed(x) if self.good is None else x
        return x if self.good is None else self._shown(x, self.good)

    def zeroed(self, x: Array) -> Array:
        """x ([draws,] *f.shape), zero where it does not count."""
        return x if self.valid is None else namespace(x).where(_before(self.valid, x), x, _constant(0.0, x))

    def _shown(self, x: Array, good: Array) -> Array:
        """In one pass over x: what stands in for it has a number a position."""
        xp = namespace(x)
        instead = xp.where(_before(good, x), _constant(0.0, x), _constant(float("nan"), x))
        counts = good if self.valid is None else good & self.valid
        return xp.where(_before(counts, x), x, instead)

    def count(self, f: Array) -> Array:
        """How many count, 0-d, in single precision or better."""
        xp = namespace(f)
        dtype = widen(f, "f").dtype
        if self.valid is None:
            return xp.full((), float(prod(f.shape[:-1])), dtype=dtype, device=device_of(f))
        return xp.sum(xp.astype(self.valid, dtype))


def masked(f: Array, mask: Array | None) -> Positions:
    """The positions that a mask leaves; ValueError for one of another shape."""
    if mask is None:
        return Positions()
    if tuple(mask.shape) != tuple(f.shape[:-1]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; need {tuple(f.shape[:-1])}, one entry a position of f")
    return Positions(*flags(mask))


def labelled(f: Array, target: Array, mask: Array | None, ignore: int | None) -> tuple[Array, Positions]:
    """(labels as int32 or int64, 0 where they do not count; the positions that mask and `ignore` leave).

    ValueError for labels of another shape, and for a label without a class.
    """
    xp = namespace(f, target)
    if tuple(target.shape) != tuple(f.shape[:-1]):
        raise ValueError(f"target has shape {tuple(target.shape)}; need labels of shape {tuple(f.shape[:-1])}")
    there = masked(f, mask)
    real = xp.isdtype(target.dtype, "real floating")
    label = target if real else signed(target)
    valid = there.valid
    if ignore is not None:
        valid = label != ignore if valid is None else valid & (label != ignore)
    if valid is not None:
        label = xp.where(valid, label, xp.zeros_like(label))
    good = _existing(label, f.shape[-1])
    if real:
        label = xp.astype(label if good is None else xp.where(good, label, xp.zeros_like(label)), xp.int32)
    if good is not None and there.good is not None:
        good = good & there.good
    return label, Positions(valid, there.good if good is None else good)


def beside(f: Array, target: Array) -> Array:
    """The target of f, in its dtype."""
    xp = namespace(f, target)
    if tuple(target.shape) != tuple(f.shape):
        raise ValueError(f"target has shape {tuple(target.shape)}; need that of f, {tuple(f.shape)}")
    return target if target.dtype == f.dtype else xp.astype(target, f.dtype)


def _existing(label: Array, classes: int) -> Array | None:
    """Which labels name a class; None where the host knows that all do, ValueError where it sees one that does not."""
    xp = namespace(label)
    exists = (label >= 0) & (label < classes)
    if xp.isdtype(label.dtype, "real floating"):
        exists = exists & (label == xp.floor(label))
    if not is_numpy(exists):
        return exists
    if not exists.all():
        stranger = label[~exists][0]
        raise ValueError(
            f"target has the label {stranger}, shape {tuple(label.shape)}, and f has the classes 0 to {classes - 1}; "
            f"need one of them: count classes from 0, and name labels that do not count by ignore={stranger} or a mask"
        )
    return None


def _before(flags: Array, x: Array) -> Array:
    """Flags of positions with as many axes as x, which may have draws first."""
    return namespace(flags).reshape(flags, (*(1,) * (x.ndim - flags.ndim - 1), *flags.shape, 1))


def _constant(value: float, like: Array) -> Array:
    """A number with as many axes as `like`: jax_numpy_rank_promotion="raise" wants it so."""
    return namespace(like).full((1,) * like.ndim, value, dtype=like.dtype, device=device_of(like))
