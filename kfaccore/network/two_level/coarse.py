"""Coarse spaces of the two-level method: which vectors of each layer span the correction.

A vector lives on one layer, shaped like its gradient. Only the span matters: nothing is orthonormalised.
Source: Koroko et al. 2023 (2303.18083); ones and eigenvectors: Tselepidis et al. 2020 (2011.00573).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from kfaccore import tree
from kfaccore.linalg import kron, side
from kfaccore.method import Block
from kfaccore.network.two_level import modes
from kfaccore.network.two_level.local import Local, now
from kfaccore.network.two_level.vectors import Outer, Vector, unit
from kfaccore.xp.arrays import Array, from_host, namespace, place
from kfaccore.xp.ranges import COUNT, ranged

K = TypeVar("K")


class Space(Protocol[K]):
    """Frozen numbers; what lasts from refresh to refresh is a tree in the state.

    residual   whether vectors are made of the step's residual
    outer      whether all vectors are `Outer`
    turns      whether vectors are made of the residual and of M^-1 alone and the step is cheaper in M's coordinates
    """

    @property
    def residual(self) -> bool: ...

    @property
    def outer(self) -> bool: ...

    @property
    def turns(self) -> bool: ...

    def init(self, name: str, block: Block, like: Array, local: Local) -> K:
        """The tree before the first refresh; `local` solves as the method does then."""
        ...

    def refresh(self, kept: K, local: Local) -> K:
        """The tree after one."""
        ...

    def vectors(self, kept: K, local: Local) -> list[Vector]:
        """This step's vectors: arrays (blocks, d_out, d_in) or `Outer`."""
        ...


@dataclass(frozen=True)
class Nicolaides:
    """Ones: one vector a layer."""

    residual = False
    outer = True
    turns = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> Outer:
        xp = namespace(like)
        where = place(like)
        return Outer(xp.ones((block.blocks, block.d_out), **where), xp.ones((block.blocks, block.d_in), **where))

    def refresh(self, kept: Outer, local: Local) -> Outer:
        return kept

    def vectors(self, kept: Outer, local: Local) -> list[Vector]:
        return [kept]


@dataclass(frozen=True)
class Spectral(Nicolaides):
    """The lowest mode of the layer's own matrix, q_g q_a^T; for methods with eigenvectors.

    Of modes as low as each other the one on the first coordinates, in the basis that fixed vectors make of their space.
    """

    def init(self, name: str, block: Block, like: Array, local: Local) -> Outer:
        ones = super().init(name, block, like, local)
        return Outer(0.0 * ones.left, ones.right)

    def refresh(self, kept: Outer, local: Local) -> Outer:
        return modes.lowest(*local.eigensystem())


@dataclass(frozen=True)
class Directions:
    """M^-1 g, the layer's own direction: a best length for the step of every layer. Its image is known: no product."""

    residual = False
    outer = False
    turns = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> tuple[Array, ...]:
        return ()

    def refresh(self, kept: tuple[Array, ...], local: Local) -> tuple[Array, ...]:
        return kept

    def vectors(self, kept: tuple[Array, ...], local: Local) -> list[Vector]:
        return [now(local.direction)]


@dataclass(frozen=True)
class Residual(Directions):
    """M^-1 (g - F_d M^-1 g): the preconditioned residual of this very step."""

    residual = True
    turns = True

    def vectors(self, kept: tuple[Array, ...], local: Local) -> list[Vector]:
        return [local.solve(now(local.residual))]


Powers = tuple[object, tuple[Vector, ...]]  # what the inner space keeps, and M^-1 v, M^-2 v, ... of its vectors


