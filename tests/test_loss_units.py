"""The unit of the loss is nobody's business: c times the loss and c times the damping are the same steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.step.noise import Noise
from rows import METHODS

LOSS = kf.SoftmaxCrossEntropy()
NET = kn.Sequential((5,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
RULES = {
    "self-tuning": lambda c: kf.SelfTuning(),
    "self-tuning on its own word": lambda c: kf.SelfTuning(noise=Noise(0.0, np.inf, 1, own=False)),
    "quadratic": lambda c: kf.Quadratic(damping=1e-4 * c),  # absolute, as its page says
    "line search": lambda c: kf.LineSearch(),
    "grid search": lambda c: kf.GridSearch(),
    "fixed": lambda c: kf.Fixed(0.3, 0.9),
    "fixed with noise": lambda c: kf.Fixed(0.5, 0.9, Noise()),
    "fixed within a norm": lambda c: kf.Fixed(0.5, 0.9, kf.NormConstraint(0.1)),
    "fixed within a divergence": lambda c: kf.Fixed(0.5, 0.9, kf.KLClip(1e-3 * c)),  # kappa is in units of the loss
}
NETWORKS = {
    "two levels": (kf.TwoLevel(), 1),
    "tridiagonal": (kf.Tridiagonal(), 1),
    "shared": (kf.SharedDamping(kf.TKFAC(damping=kf.Adaptive(floor=0.0))), 0),  # its damping is relative already
}
ABSOLUTE = {"kfac-equal", "kfac-per-factor", "pinn-kfac", "identity", "singd-ikfac"}  # as docs/reliability.md has it


def trained(pre, c, steps, blank=0):
    """(losses / c, parameters, state) of c times the loss; of the first `blank` batches no example counts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5))
    y = (x[:, 0] > 0) * 1 + (x[:, 1] * x[:, 2] > 0)
    params = NET.init(rng, np.asarray)
    state = pre.init(NET.blocks(), params["dense0"])
    losses = []
    for k in range(steps):
        rows = rng.integers(0, 64, 16)
        scale = 0.0 if k < blank else c

        def loss(rows=rows, scale=scale):
            return scale * float(LOSS.value(NET.forward(params, x[rows])[0], y[rows])) / 16

        f, tape = NET.forward(params, x[rows])
        draws = kf.type2(LOSS, f, y[rows]) * scale**0.5
        gradient = LOSS.gradient(f, y[rows]) * scale
        records = NET.records(tape, NET.backward(params, tape, draws), 16.0)
        own = NET.records(tape, NET.backward(params, tape, gradient[None, ...]), 16.0)
        grads = NET.gradients(tape, NET.backward(params, tape, gradient), 16.0)
        before = loss()
        losses.append(before / c)
        given = {"own": own} if pre.rule.wants_own else {}
        updates, state, _ = pre.step(state, records, grads, loss=before, **given)
        old = dict(params)

        def place(share, old=old, updates=updates):
            params.update({name: old[name] - share * updates[name] for name in updates})

        place(1.0)
        if pre.rule.judges:
            share, state = pre.judge(state, before, place, loss)
            place(float(share))
    return np.array(losses), params, state


@pytest.mark.parametrize("c", [1e-12, 1e-8, 1e8, 1e12])
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_every_rule_takes_the_steps_of_any_unit(rule, c):
    def run(c):
        pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), kf.Schedules(0.1 * c), step=rule(c))
        return trained(pre, c, 12)[0]

    np.testing.assert_allclose(run(c), run(1.0), rtol=1e-7)


@pytest.mark.parametrize("c", [1e-12, 1e12])
@pytest.mark.parametrize(("method", "power"), NETWORKS.values(), ids=list(NETWORKS))
def test_so_do_methods_of_the_whole_network(method, power, c):
    def run(c):
        schedules = kf.Schedules(0.1 * c**power)
        return trained(kf.Preconditioner(network=method, clocks=kf.Clocks(1, 2), schedules=schedules), c, 6)[0]

    np.testing.assert_allclose(run(c), run(1.0), rtol=1e-7)


