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


@rows
def test_layers_that_sat_out_are_their_own(row, rng):
    """Frozen while others were refreshed, and back: what a state keeps from turn to turn is of each block."""
    xp = FEW[0]
    turns = [(kf.Due(True, True), *batch(xp, rng)) for _ in range(5)]
    del turns[1][2]["a"]
    del turns[2][2]["a"]
    del turns[2][2]["c"]
    walk(xp, both(row.method), turns)


def test_what_is_stacked_is_decided_by_cost(rng):
    """On NumPy small layers that have an equal; elsewhere all that have one; methods and sizes apart are never one."""
    blocks = {
        "a": kf.Block(3, 4),
        "b": kf.Block(3, 4),
        "c": kf.Block(4, 3),
        "d": kf.Block(400, 4),
        "e": kf.Block(400, 4),
    }
    methods = dict.fromkeys(blocks, kf.KFAC())
    for stacked, want in ((None, (("a", "b"), ("c",), ("d",), ("e",))), (True, (("a", "b"), ("c",), ("d", "e")))):
        assert kf.Preconditioner(methods, stacked=stacked).init(blocks, np.zeros(1)).layers.stacks == want
    apart = kf.Preconditioner({**methods, "b": kf.EKFAC()}, stacked=True).init(blocks, np.zeros(1)).layers
    assert apart.stacks == (("a",), ("b",), ("c",), ("d", "e"))
    assert list(apart) == list(blocks)


def test_files_are_by_layer(rng, tmp_path):
    """What is saved does not know of stacks: either kind of run continues the other's."""
    numpy = FEW[0]
    pres = both(kf.EKFAC())
    records, grads = batch(numpy, rng)
    states = [pre.step(pre.init(dict.fromkeys(NAMES, kf.Block(3, 4)), grads["a"]), records, grads)[1] for pre in pres]
    paths = [[path for path, _ in tree.items(state)] for state in states]
    assert paths[0] == paths[1]
    assert {"layers/a/A", "layers/d/basis/Qg"} <= set(paths[0])
    kf.save(tmp_path / "stacked", states[0])
    kf.save(tmp_path / "apart", states[1])
    crossed = [kf.load(tmp_path / name, like=state) for name, state in zip(("apart", "stacked"), states, strict=True)]
    crossed.append(kf.load(tmp_path / "apart", like=states[1]))
    records, grads = batch(numpy, rng)
    found = [pre.step(state, records, grads)[0] for pre, state in zip((*pres, pres[0]), crossed, strict=True)]
    for one in found[1:]:
        same(numpy, one, found[0])


def test_layers_may_bring_unequal_batches(rng):
    """One layer two micro-batches of other sizes than the rest, and one with a mask."""
    numpy = FEW[0]
    records, grads = batch(numpy, rng)
    b = [kf.Record(records["b"].a[:, :2], records["b"].g[:, :, :2], 1.0), records["b"]]
    mask = np.arange(records["c"].batch) < 3
    c = kf.Record(records["c"].a, records["c"].g, N, np.repeat(mask[:, None], records["c"].shared, 1))
    turns = [(kf.Due(True, True), {**records, **given}, grads) for given in ({"b": b}, {"b": b, "c": c})]
    for method in (kf.KFAC(), kf.EKFAC(), kf.Lanczos(), kf.SKFAC()):
        walk(numpy, both(method), turns)


@rows
@few
def test_numbers_of_stats_may_be_arrays(row, xp, rng):
    """What a trace, a loop or a tree of arrays was handed as a number comes back as an array of no axis: of all layers,
    of some, next to numbers and to (blocks,)."""
    pres = both(row.method)
    records, grads = batch(xp, rng)
    states = [pre.init(dict.fromkeys(NAMES, kf.Block(3, 4, rows=64)), grads["a"]) for pre in pres]
    stats = {name: kf.measured(pres[1], states[1], name, record) for name, record in records.items()}
    if None in stats.values():
        pytest.skip("its step needs the rows themselves")
    due = kf.Due(True, True)
    wanted = pres[1].do(due, states[1], stats, grads)

    def put(x):
        return xp.put(np.asarray(float(x))) if isinstance(x, int | float) else x

    for names in (NAMES, ("a",), ("b", "d")):
        given = {name: tree.map(put, one) if name in names else one for name, one in stats.items()}
        for pre, state in zip(pres, states, strict=True):
            found = pre.do(due, state, given, grads)
            same(xp, found[0], wanted[0])
            same(xp, found[1].layers, wanted[1].layers)
