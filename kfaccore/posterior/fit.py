"""A curvature from records alone: every batch measured, the sums combined, and where a method needs it, once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from kfaccore import tree
from kfaccore.linalg.basis import Basis
from kfaccore.method import Block, Hyper, Method, MovesWithBasis, declares
from kfaccore.posterior.curvature import Curvature
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace

Batches = Iterable[Mapping[str, Record]]
Methods = Method | Mapping[str, Method]
_ALL = Hyper(0, 0.0, 1e-3)  # without memory; the damping of refreshes whose inverses nobody reads


def fit(method: Methods, batches: Batches) -> Curvature:
    """The curvature of the mean loss over `batches`, anything that can be iterated again and gives {layer: Record}.

    method   one for all layers, or a mapping from layer

    Shares n of the batches add up. KFAC, Diagonal, Exact and TKFAC pass once; EKFAC and TEKFAC, whose eigenvalues are
    measured in the eigenvectors of all data, twice; others `cycles` + 1 times. On a list of one mapping it is `settle`
    of each layer. ValueError for no batches, for layers that differ between batches, and for an iterator that the first
    pass has spent. Cost: passes times `measure`, then the eigenvectors of each factor.
    """
    first = _first(batches)
    methods = {name: method[name] if isinstance(method, Mapping) else method for name in first}
    blocks = {name: Block.of(record) for name, record in first.items()}
    states = {name: methods[name].init(blocks[name], record.g) for name, record in first.items()}
    passes = {name: _passes(one) for name, one in methods.items()}
    for turn in range(max(passes.values())):
        live = {name for name, count in passes.items() if turn < count}
        for name, stats in _measured(methods, states, batches, live).items():
            states[name] = methods[name].update(states[name], stats, _ALL)
            if turn + 1 < passes[name]:
                states[name] = methods[name].refresh(states[name], _ALL)
    found = Curvature.of(methods, states, blocks)
    return replace(found, layers={name: _typed(basis, first[name].g) for name, basis in found.layers.items()})


def _passes(method: Method) -> int:
    cycles = method.cycles
    return cycles + 1 if cycles > 1 or declares(method, MovesWithBasis) else 1


def _first(batches: Batches) -> Mapping[str, Record]:
    """The first batch; ValueError where there is none or where asking again would not give it."""
    if isinstance(batches, Mapping):
        raise ValueError("batches is one mapping; need an iterable of them: put it into a list")
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches is an iterator, which one pass spends: give a list, or an object whose __iter__ starts anew"
        )
    for batch in batches:
        if not batch:
            raise ValueError("the first batch has no layers; need {layer: Record}")
        return batch
    raise ValueError("batches is empty; need at least one {layer: Record}")


def _measured(methods: Mapping[str, Method], states: dict, batches: Batches, live: set[str]) -> dict[str, object]:
    """Stats of one pass of the layers in `live`."""
    found: dict[str, object] = {}
    number = -1
    for number, batch in enumerate(batches):
        if set(batch) != set(methods):
            raise ValueError(
                f"batch {number} has layers {sorted(set(batch))}, the first one {sorted(methods)}; they differ in "
                f"{sorted(set(batch) ^ set(methods))}: give every layer in every batch, or leave it out of all"
            )
        for name in live:
            stats = methods[name].measure(states[name], batch[name], _ALL)
            found[name] = methods[name].combine(found[name], stats) if name in found else stats
    if number < 0:
        raise ValueError(
            "batches gave nothing when they were asked for again: give a list, or an object whose __iter__ starts anew"
        )
    return found


def _typed(basis: Basis, like: Array) -> Basis:
    """The basis in the dtype of the records: a method that keeps no arrays has none of its own."""
    xp = namespace(like)
    return tree.map(lambda x: x if x.dtype == like.dtype else xp.astype(x, like.dtype), basis)
