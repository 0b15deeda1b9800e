"""Work of many callers done in one call for what has one size: who gets what, in how many calls and how large."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW, NAMESPACES
from kfaccore import tree
from kfaccore.linalg import side
from kfaccore.precondition import renewal
from kfaccore.refreshing import InSteps
from kfaccore.xp import asking
from kfaccore.xp.asking import Ask, alone, answered, lockstep
from rows import METHODS

few = pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
eager = pytest.mark.parametrize(
    "xp", [n for n in NAMESPACES if n.name in ("numpy", "strict", "torch", "cupy")], ids=lambda n: n.name
)
STRICT = next(namespace for namespace in FEW if namespace.name != "numpy")


class Doubling:
    """2 x and the blocks it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        self.calls.append(tuple(x.shape))
        return 2.0 * x, x[:, 0]


def test_callers_in_step_get_their_own_answers_in_order(rng):
    """Of unequal sizes, unequal numbers of rounds and of asks, one of them none at all."""
    doubling = Doubling()
    put = STRICT.put

    def caller(start, rounds, each):
        total = 0.0
        for turn in range(rounds):
            given = [put(np.full((1 + i, 2), start + 10.0 * turn + i)) for i in range(each)]
            for i, (double, first) in enumerate((yield tuple(Ask(doubling, (x,)) for x in given))):
                assert double.shape == (1 + i, 2)
                assert first.shape == (1 + i,)
                total += float(double[0, 0])
        return total

    callers = [caller(1.0, 2, 1), caller(100.0, 0, 0), caller(1000.0, 1, 2), caller(5.0, 3, 1)]
    assert alone(lockstep(callers)) == [2.0 + 22.0, 0.0, 2000.0 + 2002.0, 10.0 + 30.0 + 50.0]
    assert doubling.calls == [(5, 2), (2, 2), (1, 2)]


def test_numpy_is_not_joined_and_sizes_are_not_mixed(rng):
    doubling = Doubling()
    answered([Ask(doubling, (rng.normal(size=(2, 3)),)), Ask(doubling, (rng.normal(size=(1, 3)),))])
    assert doubling.calls == [(2, 3), (1, 3)]
    doubling.calls.clear()
    answered([Ask(doubling, (STRICT.put(rng.normal(size=(1, d))),)) for d in (3, 2, 3, 2)])
    assert doubling.calls == [(2, 3), (2, 2)]


@eager
def test_pieces_stay_within_the_budget(xp, rng, monkeypatch):
    """16 numbers of 8 bytes at a time: three blocks of four with two of four, then six blocks cut in two."""
    monkeypatch.setattr(asking, "BUDGET", 16 * 8)
    doubling = Doubling()
    arrays = [rng.normal(size=(blocks, 4)) for blocks in (3, 1, 6, 2)]
    found = answered([Ask(doubling, (xp.put(x),)) for x in arrays])
    for (double, first), x in zip(found, arrays, strict=True):
        assert np.array_equal(xp.get(double), 2.0 * x)
        assert np.array_equal(xp.get(first), x[:, 0])
    if xp.name == "numpy":
        assert doubling.calls == [(3, 4), (1, 4), (6, 4), (2, 4)]
    else:
        assert doubling.calls == [(4, 4), (4, 4), (2, 4), (2, 4)]


def shapes():
    """Layers of four shapes, whose sides have two sizes."""
    return {"a": (3, 4), "b": (4, 3), "c": (4, 4), "d": (3, 4), "e": (3, 3)}


def step(xp, method, broken, seed=3):
    """One step of all layers with everything due; the record of the layer `broken` is not finite."""
    rng = np.random.default_rng(seed)
    pre = kf.Preconditioner(method, schedules=kf.Schedules({"a": 0.07, "b": 0.3, "c": 0.07, "d": 1.0, "e": 0.2}))
    records = {}
    grads = {}
    for name, (d_out, d_in) in shapes().items():
        a = rng.normal(size=(6, d_in))
        g = rng.normal(size=(6, d_out))
        if name == broken:
            a[0, 0] = np.nan
        records[name] = kf.Record(xp.put(a), xp.put(g), 6.0)
        grads[name] = xp.put(rng.normal(size=(d_out, d_in)))
    blocks = {name: kf.Block(*shape, rows=16) for name, shape in shapes().items()}
    state = pre.init(blocks, grads["a"])
    return pre.do(kf.Due(True, True), state, records, grads)


