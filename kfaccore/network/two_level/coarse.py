"""Coarse spaces of the two-level method: which vectors of each layer span the correction.

A vector lives on one layer, shaped like its gradient. Only the span matters: nothing is orthonormalised.
Source: Koroko et al. 2023 (2303.18083); ones and eigenvectors: Tselepidis et al. 2020 (2011.00573).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import array_api_compat as aac
import numpy as np

from kfaccore import tree
from kfaccore.linalg import side
from kfaccore.method import Block
from kfaccore.network.two_level.vectors import Outer, pair, unit
from kfaccore.xp.arrays import Array, from_host, namespace


@dataclass(frozen=True)
class Local:
    """What a space may use of its layer: M^-1 v, eigenpairs of M, and at a step grad(), M^-1 grad and the residual.

    solve gives an `Outer` for an `Outer` where M^-1 is one Kronecker product, else an array.
    """

    solve: Callable[[Any], Any]
    eigensystem: Callable[[], tuple[Array, Array, Array]]
    grad: Any = None
    direction: Array | None = None
    residual: Array | None = None


class Space(Protocol):
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

    def init(self, name: str, block: Block, like: Array, local: Local) -> Any:
        """The tree before the first refresh; `local` solves as the method does then."""
        ...

    def refresh(self, kept: Any, local: Local) -> Any:
        """The tree after one."""
        ...

    def vectors(self, kept: Any, local: Local) -> list[Any]:
        """This step's vectors: arrays (blocks, d_out, d_in) or `Outer`."""
        ...


@dataclass(frozen=True)
class Nicolaides:
    """Ones: one vector a layer."""

    residual: ClassVar[bool] = False
    outer: ClassVar[bool] = True
    turns: ClassVar[bool] = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> Outer:
        xp, where = namespace(like), {"dtype": like.dtype, "device": aac.device(like)}
        shapes = (block.blocks, block.d_out), (block.blocks, block.d_in)
        left, right = (xp.ones(shape, **where) for shape in shapes)
        return Outer(left, right)

    def refresh(self, kept: Outer, local: Local) -> Outer:
        return kept

    def vectors(self, kept: Outer, local: Local) -> list[Any]:
        return [kept]


@dataclass(frozen=True)
class Spectral(Nicolaides):
    """The lowest mode of the layer's own matrix, q_g q_a^T; for methods with eigenvectors."""

    def init(self, name: str, block: Block, like: Array, local: Local) -> Outer:
        ones = super().init(name, block, like, local)
        return Outer(0.0 * ones.left, ones.right)

    def refresh(self, kept: Outer, local: Local) -> Outer:
        S, Qg, Qa = local.eigensystem()
        xp = namespace(S)
        return pair(xp.argmin(xp.reshape(S, (S.shape[0], -1)), axis=-1), Qg, Qa)


@dataclass(frozen=True)
class Directions:
    """M^-1 g, the layer's own direction: a best length for the step of every layer. Its image is known: no product."""

    residual: ClassVar[bool] = False
    outer: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> tuple:
        return ()

    def refresh(self, kept: tuple, local: Local) -> tuple:
        return kept

    def vectors(self, kept: tuple, local: Local) -> list[Any]:
        return [local.direction]


@dataclass(frozen=True)
class Residual(Directions):
    """M^-1 (g - F_d M^-1 g): the preconditioned residual of this very step."""

    residual: ClassVar[bool] = True
    turns: ClassVar[bool] = True

    def vectors(self, kept: tuple, local: Local) -> list[Any]:
        return [local.solve(local.residual)]


@dataclass(frozen=True)
class Krylov:
    """{v, M^-1 v, ..., M^-(order - 1) v} for every vector v of `space`; products where v and M^-1 are."""

    space: Any = field(default=Nicolaides())
    order: int = 2

    outer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order is {self.order}; need at least 1 vector a vector of the space")

    @property
    def residual(self) -> bool:
        return self.space.residual

    @property
    def turns(self) -> bool:
        return self.space.turns

    def init(self, name: str, block: Block, like: Array, local: Local) -> Any:
        inner = self.space.init(name, block, like, local)
        if self.residual:
            return (inner, ())
        return (inner, tree.map(lambda x: 0 * x, tuple(self._powers(self.space.vectors(inner, local), local))))

    def refresh(self, kept: Any, local: Local) -> Any:
        inner = self.space.refresh(kept[0], local)
        if self.residual:
            return (inner, ())
        return (inner, tuple(self._powers(self.space.vectors(inner, local), local)))

    def vectors(self, kept: Any, local: Local) -> list[Any]:
        first = self.space.vectors(kept[0], local)
        return [*first, *(self._powers(first, local) if self.residual else kept[1])]

    def _powers(self, first: list[Any], local: Local) -> list[Any]:
        found = []
        for v in first:
            for i in range(self.order - 1):
                v = local.solve(v if self.residual and not i else unit(v))
                found.append(v)
        return found


@dataclass(frozen=True)
class Given:
    """Arbitrary vectors: make(name, block) gives NumPy arrays (blocks, d_out, d_in), as many as it likes."""

    make: Callable[[str, Block], Sequence[np.ndarray]]

    residual: ClassVar[bool] = False
    outer: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> tuple:
        shape, found = (block.blocks, block.d_out, block.d_in), []
        for v in self.make(name, block):
            if np.shape(v) != shape:
                raise ValueError(f"a coarse vector of layer {name!r} has shape {np.shape(v)}; need {shape}")
            found.append(namespace(like).astype(from_host(np.asarray(v, np.float64), like), like.dtype))
        return tuple(found)

    def refresh(self, kept: tuple, local: Local) -> tuple:
        return kept

    def vectors(self, kept: tuple, local: Local) -> list[Any]:
        return list(kept)


@dataclass(frozen=True)
class Enriched:
    """Ones and the count - 1 eigenvectors q_g q_a^T of M on which the gradient projects most; for methods with
    eigenvectors."""

    count: int = 5

    residual: ClassVar[bool] = False
    outer: ClassVar[bool] = True
    turns: ClassVar[bool] = False

    def init(self, name: str, block: Block, like: Array, local: Local) -> Any:
        if not 1 <= self.count <= 1 + block.d_out * block.d_in:
            raise ValueError(f"count is {self.count}; layer {name!r} has {block.d_out * block.d_in} eigenvectors")
        zeros = side.zeros(block.blocks, block.d_in, block.diagonal_in, like)
        Qg, Qa = side.identity(side.zeros(block.blocks, block.d_out, False, like)), side.identity(zeros)
        return (Nicolaides().init(name, block, like, local), Qg, Qa)

    def refresh(self, kept: Any, local: Local) -> Any:
        return (kept[0], *local.eigensystem()[1:])

    def vectors(self, kept: Any, local: Local) -> list[Any]:
        ones, Qg, Qa = kept
        if self.count == 1:
            return [ones]
        xp = namespace(Qg)
        rotated = side.times(xp.matmul(Qg.mT, local.grad()), Qa)
        order = xp.argsort(xp.abs(xp.reshape(rotated, (rotated.shape[0], -1))), axis=-1, descending=True)
        return [ones, *(pair(order[:, i], Qg, Qa) for i in range(self.count - 1))]
