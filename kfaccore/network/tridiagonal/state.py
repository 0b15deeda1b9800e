"""What a block-tridiagonal chain keeps of each layer and of each link between neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import factors
from kfaccore.linalg import kron
from kfaccore.xp.arrays import Array


@dataclass(frozen=True)
class Link:
    """A Kronecker block G (x) A between a layer and the next: A (1, d_in, d_in'), G (1, d_out, d_out')."""

    A: Array
    G: Array

    def times(self, v: Array) -> Array:
        """From the next layer to this one: G v A^T."""
        return kron.apply(self.G, v, self.A.mT)

    def transposed_times(self, v: Array) -> Array:
        """From this layer to the next one: G^T v A."""
        return kron.apply(self.G.mT, v, self.A)


Next = Link | tuple[()]  # the last layer has none


@dataclass(frozen=True)
class Parts:
    """S^-1 = (Kg (x) Ka) diag(1 / below) (Kg (x) Ka)^T and Psi = PsiG (x) PsiA."""

    Kg: Array
    Ka: Array
    below: Array
    psi: Next


@dataclass(frozen=True)
class Layer:
    """Averages A, G times `weight` (1,), those of a a'^T and g g'^T with the next layer times the same, what the last
    refresh made of them, code (1,)."""

    A: Array
    G: Array
    weight: Array
    link: Next
    parts: Parts
    code: Array


@dataclass(frozen=True)
class State:
    """The layers, in the order of the chain."""

    layers: dict[str, Layer]


@dataclass(frozen=True)
class Stats:
    """K-FAC's sums and those of the link; a record that is not finite is bad for the whole chain."""

    factors: factors.Stats
    link: Next

    @property
    def bad(self) -> Array:
        """How many records were not finite, (blocks,)."""
        return self.factors.bad
