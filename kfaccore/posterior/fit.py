"""A curvature from records alone: every batch measured, the sums combined, and where a method needs it, once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kfaccore import tree
from kfaccore.linalg.basis import Basis
from kfaccore.method import Block, Halves, Hyper, Method, MovesWithBasis, declares
from kfaccore.options import by_layer, is_method
from kfaccore.posterior.curvature import Curvature
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, is_tracer, namespace

Batches = Iterable[Mapping[str, Record]]
Methods = Method | Mapping[str, Method]
_ALL = Hyper(0, 0.0, 1e-3)  # without memory; the damping of refreshes whose inverses nobody reads


def fit(method: Methods, batches: Batches) -> Curvature:
    """The curvature of the mean loss over `batches`, anything that can be iterated again and gives {layer: Record}.

    method   one for all layers, or a mapping from layer

    Shares n of the batches add up. KFAC, Diagonal, Exact and TKFAC pass once; EKFAC and TEKFAC, whose eigenvalues are
    measured in the eigenvectors of all data, twice; others `cycles` + 1 times. On a list of one mapping it is `settle`
    of each layer. ValueError for no batches, for layers that differ between batches, for values that are not finite,
    and for an iterator where one pass is not enough. Cost: passes times `measure`, or of `Halves` one pass of each,
    then the eigenvectors of each factor.
    """
    every = list(method.values()) if isinstance(method, Mapping) else [method]
    for each in every:
        is_method("fit", each)
    passes = max(map(_passes, every), default=1)
    _check(batches, passes)
    layers: dict[str, _Layer] = {}
    for turn in range(passes):
        found = _measured(method, layers, batches, turn)
        for name, stats in found.items():
            _check_finite(name, stats)
            layers[name] = layers[name].moved(stats, last=turn + 1 == _passes(layers[name].method))
    methods = {name: layer.method for name, layer in layers.items()}
    states = {name: layer.state for name, layer in layers.items()}
    curvature = Curvature.of(methods, states, {name: layer.block for name, layer in layers.items()})
    return replace(curvature, layers={name: _typed(x, layers[name].like) for name, x in curvature.layers.items()})


@dataclass(frozen=True)
class _Layer:
    """A layer between two passes; `like` has the records' dtype and place."""

    method: Method
    block: Block
    state: Any
    like: Array

    @classmethod
    def first(cls, method: Method, record: Record) -> _Layer:
        block = Block.of(record)
        return cls(method, block, method.init(block, record.g), record.g)

    def measured(self, record: Record, turn: int) -> Any:
        """Stats of one batch; of halves the one that this pass is for."""
        if not declares(self.method, Halves):
            return self.method.measure(self.state, record, _ALL)
        half = self.method.basis_stats if turn == 0 else self.method.moment_stats
        return half(self.state, record, _ALL)

    def moved(self, stats: Any, last: bool) -> _Layer:
        """After one pass; what is measured next needs a refresh, what is read at the end none."""
        state = self.method.update(self.state, stats, _ALL)
        return replace(self, state=state if last else self.method.refresh(state, _ALL))


def _passes(method: Method) -> int:
    cycles = method.cycles
    return cycles + 1 if cycles > 1 or declares(method, MovesWithBasis) else 1


def _check(batches: Batches, passes: int) -> None:
    if isinstance(batches, Mapping):
        raise ValueError("batches is one mapping; need an iterable of them: put it into a list")
    if passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator, which one pass spends, and {passes} are needed: give a list, or an object whose "
            f"__iter__ starts anew"
        )


def _measured(method: Methods, layers: dict[str, _Layer], batches: Batches, turn: int) -> dict[str, Any]:
    """Stats of one pass, of the layers that need it; the very first batch makes `layers`."""
    found: dict[str, Any] = {}
    number = -1
    for number, batch in enumerate(batches):
        by_layer(" to Record", **{f"batch {number}": batch})
        wrong = [name for name, record in batch.items() if not isinstance(record, Record)]
        if wrong:
            kind = type(batch[wrong[0]]).__name__
            raise TypeError(f"batch {number} has a {kind} for layer {wrong[0]!r}; need a Record")
        if not layers:
            _check_methods(method, batch)
            own = {name: method[name] if isinstance(method, Mapping) else method for name in batch}
            layers |= {name: _Layer.first(own[name], record) for name, record in batch.items()}
        if set(batch) != set(layers) or not batch:
            raise ValueError(
                f"batch {number} has layers {sorted(batch)}, the first one {sorted(layers)}; they differ in "
                f"{sorted(set(batch) ^ set(layers))}: give every layer, and at least one, in every batch"
            )
        for name, layer in layers.items():
            sizes = Block.of(batch[name])
            if sizes != layer.block:
                raise ValueError(f"batch {number} has layer {name!r} as {sizes}, the first one as {layer.block}")
            if turn < _passes(layer.method):
                stats = layer.measured(batch[name], turn)
                found[name] = layer.method.combine(found[name], stats) if name in found else stats
    if number < 0:
        again = " when they were asked for again: give a list, or an object whose __iter__ starts anew" if turn else ""
        raise ValueError(f"batches gave nothing{again or '; need at least one {layer: Record}'}")
    return found


def _check_methods(method: Methods, batch: Mapping[str, Record]) -> None:
    """ValueError for layers that are given no method."""
    missing = sorted(set(batch) - set(method)) if isinstance(method, Mapping) else []
    if isinstance(method, Mapping) and missing:
        raise ValueError(f"method has no entry for layers {missing}; it has {sorted(method)}")


def _check_finite(name: str, stats: Any) -> None:
    """ValueError for sums that a method would refuse: of them nothing is fitted."""
    if is_tracer(stats.bad):
        return
    xp = namespace(stats.bad)
    if bool(xp.any(xp.astype(stats.bad, xp.bool))):
        raise ValueError(
            f"layer {name!r}: the records of some batch hold values that are not finite, or whose squares are not: "
            f"leave that batch out, or scale it"
        )


def _typed(basis: Basis, like: Array) -> Basis:
    """The basis in the dtype of the records: a method that keeps no arrays has none of its own."""
    xp = namespace(like)
    return tree.map(lambda x: x if x.dtype == like.dtype else xp.astype(x, like.dtype), basis)
