"""Layers whose rows other examples' outputs depend on: what stands before a normalisation by the batch's own moments,
or before any sum over examples that goes into the prediction. Seen in the jaxpr at two batch sizes.

For draws that are independent between examples and of zero mean E[g g^T] is exact there, but a row is no example's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jax.extend.core import Literal

from kfaccore_jax.alive import fed_back
from kfaccore_jax.batch import deals_out
from kfaccore_jax.order import carries, inner, places
from kfaccore_jax.sums import mixes

if TYPE_CHECKING:
    from kfaccore_jax.behind import Behind

Sums = Callable[..., bool]  # `mixes` for one model, of an equation at a place


def mixed(one: Any, two: Any, count: int, n: int, behind: Behind) -> set[str]:
    """Places of the equations whose results reach one of the first `count` outputs of a jaxpr, here at n and 2 n
    examples, through a sum over examples, which joins and cuts of whole batches are not; with "@" those whose operands
    do, with its number where it is one of those of a jaxpr within."""
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    found: set[str] = set()
    alone = [i < count for i in range(len(one.outvars))]
    dealt = deals_out(one, two, count)

    def sums(p: Any, q: Any, key: str, within: bool = True) -> bool:
        return key in behind.scrambled or (key not in behind.exact and mixes(p, q, n, within, dealt))

    _backwards(found, one, two, "", alone, [False] * len(alone), sums)
    return found


def _backwards(
    found: set[str], one: Any, two: Any, prefix: str, live: list[bool], hit: list[bool], sums: Sums
) -> tuple[list[bool], list[bool]]:
    """Of the inputs: whether they reach the prediction, and whether they do so through a sum over examples."""
    reaching = _of(one.outvars, live)
    summed = _of(one.outvars, hit)
    for p, q, key in reversed(places(one, two, prefix)):
        if not any(v in reaching for v in p.outvars) or p.primitive.name == "stop_gradient":
            continue
        below = any(v in summed for v in p.outvars)
        if below:
            found.add(key)
        bodies = inner(p, q)
        if bodies is None:
            summing = below or sums(p, q, key)
            found |= {f"{key}@"} if summing else set()
            ours = [v for v in p.invars if not isinstance(v, Literal) and carries(v)]
            reaching |= set(ours)
            summed |= set(ours) if summing else set()
            continue
        given = [v in reaching for v in p.outvars]
        through = [v in summed for v in p.outvars]
        if sums(p, q, key, within=False):
            through = given
        given, through = _within(found, p, bodies, f"{key}.", given, through, sums)
        found |= {f"{key}@{i}" for i, flag in enumerate(through) if flag}
        reaching |= _of(p.invars, given)
        summed |= _of(p.invars, through)
    return [v in reaching for v in one.invars], [v in summed for v in one.invars]


def _within(
    found: set[str], eqn: Any, bodies: tuple[Any, Any], prefix: str, live: list[bool], hit: list[bool], sums: Sums
) -> tuple[list[bool], list[bool]]:
    """`_backwards` of an equation's own jaxpr; of a scan until what its carry does in one turn is known of the turn
    before it too."""
    while True:
        reaches, through = _backwards(found, *bodies, prefix, live, hit, sums)
        if eqn.primitive.name != "scan":
            return reaches, through
        carried = eqn.params["num_consts"], eqn.params["num_carry"]
        after = fed_back(live, reaches, *carried), fed_back(hit, through, *carried)
        if after == (live, hit):
            return reaches, through
        live, hit = after


def _of(atoms: Any, flags: list[bool]) -> set[Any]:
    return {v for v, flag in zip(atoms, flags, strict=True) if flag and not isinstance(v, Literal)}