@dataclass(frozen=True)
class Krylov:
    """{v, M^-1 v, ..., M^-(order - 1) v} for every vector v of `space`; products where v and M^-1 are."""

    space: Space = field(default=Nicolaides())
    order: int = 2

    outer = False

    def __post_init__(self) -> None:
        ranged(self, order=COUNT)

    @property
    def residual(self) -> bool:
        """As the space it grows from."""
        return self.space.residual

    @property
    def turns(self) -> bool:
        """As the space it grows from."""
        return self.space.turns

    def init(self, name: str, block: Block, like: Array, local: Local) -> Powers:
        inner = self.space.init(name, block, like, local)
        if self.residual:
            return (inner, ())
        powers = self._powers(self.space.vectors(inner, local), local)
        return (inner, tree.map(lambda x: 0 * x, tuple(powers)))

    def refresh(self, kept: Powers, local: Local) -> Powers:
        inner = self.space.refresh(kept[0], local)
        if self.residual:
            return (inner, ())
        return (inner, tuple(self._powers(self.space.vectors(inner, local), local)))

    def vectors(self, kept: Powers, local: Local) -> list[Vector]:
        first = self.space.vectors(kept[0], local)
        return [*first, *(self._powers(first, local) if self.residual else kept[1])]

    def _powers(self, first: list[Vector], local: Local) -> list[Vector]:
        """M^-1 v, M^-2 v, ... of each; every one is scaled before the next product, or powers leave the range of
        floats. M^-1 of the residual is of the size of a step, so the first needs none."""
        found = []
        for v in first:
            for i in range(self.order - 1):
                v = local.solve(v if self.residual and i == 0 else unit(v))
                found.append(v)
        return found


@dataclass(frozen=True)
class Given:
    """Arbitrary vectors: make(name, block) gives NumPy arrays (blocks, d_out, d_in), as many as it likes."""

    make: Callable[[str, Block], Sequence[np.ndarray]]

    residual = False
    outer = False
    turns = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> tuple[Array, ...]:
        shape = (block.blocks, block.d_out, block.d_in)
        found = []
        for v in self.make(name, block):
            if np.shape(v) != shape:
                raise ValueError(f"a coarse vector of layer {name!r} has shape {np.shape(v)}; need {shape}")
            found.append(namespace(like).astype(from_host(np.asarray(v, np.float64), like), place(like)["dtype"]))
        return tuple(found)

    def refresh(self, kept: tuple[Array, ...], local: Local) -> tuple[Array, ...]:
        return kept

    def vectors(self, kept: tuple[Array, ...], local: Local) -> list[Vector]:
        return list(kept)


Eigenvectors = tuple[Outer, Array, Array]  # ones, Qg, Qa


@dataclass(frozen=True)
class Enriched:
    """Ones and the count - 1 eigenvectors q_g q_a^T of M on which the gradient projects most; for methods with
    eigenvectors.

    Those on which it projects no more than on one that is left out are left out too: rounding would pick among them.
    Of equal eigenvalues the eigenvectors are those that fixed vectors make.
    """

    count: int = 5

    def __post_init__(self) -> None:
        ranged(self, count=COUNT)

    residual = False
    outer = True
    turns = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> Eigenvectors:
        if not 1 <= self.count <= 1 + block.d_out * block.d_in:
            raise ValueError(f"count is {self.count}; layer {name!r} has {block.d_out * block.d_in} eigenvectors")
        Qg = side.identity(side.zeros(block.blocks, block.d_out, block.diagonal_out, like))
        Qa = side.identity(side.zeros(block.blocks, block.d_in, block.diagonal_in, like))
        return (Nicolaides().init(name, block, like, local), Qg, Qa)

    def refresh(self, kept: Eigenvectors, local: Local) -> Eigenvectors:
        _, Qg, Qa = local.eigensystem()
        return (kept[0], Qg, Qa)

    def vectors(self, kept: Eigenvectors, local: Local) -> list[Vector]:
        ones, Qg, Qa = kept
        if self.count == 1:
            return [ones]
        rotated = kron.apply(side.transposed(Qg), now(local.grad)(), Qa)
        return [ones, *modes.leading(rotated, self.count - 1, Qg, Qa)]
