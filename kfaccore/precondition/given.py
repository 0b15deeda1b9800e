"""What a step is given for a layer: Records, tuples of them (one a loss term), or Stats measured elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol, runtime_checkable

from kfaccore import tree
from kfaccore.method import State, Stats, T
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import concat
from kfaccore.xp.arrays import Array, namespace, widen


@runtime_checkable
class Averaging(Protocol):
    """A State of moving averages: `weight` (blocks,) is their share of data, in the dtype they are kept in."""

    @property
    def weight(self) -> Array: ...


Given = Record | tuple[Record, ...] | Stats
_AVERAGING: dict[type, bool] = {}  # asking a Protocol takes longer than many a solve


def records_of(batches: Sequence[Given]) -> Iterator[Record]:
    """The Records of micro-batches, terms of tuples one by one, Stats left out."""
    for batch in batches:
        if isinstance(batch, tuple):
            yield from batch
        elif isinstance(batch, Record):
            yield batch


def joined(batches: Sequence[Given]) -> Record:
    """Micro-batches as one Record, or as one tuple of them; they must not be Stats."""
    records: Any = batches
    return reduce(concat, records)


def alike(own: Mapping[str, Record | Sequence[Record]], drawn: Mapping[str, Record]) -> dict[str, Record]:
    """Micro-batches of the loss's own gradients as one Record a layer; ValueError where its rows are not those of the
    draws."""
    found = {}
    for name in own.keys() & drawn.keys():
        given = own[name]
        record = given if isinstance(given, Record) else joined(given)
        have = tuple(record.g.shape)
        need = (1, *drawn[name].g.shape[1:])
        if have != need:
            raise ValueError(f"own of layer {name!r} has g of shape {have}; need {need}, one draw of the record's rows")
        found[name] = record
    return {name: found[name] for name in drawn if name in found}


def working(state: State) -> Array | None:
    """The array whose dtype a state works in; None where it keeps no averages."""
    kind = type(state)
    if kind not in _AVERAGING:
        _AVERAGING[kind] = isinstance(state, Averaging)
    known: Any = state
    return known.weight if _AVERAGING[kind] else None


def in_dtype(stats: T, like: Array | None) -> T:
    """Stats in the dtype of the state they will move; what counts or numbers in integers stays."""
    dtypes = {x.dtype for x in tree.leaves(stats) if not isinstance(x, int | float)}
    if like is None or dtypes == {like.dtype}:
        return stats
    xp = namespace(like)
    other = dtypes & {xp.float32, xp.float64}
    return tree.map(
        lambda x: x if isinstance(x, int | float) or x.dtype not in other else xp.astype(x, like.dtype), stats
    )


def refused(stats: Stats) -> Array:
    """Where Stats are not usable, (blocks,) bool: their `bad` counts records, or says so at once."""
    bad = stats.bad
    return bad if namespace(bad).isdtype(bad.dtype, "bool") else bad > 0


def like_gradient(direction: Array, grad: Array | Factored) -> Array:
    """A direction in the dtype of its gradient, where the state's wider one made it wider."""
    wanted = grad.g.dtype if isinstance(grad, Factored) else grad.dtype
    return direction if direction.dtype == wanted else namespace(direction).astype(direction, wanted)


def widened(grads: Mapping[str, Array | Factored]) -> Mapping[str, Array | Factored]:
    """Gradients of half precision as float32, as records are: a step is computed in no less."""
    arrays = {name: x for name, x in grads.items() if not isinstance(x, Factored)}
    if not any(str(dtype).endswith("16") for dtype in {x.dtype for x in arrays.values()}):
        return grads
    return {**grads, **{name: widen(x, "grad") for name, x in arrays.items()}}


class named:
    """Adds the names of the layers at work to whatever is raised inside, once."""

    def __init__(self, *layers: str) -> None:
        self.layers = layers

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            names = ", ".join(repr(name) for name in self.layers)
            error.add_note(f"in layer{'s' if len(self.layers) > 1 else ''} {names}")
