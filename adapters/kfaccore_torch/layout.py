"""What a method sees in the rows of an example, asked of the method by what it measures.

Where it sees the same however rows are dealt to examples, rows that mix examples may stand as their shape suggests,
which is cheaper; else they must stand together. Where it sees the mean of an example's rows only, rows of two kinds in
one example have no meaning to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

import kfaccore as kf
from kfaccore_torch.bags import ragged
from kfaccore_torch.places import Groups, Place, Together, joined, plainly, together

if TYPE_CHECKING:
    from kfaccore_torch.calls import Call
    from kfaccore_torch.observe import Observed
    from kfaccore_torch.owner import Owned

MOST_RAGGED = 8  # positions a row that rows are padded to for rules that judge steps by examples, where those are
MOST_PADDED = 1 << 22  # numbers at least


def place_of(
    core: kf.Preconditioner, blocks: dict[str, kf.Block], observed: Observed, i: int, exact: bool, masked: bool
) -> Place:
    """Where the rows of the i-th call stand in its layer's record; a caller's masks are by example and position."""
    name, call = observed.calls[i]
    owned = observed.owned[i]
    place = owned.place
    if owned.mixes:
        place = joined(place, exact or stands_together(core, blocks, name))
    if exact or (masked and not isinstance(place, Together)):
        return place
    if (isinstance(place, Groups | Together) or ragged(call)) and dealt_anyhow(core, blocks, name):
        place = plainly(place, observed.split.examples, ragged(call) and not masked)
    return place


def bounded(core: kf.Preconditioner, observed: Observed) -> Observed:
    """Where a rule judges steps by examples, ragged rows that would be far too many padded stand as those of one
    example, as rows that mix examples do: the rule's model has them without a share of each example."""
    if not core.rule.needs_records or core.network is not None or kf.own_gradients(core):
        return observed
    owned = tuple(
        replace(owned, place=replace(together(owned.place), like=None), mixes=True) if _too_many(owned, call) else owned
        for owned, (_, call) in zip(observed.owned, observed.calls, strict=True)
    )
    return observed if owned == observed.owned else replace(observed, owned=owned)


def _too_many(owned: Owned, call: Call) -> bool:
    place = owned.place
    rows = prod(call.rows)
    if isinstance(place, Groups):
        padded = place.examples * place.positions[0]
    elif ragged(call):
        rows = len(call.x)
        padded = prod(call.rows) * call.options["longest"]
    else:
        return False
    return padded > MOST_RAGGED * rows and padded * prod(call.shape) // prod(call.rows) > MOST_PADDED


def stands_together(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    """Whether rows of a layer that mix examples have to be positions of one example for its statistics to be right.

    A rule that judges steps by examples is given rows an example all the same, and a network-level method too: these
    are biased there, and marked.
    """
    return not _needs_examples(core, blocks, name) and not _indifferent(core.assigned.of(name))


def dealt_anyhow(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    """Whether nothing but a method that sees the same in rows however they are dealt is given those of a layer."""
    return not _needs_examples(core, blocks, name) and _indifferent(core.assigned.of(name))


def _needs_examples(core: kf.Preconditioner, blocks: dict[str, kf.Block], name: str) -> bool:
    return core.rule.needs_records or name in core.assigned.together(blocks)


@cache
def pools(method: Any) -> bool:
    """Whether a method takes an example's positions for one, as `sharing=kfaccore.reduce` does: rows of which each is
    replaced by their mean are the same to it, and rows twice as large are not."""
    record = _rows()
    even = record.a.mean(2, keepdims=True) + 0 * record.a
    return _sees_same(method, record, kf.Record(even, record.g, 2.0)) and not _sees_same(
        method, record, kf.Record(2 * record.a, record.g, 2.0)
    )


@cache
def _indifferent(method: Any) -> bool:
    """Statistics of two examples of three rows, and of the same rows as one example of six."""
    apart = _rows()
    together = kf.Record(apart.a.reshape(1, 1, 6, 2), apart.g.reshape(1, 1, 1, 6, 2), 2.0)
    return _sees_same(method, apart, together)


def _rows() -> Any:
    rng = np.random.default_rng(0)
    a: Any = rng.standard_normal((1, 2, 3, 2))
    g: Any = rng.standard_normal((1, 1, 2, 3, 2))
    return kf.Record(a, g, 2.0)


def _sees_same(method: Any, first: kf.Record, second: kf.Record) -> bool:
    """Whether the statistics of two records are equal; False of a method that refuses one of them."""
    state = method.init(kf.Block(2, 2, rows=8, samples=8), np.zeros(1))
    hyper = kf.Hyper(0, 0.9, 1e-3)
    try:
        found = [kf.flatten(method.measure(state, record, hyper)) for record in (first, second)]
    except (ValueError, TypeError):  # it wants terms, or to know which examples these are
        return False
    if {name: x.shape for name, x in found[0].items()} != {name: x.shape for name, x in found[1].items()}:
        return False
    return all(np.allclose(x, found[1][name], rtol=1e-9, atol=1e-12) for name, x in found[0].items())
