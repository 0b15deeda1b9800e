"""One step: what is due, what filled the records, which layers need them, and what it tells."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.precondition.due import either, strikes
from kfaccore.precondition.groups import Together
from kfaccore.precondition.road import Road


def problem(rng, names="ab"):
    """(records, gradients, blocks) of layers of 3 x 4, six examples."""
    records, grads = {}, {}
    for name in names:
        a, g = rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
        records[name] = kf.Record(a, g, 6.0)
        grads[name] = g.T @ a / 6
    return records, grads, {name: kf.Block(3, 4) for name in names}


def test_a_step_is_what_is_due(rng):
    """`step` is `do` with what the clocks say; what is not due leaves averages or inverses as they were."""
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.KFAC(), clocks=kf.Clocks(2, 3))
    state = pre.init(blocks, grads["a"])
    for _ in range(4):
        want, after, _ = pre.step(state, records, grads)
        got, same, _ = pre.do(pre.due(state), state, records, grads)
        for x, y in zip(tree.leaves((want, after)), tree.leaves((got, same)), strict=True):
            assert np.array_equal(x, y)
        state = after
    other, _, _ = problem(rng)
    for due in (kf.Due(True, False), kf.Due(False, True), kf.Due(False, False)):
        _, after, info = pre.do(due, state, other, grads, damping=5.0)
        assert (info.updated, info.refreshed) == (due.update, due.refresh)
        assert np.array_equal(after.layers["a"].A, state.layers["a"].A) == (not due.update)
        assert np.array_equal(after.layers["a"].inverse.A, state.layers["a"].inverse.A) == (not due.refresh)


def test_a_damping_can_be_given_for_one_step(rng):
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=9.0))
    updates, _, info = pre.do(kf.Due(True, True), pre.init(blocks, grads["a"]), records, grads, damping=0.02)
    np.testing.assert_allclose(updates["a"], kf.direction(records["a"], grads["a"], damping=0.02), rtol=1e-12)
    assert info.damping == {"a": 0.02, "b": 0.02}


def test_flags_stay_python_where_they_can():
    array = np.array(True)
    assert strikes(5, 1) is True
    assert strikes(np.int64(4), 2) is True
    assert strikes(5, 2) is False
    assert either(False, True) is True
    assert either(array, False) is array
    assert either(False, array) is array


def test_one_layer_alone_is_a_network_of_one(rng):
    """The road is one: a method by itself and the same method as a network-level one give the same bits."""
    records, grads, blocks = problem(rng)
    alone = kf.Preconditioner(kf.TKFAC(damping=kf.Adaptive()))
    together = kf.Preconditioner(network=kf.SharedDamping(kf.TKFAC(damping=kf.Adaptive())))
    states = [pre.init(blocks, grads["a"]) for pre in (alone, together)]
    for _ in range(3):
        (x, first, _), (y, second, info) = (
            pre.step(s, records, grads) for pre, s in zip((alone, together), states, strict=True)
        )
        assert all(np.array_equal(x[name], y[name]) for name in "ab")
        states = [first, second]
    assert set(info.layers) == {"network"}


def test_stats_may_stand_for_records_in_a_network_too(rng):
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(network=kf.TwoLevel(kf.KFAC()))
    state = pre.init(blocks, grads["a"])
    hyper = kf.Hyper(0, 0.95, 0.1)
    group = Together(("a", "b"), pre.network)
    road = Road(kf.Due(True, True), pre.comm, {"a": (0,), "b": (0,)}, False)
    stats = {n: kf.KFAC().measure(state.network.layers[n], r, hyper) for n, r in records.items()}
    hypers = dict.fromkeys("ab", hyper)
    found = [
        road._updated(group, state.network, {n: [x] for n, x in given.items()}, hypers)[0] for given in (records, stats)
    ]
    for x, y in zip(*(tree.leaves(state) for state in found), strict=True):
        assert np.array_equal(x, y)


def test_errors_name_the_layer_once(rng):
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.EKFAC())
    state = pre.init(blocks, grads["a"])
    records["b"] = kf.Record(records["b"].a, records["b"].g[:0], 6.0)
    with pytest.raises(ValueError, match="zero draws") as caught:
        pre.step(state, records, grads)
    assert caught.value.__notes__ == ["in layer 'b'"]


@pytest.mark.parametrize("fisher", [kf.empirical, kf.forward_only])
@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.Quadratic()], ids=["self-tuning", "quadratic"])
def test_a_rule_that_models_the_loss_refuses_other_draws(rng, rule, fisher):
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.KFAC(), step=rule)
    state = pre.init(blocks, grads["a"])
    with pytest.raises(ValueError, match=r"monte_carlo or type2"):
        pre.step(state, records, grads, fisher=fisher)
    for known in (kf.monte_carlo, kf.type2, None):
        assert pre.step(state, records, grads, fisher=known)[1].step == 1


def test_a_method_of_own_gradients_refuses_samples(rng):
    records, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.FNGD())
    state = pre.init(blocks, grads["a"])
    for fisher in (kf.monte_carlo, kf.type2, kf.forward_only):
        with pytest.raises(ValueError, match=r"takes the loss's own gradients: use empirical"):
            pre.step(state, records, grads, fisher=fisher)
    assert pre.step(state, records, grads, fisher=kf.empirical)[1].step == 1


def test_the_kind_of_draw_is_never_guessed_from_values(rng):
    """Draws that happen to be the loss's own gradients, as on a fitted classifier, are used when nothing is said."""
    records, grads, blocks = problem(rng)
    assert np.array_equal(grads["a"], records["a"].g[0, 0, :, 0].T @ records["a"].a[0, :, 0] / 6)
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    for fisher in (None, kf.monte_carlo):
        updates, _, info = pre.step(pre.init(blocks, grads["a"]), records, grads, fisher=fisher)
        assert info.step["code"] == kf.Code.OK
        assert np.abs(updates["a"]).max() > 0


