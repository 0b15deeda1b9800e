"""Batches that lie one behind the other along an axis, as `jnp.concatenate([a, b])` of two views lays them: whose rows
are where, followed through a jaxpr at two batch sizes, n and 2 n examples.

An axis (K, n, m), outer first, has in each of K batches m rows of each example. K is known from the inputs on, where it
is 1, through equations of which that is exact: a reshape by the products of sizes, a concatenation, cuts between whole
batches, and whatever hands on an axis of the same size. Elsewhere nothing is known, and other rules decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from jax.extend.core import Literal

from kfaccore_jax.batch import LOST, jaxprs
from kfaccore_jax.order import grown, inner, places
from kfaccore_jax.tags import PLACED
from kfaccore_jax.walk import place_of

# in place of K, as LOST is
NOTHING = 0  # no rows of examples
UNKNOWN = -1  # rows of which it is not known whose they are
SCRAMBLED = -3  # such that look like examples' own
Ks = list[int]


@dataclass
class Behind:
    """What was found, by the places of equations.

    outer      {place: (K, size at n examples)} of operands and result of those that hand them on, K = LOST where rows
               of several batches can no longer be told apart, SCRAMBLED behind a reshape that does so to examples
    exact      joins, cuts and reshapes after which it is known whose rows are where
    lost       {place: primitive} of those that give such rows
    scrambled  reshapes that give rows parts of several examples, or several axes of them
    results    K of each prediction
    """

    n: int
    outer: dict[str, tuple[int, int]] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    scrambled: set[str] = field(default_factory=set)
    results: Ks = field(default_factory=list)

    def of(self, key: str) -> tuple[int, int]:
        """(K, size) of the axis of examples of a call with this key, K = NOTHING where it is not known."""
        place = place_of(key)
        if any(f"{place}.".startswith(f"{lost}.") for lost in self.lost):
            return LOST, 0
        return self.outer.get(place, (NOTHING, 0))

    def _through(self, one: Any, two: Any, prefix: str, given: Ks) -> Ks:
        """K of each result of a jaxpr, here at both sizes."""
        known = dict(zip(one.invars, given, strict=True))
        for p, q, key in places(one, two, prefix):
            before = _of(known, p.invars)
            bodies = inner(p, q)
            if bodies is not None and _as_they_are(p, q, bodies[0]):
                after = self._within(p, bodies, f"{key}.", before)
            else:
                after = self._by(p, q, key, before)
            known.update(zip(p.outvars, after, strict=True))
        return _of(known, one.outvars)

    def _within(self, eqn: Any, bodies: tuple[Any, Any], prefix: str, before: Ks) -> Ks:
        """Through an equation's own jaxpr, of a scan until its carry has what one turn leaves."""
        after = self._through(*bodies, prefix, before)
        if eqn.primitive.name != "scan":
            return after
        first = eqn.params["num_consts"]
        count = eqn.params["num_carry"]
        carry = [_same([a, b]) for a, b in zip(before[first : first + count], after[:count], strict=True)]
        again = [*before[:first], *carry, *before[first + count :]]
        return after if again == before else self._within(eqn, bodies, prefix, again)

    def _by(self, p: Any, q: Any, key: str, before: Ks) -> Ks:
        """By the equation's own operation."""
        name = p.primitive.name
        axes = [grown(v, w) for v, w in zip(p.outvars, q.outvars, strict=True)]
        if name not in PLACED:  # these share their place with the equation before them
            self.exact.discard(key)
        if not any(before) or not any(axes):
            return [NOTHING] * len(axes)
        ruled = _RULES[name](p, q, self.n, before) if name in _RULES else None
        found = _handed_on(p, q, before) if ruled is None else ruled
        if name == "reshape" and min(found) < 0 < before[0]:
            self.scrambled.add(key)
        if min(found) < 0 and (max(before) > 1 or LOST in before):
            found = [LOST if k < 0 else k for k in found]
            self.lost.setdefault(key, name)
        elif SCRAMBLED in before and name != "reshape":  # another one may lay them as they were
            found = [SCRAMBLED if k < 0 else k for k in found]
        if ruled is None and name not in PLACED:
            self.outer[key] = (found[0], _size(p.outvars[0], q.outvars[0]))
        if ruled is not None and min(found) > 0:
            self.exact.add(key)
        return found


def followed(one: Any, two: Any, count: int, n: int) -> Behind:
    """Whose rows are where in a jaxpr, here at n and 2 n examples, which are on the first axis of what it is given."""
    one = getattr(one, "jaxpr", one)
    two = getattr(two, "jaxpr", two)
    found = Behind(n)
    given = [int(grown(v, w) == [0]) for v, w in zip(one.invars, two.invars, strict=True)]
    found.results = found._through(one, two, "", given)[:count]
    return found


def _of(known: dict[Any, int], atoms: Any) -> Ks:
    return [NOTHING if isinstance(v, Literal) else known.get(v, NOTHING) for v in atoms]


def _same(several: Ks) -> int:
    """What all say that say anything; rows of several batches are lost where they do not agree."""
    said = set(several) - {NOTHING}
    if len(said) < 2:
        return said.pop() if said else NOTHING
    return LOST if max(said) > 1 or LOST in said else min(said - {1})


def _size(v: Any, w: Any) -> int:
    """Of the axis that grows; 0 for none or several."""
    axes = grown(v, w)
    return v.aval.shape[axes[0]] if len(axes) == 1 else 0


