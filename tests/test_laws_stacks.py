"""Laws of stacks: layers of one state step as layers apart, for every method and on every namespace."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW
from kfaccore import tree
from rows import METHODS, arrays

N = 2.5
NAMES = ("a", "b", "c", "d")
few = pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
rows = pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)


def same(xp, found, wanted, tolerance=1e-12):
    """Whether two trees have equal leaves up to rounding."""
    pairs = zip(tree.leaves(found), tree.leaves(wanted), strict=True)
    for x, y in ((xp.get(x), xp.get(y)) if hasattr(x, "shape") else (x, y) for x, y in pairs):
        np.testing.assert_allclose(
            x, y, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(y), initial=0.0)))
        )


def both(method, **given):
    """The same Preconditioner with stacks and without; dampings differ between layers."""
    damping = {"a": 0.07, "b": 0.3, "c": 0.07, "d": 1.0}
    return [kf.Preconditioner(method, schedules=kf.Schedules(damping), stacked=on, **given) for on in (True, False)]


def batch(xp, rng):
    """Records of four layers of one shape, and gradients that are no function of them."""
    records, grads = {}, {}
    for name in NAMES:
        a, g = arrays(rng, blocks=1)
        records[name] = kf.Record(xp.put(a), xp.put(g), N)
        grads[name] = xp.put(rng.normal(size=(3, 4)))
    return records, grads


def walk(xp, pres, turns, tolerance=1e-12):
    """Both take the same steps: directions, codes, information and states agree after each."""
    block = kf.Block(3, 4, rows=64)
    like = next(iter(turns[0][2].values()))
    states = [pre.init(dict.fromkeys(NAMES, block), like) for pre in pres]
    for due, records, grads in turns:
        found = [pre.do(due, state, records, grads) for pre, state in zip(pres, states, strict=True)]
        (x, one, told), (y, two, said) = found
        assert list(x) == list(y)
        same(xp, x, y, tolerance)
        same(xp, one.layers, two.layers, tolerance)
        for name in grads:
            assert np.array_equal(xp.get(told.codes[name]), xp.get(said.codes[name]))
            assert xp.get(told.squares[name]) == pytest.approx(xp.get(said.squares[name]), rel=1e-9)
        assert told.counts() == said.counts()
        assert {n: set(info) for n, info in told.layers.items()} == {n: set(i) for n, i in said.layers.items()}
        states = [one, two]
    assert len(states[0].layers.states) < len(states[1].layers.states)
    return states


@rows
@few
def test_stacked_is_looped(row, xp, rng):
    """All layers; one without a record; one frozen and one of a gradient not multiplied out; none due."""
    all_due, measured, plain = kf.Due(True, True), kf.Due(True, False), kf.Due(False, False)
    turns = []
    for due in (all_due, all_due, measured, plain):
        turns.append((due, *batch(xp, rng)))
    del turns[1][1]["b"]
    del turns[2][2]["a"]
    factored = turns[2][1]["c"]
    turns[2][2]["c"] = kf.Factored(factored.a, factored.g[0, ...], N)
    walk(xp, both(row.method), turns)
