"""Which way the positions of a call's rows run: where a sequence is turned round before a layer, as for the backward
half of a bidirectional network, its mask is too. Seen in the jaxpr at two lengths."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from jax.extend.core import Literal

from kfaccore_jax.batch import check_equations
from kfaccore_jax.order import grown, inner, places
from kfaccore_jax.walk import place_of

NONE = -1  # of values that no array with positions went into
FORWARDS = 0
BACKWARDS = 1
UNKNOWN = 2  # rows of both ways, or in another order


def directions(one: Any, two: Any, ours: Collection[int]) -> dict[str, int]:
    """{place of an equation: which way positions run in its operands}, and {place + ".": the same} of scans whose turns
    they are, which calls within have as rows; of a jaxpr at two lengths, {} where it has other equations there.

    ours   places among what it is given of the arrays that hold examples: a table's own order is no matter
    """
    found: dict[str, int] = {}
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    try:
        check_equations(one, two, 0)
    except ValueError:
        return {}
    pairs = enumerate(zip(one.invars, two.invars, strict=True))
    given = [FORWARDS if i in ours and grown(v, w) else NONE for i, (v, w) in pairs]
    _through(found, one, two, "", given)
    return found


def direction_of(found: dict[str, int], key: str) -> int:
    """Which way the rows of a call run."""
    place = place_of(key)
    parts = place.split(".")
    turns = (f"{'.'.join(parts[:i])}." for i in range(1, len(parts)))
    return max(FORWARDS, next((found[turn] for turn in turns if turn in found), found.get(place, FORWARDS)))


def _through(found: dict[str, int], one: Any, two: Any, prefix: str, given: list[int]) -> list[int]:
    """Notes the operands of each equation; which way the results run."""
    known = dict(zip(one.invars, given, strict=True))
    for p, q, key in places(one, two, prefix):
        before = _of(known, p.invars)
        longer = [way for way, v, w in zip(before, p.invars, q.invars, strict=True) if grown(v, w)]
        way = _same(longer)
        found[key] = way
        bodies = inner(p, q)
        turns = p.primitive.name == "scan" and p.params["length"] != q.params["length"]
        if turns:
            found[f"{key}."] = way
        if bodies is None or turns:
            after = [_after(p, q, way)] * len(p.outvars)
        else:
            after = _within(found, p, bodies, f"{key}.", before)
        known.update(zip(p.outvars, after, strict=True))
    return _of(known, one.outvars)


def _within(found: dict[str, int], eqn: Any, bodies: tuple[Any, Any], prefix: str, before: list[int]) -> list[int]:
    """Through an equation's own jaxpr; of a scan until its carry has what one turn leaves."""
    after = _through(found, *bodies, prefix, before)
    if eqn.primitive.name != "scan":
        return after
    first = eqn.params["num_consts"]
    count = eqn.params["num_carry"]
    carry = [_same(pair) for pair in zip(before[first : first + count], after[:count], strict=True)]
    again = [*before[:first], *carry, *before[first + count :]]
    return after if again == before else _within(found, eqn, bodies, prefix, again)


def _after(p: Any, q: Any, way: int) -> int:
    """Of an equation's results, whose operands run this way."""
    name = p.primitive.name
    axes = grown(p.invars[0], q.invars[0]) if p.invars and not isinstance(p.invars[0], Literal) else []
    if name == "rev" and set(p.params["dimensions"]) & set(axes) and way in (FORWARDS, BACKWARDS):
        return BACKWARDS - way
    return UNKNOWN if name == "sort" and way != NONE and p.params["dimension"] in axes else way


def _same(ways: Iterable[int]) -> int:
    """What all say that say anything."""
    said = set(ways) - {NONE}
    return NONE if not said else said.pop() if len(said) == 1 else UNKNOWN


def _of(known: dict[Any, int], atoms: Any) -> list[int]:
    return [NONE if isinstance(v, Literal) else known.get(v, NONE) for v in atoms]