def _as_they_are(p: Any, q: Any, body: Any) -> bool:
    """Whether the operands of an equation are those of the jaxpr within it, or a turn's of a scan over no examples."""
    if p.primitive.name == "scan":
        return p.params["length"] == q.params["length"]
    return all(v.aval.shape == w.aval.shape for v, w in zip(p.invars, body.invars, strict=True))


def _opaque(p: Any, q: Any) -> bool:
    """Whether examples go into a jaxpr within an equation."""
    pairs = zip(jaxprs(p), jaxprs(q), strict=True)
    bodies = [(getattr(a, "jaxpr", a), getattr(b, "jaxpr", b)) for a, b in pairs]
    inside = any(grown(v, w) for a, b in bodies for v, w in zip(a.invars, b.invars, strict=True))
    return inside or p.primitive.name == "scan"


def _handed_on(p: Any, q: Any, before: Ks) -> Ks:
    """An axis of the same size has the same rows."""
    pairs = zip(p.invars, q.invars, before, strict=True)
    sizes = {_size(v, w) for v, w, k in pairs if k != NOTHING}
    k = _same(before) if len(sizes) == 1 and 0 not in sizes and not _opaque(p, q) else UNKNOWN
    results = list(zip(p.outvars, q.outvars, strict=True))
    return [NOTHING if not grown(v, w) else k if _size(v, w) in sizes else UNKNOWN for v, w in results]


def _joined(p: Any, q: Any, n: int, before: Ks) -> Ks | None:
    """K is the sum of the operands'."""
    axis = p.params["dimension"]
    if axis not in grown(p.outvars[0], q.outvars[0]):
        return None
    pairs = list(zip(p.invars, q.invars, strict=True))
    if min(before) < 0 or any(grown(v, w) != [axis] or w.aval.shape[axis] % 2 for v, w in pairs):
        return [UNKNOWN]
    sizes = [v.aval.shape[axis] for v in p.invars]
    batches = {size / k for size, k in zip(sizes, before, strict=True) if k != NOTHING}  # n m of each
    one = batches.pop()
    whole = not batches and one % n == 0 and all(size % one == 0 for size in sizes)
    return [int(sum(sizes) // one) if whole else UNKNOWN]


def _cut(p: Any, q: Any, n: int, before: Ks) -> Ks | None:
    """A slice of whole batches."""
    axes = grown(p.invars[0], q.invars[0])
    if all(p.outvars[0].aval.shape[i] == p.invars[0].aval.shape[i] for i in axes):
        return None
    if len(axes) != 1 or before[0] < 1:
        return [UNKNOWN]
    axis = axes[0]
    strides = p.params["strides"]
    ends = [[x.params[name][axis] for x in (p, q)] for name in ("start_indices", "limit_indices")]
    known = strides is None or strides[axis] == 1
    return [_batches(p.invars[0].aval.shape[axis], before[0], n, ends) if known else UNKNOWN]


def _batches(size: int, k: int, n: int, ends: list[list[int]]) -> int:
    """How many whole batches lie between two places, each at n and 2 n examples, on an axis of k batches."""
    one = size // k
    whole = size % (k * n) == 0 and all(here % one == 0 and there == 2 * here for here, there in ends)
    return (ends[1][0] - ends[0][0]) // one if whole and one else UNKNOWN


def _split(p: Any, q: Any, n: int, before: Ks) -> Ks | None:
    """Pieces of whole batches."""
    axis = p.params["axis"]
    axes = grown(p.invars[0], q.invars[0])
    if axis not in axes:
        return None
    if len(axes) != 1 or before[0] < 1:
        return [UNKNOWN] * len(p.outvars)
    size = p.invars[0].aval.shape[axis]
    pieces = zip(p.params["sizes"], q.params["sizes"], strict=True)
    return [_batches(size, before[0], n, [[0, 0], [int(a), int(b)]]) for a, b in pieces]


def _tiled(p: Any, q: Any, n: int, before: Ks) -> Ks:
    """The whole axis again and again."""
    axes = grown(p.outvars[0], q.outvars[0])
    if len(axes) != 1 or before[0] < 1 or p.params["reps"] != q.params["reps"]:
        return [UNKNOWN]
    return [before[0] * p.params["reps"][axes[0]]]


def _reshaped(p: Any, q: Any, n: int, before: Ks) -> Ks:
    """What stands before the examples and behind them in an axis goes by the axes before and behind it."""
    v = p.invars[0]
    y = p.outvars[0]
    old = grown(v, q.invars[0])
    new = grown(y, q.outvars[0])
    if len(old) != 1 or len(new) != 1 or before[0] < 1:
        return [UNKNOWN]
    order = p.params.get("dimensions") or range(v.aval.ndim)
    place = list(order).index(old[0])
    shape = [v.aval.shape[i] for i in order]
    after = y.aval.shape
    first = prod(shape[:place]) * before[0]
    last, rest = divmod(prod(shape[place:]), before[0] * n)
    lead = prod(after[: new[0]])
    behind = prod(after[new[0] + 1 :])
    if rest == 0 and first % lead == 0 and last % behind == 0:
        return [first // lead]
    return [SCRAMBLED if after[new[0]] % n == 0 else UNKNOWN]


_RULES: dict[str, Callable[[Any, Any, int, Ks], Ks | None]] = {
    "concatenate": _joined,
    "slice": _cut,
    "split": _split,
    "reshape": _reshaped,
    "tile": _tiled,
}