@pytest.mark.parametrize("row", [row for row in METHODS if isinstance(row.method, InSteps)], ids=lambda r: r.name)
@eager
def test_one_call_a_size_is_layer_by_layer(row, xp):
    """NumPy takes one layer after the other. A record that is not finite changes no other layer by a bit."""
    directions, state, info = step(xp, row.method, None)
    wanted, _, said = step(FEW[0], row.method, None)
    spoiled, other, told = step(xp, row.method, "c")
    for name in shapes():
        np.testing.assert_allclose(xp.get(directions[name]), FEW[0].get(wanted[name]), rtol=1e-9, atol=1e-10)
        assert np.array_equal(xp.get(info.codes[name]), FEW[0].get(said.codes[name]))
        if name == "c":
            continue
        assert np.array_equal(xp.get(spoiled[name]), xp.get(directions[name]))
        assert np.array_equal(xp.get(told.codes[name]), xp.get(info.codes[name]))
        for x, y in zip(tree.leaves(state.layers[name]), tree.leaves(other.layers[name]), strict=True):
            assert np.array_equal(xp.get(x), xp.get(y))
    assert np.isfinite(xp.get(spoiled["c"])).all()


@few
def test_a_refresh_of_many_layers_is_one_call_a_size(xp, monkeypatch):
    """Five layers of four shapes have ten factors of two sizes; NumPy takes two a stack."""
    calls = []
    inverse = side.inverse

    def seen(x, shift):
        calls.append(tuple(x.shape))
        return inverse(x, shift)

    monkeypatch.setattr(side, "inverse", seen)
    step(xp, kf.KFAC(), None)
    if xp.name == "numpy":
        assert sorted(calls) == [(1, 3, 3)] * 3 + [(1, 4, 4)] * 3 + [(2, 3, 3), (2, 4, 4)]
    else:
        assert sorted(calls) == [(5, 3, 3), (5, 4, 4)]


@few
def test_wide_layers_are_refreshed_a_part_at_a_time(xp, monkeypatch):
    """With room for the matrices of one group, each is refreshed by itself, to the same directions."""
    wanted, _, said = step(xp, kf.KFAC(), None)
    monkeypatch.setattr(renewal, "BUDGET", 1)
    parts = []
    monkeypatch.setattr(renewal, "alone", lambda callers: parts.append(callers) or alone(callers))
    found, _, told = step(xp, kf.KFAC(), None)
    assert len(parts) == 4
    for name in shapes():
        np.testing.assert_allclose(xp.get(found[name]), xp.get(wanted[name]), rtol=1e-13)
        assert np.array_equal(xp.get(told.codes[name]), xp.get(said.codes[name]))


def test_a_refresh_that_is_overridden_is_the_one_that_is_run(rng):
    class Halved(kf.KFAC):
        def refresh(self, state, hyper):
            found = super().refresh(state, hyper)
            return type(found)(found.A, found.G, found.weight, tree.map(lambda x: x / 2, found.inverse), found.code)

    assert not Halved().in_steps
    whole, _, _ = step(STRICT, kf.KFAC(), None)
    halved, _, _ = step(STRICT, Halved(), None)
    for name in shapes():
        np.testing.assert_allclose(STRICT.get(halved[name]), STRICT.get(whole[name]) / 4, rtol=1e-14)


def test_devices_need_no_hash(rng, monkeypatch):
    """CuPy's have none."""

    class Device:
        __hash__ = None

        def __str__(self):
            return "gpu"

    monkeypatch.setattr(asking, "device_of", lambda x: Device())
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((2, 3, 3)))
    calls = []

    def doubled(x):
        calls.append(len(x))
        return (2 * x,)

    found = asking.answered([asking.Ask(doubled, (x,)), asking.Ask(doubled, (x + 1,))])
    assert calls == [4]
    assert torch.equal(found[1][0], 2 * (x + 1))
