"""The state of the optax transformation, and where it is in that of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaccore import Block, Code, Info

Fresh = bool | jax.Array | None  # whether a step refreshes: said outside jit, or inside; None: the clocks say


@dataclass(frozen=True, eq=False)
class Codes(Mapping[str, Any]):
    """{block of parameters: its codes (blocks,)}, one array in which a block is cut out when it is asked for: an output
    for each would be a kernel for each, compiled one by one.

    table   all codes, in the order of `names`
    sizes   how many each has
    """

    table: Any
    names: tuple[str, ...] = field(default=(), metadata={"static": True})
    sizes: tuple[int, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def start(cls, blocks: Mapping[str, Block], order: tuple[str, ...], code: int) -> Codes:
        """The same code everywhere; `order` says which blocks come first, the others follow."""
        names = (*order, *(name for name in blocks if name not in order))
        sizes = tuple(blocks[name].blocks for name in names)
        return cls(jnp.full((sum(sizes),), code, jnp.int32), names, sizes)

    def after(self, info: Info) -> Codes:
        """Those of a step, in the same order; a block that took no part keeps its own."""
        runs = info.code_runs()
        if tuple(name for names, _ in runs for name in names) != self.names:
            runs = [((name,), info.codes[name] if name in info.codes else self[name]) for name in self.names]
        table = jnp.concatenate([jnp.reshape(codes, (-1,)) for _, codes in runs])
        return Codes(table.astype(jnp.int32), self.names, self.sizes)

    @property
    def counted(self) -> Any:
        """How many blocks have each code, (codes,)."""
        return jnp.sum(self.table[:, None] == jnp.arange(len(Code)), 0, dtype=jnp.int32)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where each layer's codes lie, looked up once for all."""
        ends = accumulate(self.sizes)
        return {name: slice(end - size, end) for name, size, end in zip(self.names, self.sizes, ends, strict=True)}

    def __getitem__(self, name: str) -> Any:
        return self.table[self.spans[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def rebuilt(self, new: Mapping[str, Any]) -> Codes:
        """These blocks with other codes, as a file gives them: by name."""
        return replace(self, table=jnp.concatenate([jnp.asarray(new[name]) for name in self.names]))


class KFACState(NamedTuple):
    """The Preconditioner's state, the code of each block after the last step, how often each code came up, and the
    state of `rest` or `graft`."""

    core: Any
    codes: Codes
    counts: Any
    rest: Any = ()

    def __reduce__(self) -> tuple:
        """Pickled so that a process which has made no state yet can load it."""
        return restored, (KFACState, *self)


def restored(kind: Any, *fields: Any) -> Any:
    """A state from a pickle, with what it is made of known to JAX as trees."""
    from kfaccore_jax.trees import register

    return register(kind(*fields))


def state_of(state: Any) -> KFACState:
    """The state of kfac in that of a chain."""
    found = _states(state)
    if len(found) != 1:
        raise ValueError(f"the state of one kfac(plan) is needed; this has {len(found)}")
    return found[0]


def _states(state: Any) -> list[KFACState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KFACState))
    return [x for x in leaves if isinstance(x, KFACState)]


def counts_of(state: Any) -> Any:
    """How often each code has come up, from the state of a chain with kfac, or of several for parts of the leaves."""
    found = _states(state)
    return sum(x.counts for x in found[1:]) + found[0].counts if found else state_of(state).counts
