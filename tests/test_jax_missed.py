"""Layers that take turns under jit: what missed a date is decided on the device, by one program a set of layers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import kfaccore as kf
from jax_models import FAST, mlp, mlp_params, normal
from jax_needed import jax, kj
from kfaccore.precondition.missed import MEASURE, NEVER, REFRESH

X, Y = normal((12, 5), seed=2), normal((12, 3), seed=3)
PLAN = kj.plan(mlp, mlp_params(), X)
SCHEDULES = kf.Schedules(0.1, 0.9)


@partial(jax.jit, compiler_options=FAST)
def measured(noise):
    """Gradients and records of one batch; the parameters stay where they are."""
    captured = kj.capture(PLAN, mlp_params(), X)
    draws = kf.monte_carlo(kf.Gaussian(), captured.prediction, noise)
    grads = captured.gradients((captured.prediction - Y) / len(X))
    return grads, dict(captured.records(draws, len(X), fisher=kf.monte_carlo))


def in_turn(core, taken):
    """Directions of steps in which the parts `taken` are open, under jit; and the programs that it took."""
    tx, programs = kj.kfac(PLAN, core=core), []

    @partial(jax.jit, compiler_options=FAST, static_argnames=("part", "told"))
    def call(state, grads, records, part, told):
        programs.append((part, told))
        grads = [x if part in (i, "both") else (None, None) for i, x in enumerate(grads)]
        return tx.update(grads, state, None, records=records if told else None, fresh=None)

    state = tx.init(mlp_params())
    for i, (part, told) in enumerate(taken):
        grads, records = measured(normal((2, 12, 3), seed=10 + i))
        moves, state = call(state, grads, records, part, told)
        yield moves, state
    assert len(programs) == len(set(taken))


def on_the_host(core, taken):
    """The same by the core on NumPy."""
    blocks = PLAN.blocks
    names, state = list(blocks), None
    for i, (part, told) in enumerate(taken):
        grads, records = jax.tree.map(np.asarray, measured(normal((2, 12, 3), seed=10 + i)))
        state = state or core.init(blocks, np.zeros(()))
        ours = [name for j, name in enumerate(names) if part in (j, "both")]
        whole = {n: np.concatenate([w, b[None]]).T for n, (w, b) in zip(names, grads, strict=True) if n in ours}
        given = {name: records[name] for name in ours} if told else {}
        moves, state, _ = core.step(state, given, whole)
        yield {name: np.asarray(x) for name, x in moves.items()}, state


@pytest.mark.parametrize(
    ("clocks", "method"),
    [
        (kf.Clocks(1, 4), kf.KFAC()),
        (kf.Clocks(4, 8), kf.KFAC()),
        (kf.Clocks(2, 4), kf.EKFAC()),
        (kf.Clocks(2, 6, staggered=True), kf.KFAC()),
    ],
    ids=lambda x: str(x) if isinstance(x, kf.Clocks) else type(x).__name__,
)
def test_parts_in_turn_make_up_for_their_dates_as_on_the_host(clocks, method):
    core = kf.Preconditioner(method, clocks, SCHEDULES)
    taken = [(i % 2 if i < 6 else "both" if i == 7 else 1, True) for i in range(10)]
    traced, host = in_turn(core, taken), on_the_host(core, taken)
    for i, ((moves, state), (want, known)) in enumerate(zip(traced, host, strict=True)):
        for (name, x), (w, b) in zip(PLAN.blocks.items(), moves, strict=True):
            if w is not None:
                got = np.concatenate([w, b[None]]).T
                np.testing.assert_allclose(got, want[name], rtol=1e-9, atol=1e-12, err_msg=f"step {i}, {name}, {x}")
        np.testing.assert_array_equal(state.core.missed.table, known.missed.table, err_msg=f"step {i}")


def test_a_part_that_comes_at_odd_steps_is_measured_and_refreshed():
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(4, 8), SCHEDULES)
    *_, (moves, state) = in_turn(core, [(i % 2, True) for i in range(4)])
    last = list(PLAN.blocks)[1]
    assert float(state.core.layers[last].weight[0]) == pytest.approx(0.1)
    raw = measured(normal((2, 12, 3), seed=13))[0][1][0]
    assert not np.allclose(moves[1][0], raw)


def test_a_checkpoint_of_before_has_missed_nothing():
    serialization = pytest.importorskip("flax").serialization
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(4, 8), SCHEDULES)
    (_, state), *_ = in_turn(core, [(0, True)])
    written = serialization.to_state_dict(state)
    same = serialization.from_state_dict(state, written)
    np.testing.assert_array_equal(same.core.missed.table, [0, MEASURE | REFRESH | NEVER])
    del written["core"]["missed"]
    before = serialization.from_state_dict(state, written)
    np.testing.assert_array_equal(before.core.missed.table, [0, 0])
    for got, want in zip(jax.tree.leaves(before.core.layers), jax.tree.leaves(state.core.layers), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("clocks", [kf.Clocks(1, 100), kf.Clocks(4, 8)], ids=repr)
def test_a_first_batch_that_is_not_finite_is_made_up_for_under_jit(clocks):
    tx = kj.kfac(PLAN, core=kf.Preconditioner(kf.KFAC(), clocks, SCHEDULES))

    @partial(jax.jit, compiler_options=FAST)
    def call(state, grads, records):
        return tx.update(grads, state, None, records=records, fresh=None)

    fresh = tx.init(mlp_params())
    _, state = call(fresh, *jax.tree.map(lambda x: x * np.nan, measured(normal((2, 12, 3), seed=10))))
    assert state.core.missed.has(REFRESH).all()
    later = measured(normal((2, 12, 3), seed=11))
    found, after = call(state, *later)
    want, _ = call(fresh, *later)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)
    np.testing.assert_array_equal(after.core.missed.table, [0, 0])