def test_a_method_that_needs_no_records_is_given_none(rng):
    _, grads, blocks = problem(rng)
    pre = kf.Preconditioner(kf.Identity())
    state = pre.init(blocks, grads["a"])
    assert not pre.wants_records(state)
    updates, state, info = pre.step(state, None, grads)
    assert np.array_equal(updates["a"], grads["a"])
    assert info.counts() == {kf.Code.OK: 2}
    mixed = kf.Preconditioner({"a": kf.Identity(), "b": kf.KFAC()})
    assert mixed.wants_records(mixed.init(blocks, grads["a"]))


def test_metrics_are_floats_for_any_logger(rng):
    records, grads, blocks = problem(rng)
    dampings = kf.Schedules({"a": 0.1, "b": 0.3})
    pre = kf.Preconditioner(kf.KFAC(), schedules=dampings, step=kf.Fixed(0.5, 0.9))
    updates, _, info = pre.step(pre.init(blocks, grads["a"]), records, grads)
    found = info.metrics()
    assert all(type(x) is float for x in found.values())
    assert found["damping"] == pytest.approx(0.2)
    assert (found["damping/a"], found["damping/b"]) == (0.1, 0.3)
    assert found["alpha"] == 0.5
    assert (found["code/OK"], found["code/NONFINITE"]) == (2.0, 0.0)
    for name in "ab":
        assert found[f"norm/{name}"] == pytest.approx(np.linalg.norm(updates[name]))
    assert found["norm"] == pytest.approx(np.sqrt(sum((u**2).sum() for u in updates.values())))
    tuned = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    told = tuned.step(tuned.init(blocks, grads["a"]), records, grads)[2].metrics()
    assert {"damping", "alpha", "mu", "ratio", "predicted", "rejected", "norm"} <= told.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kf.Preconditioner(kf.KFAC), r"methods=KFAC\) is the class itself; give it an instance: KFAC\(\)"),
        (lambda: kf.Preconditioner({"a": kf.EKFAC}), r"methods=EKFAC\) is the class itself"),
        (lambda: kf.Preconditioner("kfac"), r"methods='kfac'\): need a method such as KFAC\(\)"),
        (lambda: kf.Preconditioner(network=kf.TwoLevel), r"network=TwoLevel\) is the class itself"),
        (lambda: kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning), r"step=SelfTuning\) is the class itself"),
        (lambda: kf.Preconditioner(kf.KFAC(), step="fixed"), r"step='fixed'\): need a rule such as Fixed\(lr\)"),
    ],
)
def test_options_are_checked_when_it_is_made(make, message):
    with pytest.raises(TypeError, match=message):
        make()
