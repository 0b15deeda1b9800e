"""How one damping number is shared between the two factors of a Kronecker block.

Source: Martens & Grosse 2015 (1503.05671), section 6.3 for pi; exact Kronecker damping needs both spectra.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kfaccore.linalg.side import Scale
from kfaccore.options import function, instance
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.ranges import AT_LEAST_0, ranged


def mean_eigenvalue(a: Scale, g: Scale) -> Array:
    """Mean eigenvalue of G (x) A, (blocks,)."""
    return a.mean * g.mean


def top_eigenvalue(a: Scale, g: Scale) -> Array:
    """Largest eigenvalue of G (x) A, (blocks,)."""
    return a.top() * g.top()


SPLITS = "a damping form: kf.pi, kf.equal, kf.per_factor, kf.top, kf.exact (not the method kf.Exact) or kf.Relative()"


class Split(Protocol):
    """A damping form; `separable` ones shift each factor, the others only know the joint spectrum."""

    @property
    def separable(self) -> bool:
        """Whether `shifts` exists."""
        ...

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        """(d_a, d_g), (blocks,) each: the block becomes (G + d_g I) (x) (A + d_a I)."""
        ...

    def denominators(self, a: Array, g: Array, damping: float | Array) -> Array:
        """Eigenvalues of the damped block (blocks, d_out, d_in) from a (blocks, d_in) and g (blocks, d_out) >= 0."""
        ...


def check(owner: object, split: Split, shifts: bool = True, instead: str = "use pi, equal, per_factor or top") -> None:
    """TypeError unless the owner's `split` is a damping form, ValueError unless it shifts each factor where it must."""
    instance(owner, "split", Split, SPLITS)
    if shifts and not split.separable:
        raise ValueError(f"split={split} does not shift each factor: {instead}")


class Separable:
    """Damping forms that shift each factor."""

    @property
    def separable(self) -> bool:
        return True

    def denominators(self: Split, a: Array, g: Array, damping: float | Array) -> Array:
        d_a, d_g = self.shifts(Scale.of_eigenvalues(a), Scale.of_eigenvalues(g), damping)
        return (g + d_g[:, None])[:, :, None] * (a + d_a[:, None])[:, None, :]


@dataclass(frozen=True)
class Pi(Separable):
    """d_a = pi sqrt(damping), d_g = sqrt(damping) / pi with pi^2 = mean eigenvalue of A over that of G.

    pi = 1 where a trace is zero. Invariant to moving a constant from one factor to the other.
    """

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        xp = namespace(a.mean)
        usable = (a.mean > 0) & (g.mean > 0)
        one = xp.ones_like(a.mean)
        pi = xp.sqrt(xp.where(usable, a.mean, one)) / xp.sqrt(xp.where(usable, g.mean, one))
        root = math.sqrt(damping) if isinstance(damping, int | float) else _root(damping, a.mean)
        return pi * root, root / pi


@dataclass(frozen=True)
class Equal(Separable):
    """d_a = d_g = sqrt(damping)."""

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        root = _root(damping, a.mean)
        return root, root


@dataclass(frozen=True)
class PerFactor(Separable):
    """d_a = d_g = damping, as in forms that add the same number to every factor."""

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        shift = namespace(a.mean).zeros_like(a.mean) + scalar(damping, a.mean)
        return shift, shift


@dataclass(frozen=True)
class Top(Separable):
    """d_a = damping times A's largest eigenvalue, d_g likewise; damping itself for a zero factor."""

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        xp = namespace(a.mean)

        def shift(top: Array) -> Array:
            return scalar(damping, top) * xp.where(top > 0, top, xp.ones_like(top))

        return shift(a.top()), shift(g.top())


@dataclass(frozen=True)
class Exact:
    """G (x) A + damping I itself, with no cross terms; needs an inverse that knows both spectra (`eigh`)."""

    @property
    def separable(self) -> bool:
        return False

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        raise ValueError("split=exact is not a shift of each factor: use inverse=eigh")

    def denominators(self, a: Array, g: Array, damping: float | Array) -> Array:
        return g[:, :, None] * a[:, None, :] + joint(damping, a)


@dataclass(frozen=True)
class Relative:
    """`split` with damping in units of the block: of its mean or of its largest eigenvalue.

    Relative(pi, mean_eigenvalue) multiplies damping by mean(A) mean(G), Relative(pi, top_eigenvalue) by the
    largest eigenvalues (a Cholesky refresh then pays for an eigendecomposition).
    """

    split: Split = Pi()
    to: Callable[[Scale, Scale], Array] = mean_eigenvalue

    def __post_init__(self) -> None:
        check(self, self.split, shifts=False)
        function(self, "to", "kf.mean_eigenvalue or kf.top_eigenvalue")

    @property
    def separable(self) -> bool:
        return self.split.separable

    def damping(self, a: Scale, g: Scale, damping: float | Array) -> Array:
        """Absolute damping (blocks,); the unit of an all-zero block is 1."""
        unit = self.to(a, g)
        return scalar(damping, unit) * namespace(unit).where(unit > 0, unit, namespace(unit).ones_like(unit))

    def shifts(self, a: Scale, g: Scale, damping: float | Array) -> tuple[Array, Array]:
        return self.split.shifts(a, g, self.damping(a, g, damping))

    def denominators(self, a: Array, g: Array, damping: float | Array) -> Array:
        absolute = self.damping(Scale.of_eigenvalues(a), Scale.of_eigenvalues(g), damping)
        return self.split.denominators(a, g, absolute)


UNITS = "kf.as_given, kf.Adaptive() or a function of (trace, size, damping)"


class Units(Protocol):
    """A choice of `damping`: what a step's damping is for a block of `size` parameters and this trace (blocks,)."""

    def __call__(self, trace: Array, size: int, damping: float | Array) -> float | Array: ...


def as_given(trace: Array, size: int, damping: float | Array) -> float | Array:
    """The damping of the step itself, whatever the block's trace."""
    return damping


@dataclass(frozen=True)
class Adaptive:
    """damping max(tr F, floor) / size for a block of `size` parameters: damping in units of the mean eigenvalue.

    The form for convolutions, whose Fishers differ by orders of magnitude; `floor` bounds it as gradients vanish.
    Source: Gao et al. 2020 (2011.13609, equation 3.5), with damping 1.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        ranged(self, floor=AT_LEAST_0)

    def __call__(self, trace: Array, size: int, damping: float | Array) -> Array:
        low = namespace(trace).zeros_like(trace) + self.floor
        return scalar(damping, trace) * namespace(trace).where(trace < low, low, trace) / size


def joint(damping: float | Array, like: Array) -> float | Array:
    """Damping, a number or (blocks,), ready to be added to denominators (blocks, d_out, d_in)."""
    value = scalar(damping, like)
    if isinstance(value, int | float) or value.ndim == 0:
        return value
    return value[:, None, None]


def _root(damping: float | Array, like: Array) -> Array:
    xp = namespace(like)
    return xp.sqrt(xp.zeros_like(like) + scalar(damping, like))


pi = Pi()
equal = Equal()
per_factor = PerFactor()
top = Top()
exact = Exact()
