"""Dates of a clock that pass while a layer takes no part: heads, experts, parts that open later."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf

BLOCKS = {"body": kf.Block(3, 4), "one": kf.Block(3, 4), "two": kf.Block(3, 4)}
SCHEDULES = kf.Schedules(0.1, 0.9)


def turn(names, i):
    """Records and gradients of a step that has some layers, the same whatever else takes part."""
    records, grads = {}, {}
    for name in names:
        rng = np.random.default_rng([i, list(BLOCKS).index(name)])
        a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
        records[name], grads[name] = kf.Record(a, g, n=6), g.T @ a / 6
    return records, grads


def heads(i):
    """Two heads on a body, in turn."""
    return ("body", "one" if i % 2 == 0 else "two")


def ran(pre, turns, blocks=BLOCKS, asked=True):
    """Directions of steps, what each told, and the last state; records where they are wanted."""
    state = pre.init(blocks, np.zeros(1))
    found, infos = [], []
    for i, names in turns:
        records, grads = turn(names, i)
        wanted = not asked or pre.wants_records(state)
        directions, state, info = pre.step(state, records if wanted else None, grads)
        found.append(directions)
        infos.append((wanted, bool(info.updated), bool(info.refreshed)))
    return found, infos, state


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC(), kf.SINGD()], ids=lambda m: type(m).__name__)
def test_a_layer_that_misses_every_refresh_is_refreshed_when_it_comes(method, stacked):
    # at every fifth step from the second on, so that of the dates 0, 5, 10 it has none: as alone, refreshed each time
    steps = [(i, ("body", "two") if i % 5 == 1 else ("body", "one")) for i in range(17)]
    found, _, _ = ran(kf.Preconditioner(method, kf.Clocks(1, 5), SCHEDULES, stacked=stacked), steps)
    mine = [i for i, names in steps if "two" in names]
    alone, _, _ = ran(
        kf.Preconditioner(method, kf.Clocks(1, 1), SCHEDULES), [(i, ("two",)) for i in mine], {"two": BLOCKS["two"]}
    )
    for i, want in zip(mine, alone, strict=True):
        np.testing.assert_allclose(found[i]["two"], want["two"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_refresh_made_up_for_leaves_the_other_layers_alone(stacked):
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 10), SCHEDULES, stacked=stacked)
    found, infos, _ = ran(pre, [(i, heads(i)) for i in range(8)])
    body, _, _ = ran(pre, [(i, ("body",)) for i in range(8)], {"body": BLOCKS["body"]})
    for i, want in enumerate(body):
        np.testing.assert_allclose(found[i]["body"], want["body"], rtol=1e-12)
    assert [refreshed for *_, refreshed in infos] == [True, True] + 6 * [False]


def test_records_are_wanted_until_a_layer_that_came_without_them_is_measured():
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(10, 100), SCHEDULES)
    found, infos, state = ran(pre, [(i, heads(i)) for i in range(16)])
    assert [i for i, (wanted, *_) in enumerate(infos) if wanted] == [0, 2, 3, 10, 12, 13]
    assert [i for i, (_, updated, _) in enumerate(infos) if updated] == [0, 3, 10, 13]
    assert [i for i, (*_, refreshed) in enumerate(infos) if refreshed] == [0, 3]
    assert not np.array_equal(found[3]["two"], turn(("two",), 3)[1]["two"])
    alone, _, _ = ran(  # measured at 3 and 13, refreshed at 3
        kf.Preconditioner(kf.KFAC(), kf.Clocks(2, 100), SCHEDULES),
        [(i, ("two",)) for i in (3, 5, 13, 15)],
        {"two": BLOCKS["two"]},
    )
    np.testing.assert_allclose(found[15]["two"], alone[-1]["two"], rtol=1e-12)
    assert float(state.layers["two"].weight[0]) == pytest.approx(1 - 0.9**2)


def test_a_layer_that_never_comes_is_not_waited_for():
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(4, 8), SCHEDULES)
    _, infos, state = ran(pre, [(i, ("body",)) for i in range(9)])
    assert [i for i, (wanted, *_) in enumerate(infos) if wanted] == [0, 4, 8]
    assert [i for i, (*_, refreshed) in enumerate(infos) if refreshed] == [0, 8]
    assert pre.due(state, ["body"]) == kf.Due(False, False) != pre.due(state, ["two"])


def test_layers_in_turn_with_their_refresh_make_up_for_theirs():
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 3, staggered=True), SCHEDULES)
    found, _, _ = ran(pre, [(i, ("body", "two") if i % 3 == 1 else ("body", "one")) for i in range(9)])
    for i in (1, 4, 7):
        assert not np.allclose(found[i]["two"], turn(("two",), i)[1]["two"])
    every, _, _ = ran(pre, [(i, ("body",)) for i in range(9)], BLOCKS)
    for i, want in enumerate(every):
        np.testing.assert_allclose(found[i]["body"], want["body"], rtol=1e-12)


def test_what_was_missed_is_saved_and_files_of_before_have_none(tmp_path):
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 5), SCHEDULES)
    _, _, state = ran(pre, [(i, ("body", "one")) for i in range(3)])
    kf.save(tmp_path / "state", state)
    again = kf.load(tmp_path / "state", like=pre.init(BLOCKS, np.zeros(1)))
    for records, grads in [turn(("body", "two"), 3)]:
        want, _, _ = pre.step(state, records, grads)
        got, _, _ = pre.step(again, records, grads)
    np.testing.assert_array_equal(got["two"], want["two"])
    arrays = {path: x for path, x in kf.flatten(state).items() if not path.startswith("missed/")}
    assert len(arrays) == len(kf.flatten(state)) - 3
    before = kf.unflatten(arrays, pre.init(BLOCKS, np.zeros(1)))
    assert [int(x[0]) for x in before.missed.values()] == [0, 0, 0]
    assert pre.due(before, BLOCKS) == kf.Due(True, False)


def test_a_layer_whose_method_needs_no_records_is_never_waited_for():
    methods = {"body": kf.KFAC(), "one": kf.Identity(), "two": kf.KFAC()}
    pre = kf.Preconditioner(methods, kf.Clocks(4, 8), SCHEDULES)
    _, infos, _ = ran(pre, [(i, ("body", "one") if i else ("body",)) for i in range(5)])
    assert [wanted for wanted, *_ in infos] == [True, False, False, False, True]


@pytest.mark.parametrize("clocks", [kf.Clocks(1, 100), kf.Clocks(7, 14), kf.Clocks(1, 9, staggered=True)], ids=repr)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("bad", [("one",), tuple(BLOCKS)], ids=len)
def test_a_first_record_that_is_not_finite_is_made_up_for(clocks, stacked, bad):
    """The next one is measured and refreshed from, whatever the clocks say of that step; then they hold again."""
    pre = kf.Preconditioner(kf.KFAC(), clocks, SCHEDULES, stacked=stacked)
    state = pre.init(BLOCKS, np.zeros(1))
    infos = []
    for i in range(3):
        records, grads = turn(tuple(BLOCKS), i)
        if i == 0:
            records |= {name: kf.Record(records[name].a * np.nan, records[name].g, 6) for name in bad}
        assert pre.wants_records(state) or i == 2
        found, state, info = pre.step(state, records, grads)
        infos.append((bool(info.updated), bool(info.refreshed)))
        if i == 1:
            mine = pre.step(pre.init({"one": BLOCKS["one"]}, np.zeros(1)), *turn(("one",), 1))[0]["one"]
            np.testing.assert_allclose(found["one"], mine, rtol=1e-12)
            assert state.missed.nothing
    assert infos[1] == (True, True)
    assert infos[2] == (clocks.update == 1, clocks.staggered and 2 in clocks.slots())


def test_records_that_turn_bad_later_are_not_asked_for(monkeypatch):
    """A device is not read in a step but until its layers began."""
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), SCHEDULES)
    _, _, state = ran(pre, [(0, tuple(BLOCKS))])
    monkeypatch.setattr("kfaccore.precondition.info.Info.refused", lambda *_: pytest.fail("it was read"))
    records, grads = turn(tuple(BLOCKS), 1)
    records["one"] = kf.Record(records["one"].a * np.nan, records["one"].g, 6)
    _, after, info = pre.step(state, records, grads)
    assert info.counts() == {kf.Code.OK: 2, kf.Code.NONFINITE: 1}
    assert after.missed.nothing