@pytest.mark.parametrize("row", [row for row in METHODS if row.name not in ABSOLUTE], ids=lambda row: row.name)
def test_every_method_has_the_directions_of_any_unit(row, rng):
    a, g = row.regime(rng)
    v = rng.normal(size=(len(a), g.shape[-1], a.shape[-1]))

    def solved(c):
        record = kf.Record(a, g * c**0.5, 2.5)
        state = kf.settle(row.method, record, damping=0.07 * c)
        return row.method.solve(state, v * c, kf.Hyper(0, 0.0, 0.07 * c), record)

    want = solved(1.0)
    for c in (1e-12, 1e-6, 1e6, 1e12):
        found = solved(c)
        np.testing.assert_array_equal(found.code, want.code)
        # roots of singd start from I and come near the end in as many cycles as the catalogue has
        tolerance = 1e-8 if row.name == "singd" else 1e-11
        assert np.abs(found.direction - want.direction).max() <= tolerance * np.abs(want.direction).max()


@pytest.mark.parametrize("method", [kf.FNGD(relative=True), kf.KFAC(split=kf.Relative())], ids=["fngd", "kfac"])
def test_a_relative_damping_has_no_unit(method, rng):
    record = kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0)
    v = record.examples()[0].sum(1) / 6

    def solved(c):
        return kf.direction(kf.Record(record.a, record.g * c, 6.0), c * v, method, 0.1) * c

    for c in (1e-12, 1e-7, 1e7):
        np.testing.assert_allclose(solved(c), solved(1.0), rtol=1e-8)


def test_bounds_of_damping_are_those_of_the_first():
    rule = kf.SelfTuning()
    motion = rule.init({"a": np.zeros((1, 1, 1))})
    for unit in (1e-20, 1.0, 1e20):
        low = replace(motion, damping=1.01e-8 * unit, unit=unit, predicted=-unit, steps=10)
        assert rule.judge(low, 1.0, 10 * unit, 9 * unit)[1].damping == 1e-8 * unit
        high = replace(motion, damping=0.9e10 * unit, unit=unit, predicted=-unit, steps=10)
        assert rule.judge(high, 1.0, 10 * unit, np.inf)[1].damping == 1e10 * unit


def test_batches_without_curvature_leave_the_first_damping_to_the_next():
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    _, params, state = trained(pre, 1.0, 3, blank=2)
    assert state.motion.unit == pytest.approx(state.motion.damping, rel=0.3)
    assert 1e-4 < state.motion.unit < 1
    assert all(np.isfinite(x).all() for x in params.values())


@pytest.mark.parametrize("c", [1e-12, 1e-8, 1e8, 1e12])
def test_gauss_newton_takes_the_steps_of_any_unit(c):
    """And a first batch of zeros, or one that is not finite, leaves its damping to the next."""

    def run(c):
        rng = np.random.default_rng(0)
        rule = kf.GaussNewton(drop=1e-9, grow=1e9)
        state = rule.init()
        found = []
        for k, spoilt in enumerate((0.0, np.nan, 1.0, 1.0, 1.0, 1.0, 1.0)):
            a = rng.normal(size=(5, 3))
            record = kf.Record(a * spoilt, rng.normal(size=(5, 2)) * c**0.5, 5.0)
            with np.errstate(all="ignore"):
                updates, state, info = rule.step(state, {"x": record}, [rng.normal(size=5) * c**0.5])
            after = iter([np.inf] * 16 if k == 5 else [0.0])
            _, state = rule.judge(state, c, lambda share: None, lambda after=after: next(after))
            found.append(np.append(updates["x"].ravel(), info["damping"] / c))
        return found

    for x, y in zip(run(c), run(1.0), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert run(c)[2][-1] > 0
