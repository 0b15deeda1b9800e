"""Clocks(staggered=True): the same algorithm, each layer refreshed on a schedule of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree

SIZES = {"a": (3, 4), "b": (3, 4), "c": (5, 2), "d": (3, 4), "e": (2, 6)}
STEPS = 14


def batch(step, names=SIZES):
    """Records and gradients of a step."""
    rng = np.random.default_rng(step)
    records = {}
    grads = {}
    for name, (d_out, d_in) in names.items():
        records[name] = kf.Record(rng.normal(size=(7, d_in)), rng.normal(size=(7, d_out)), 7.0)
        grads[name] = rng.normal(size=(1, d_out, d_in))
    return records, grads


def made(clocks, **kwargs):
    return kf.Preconditioner(kf.KFAC(), clocks, kf.Schedules(damping=0.3, decay=0.8), **kwargs)


def run(pre, steps=STEPS):
    """(directions, flags of a refresh) of each step."""
    state = pre.init({name: kf.Block(*size) for name, size in SIZES.items()}, np.zeros(()))
    found = []
    flags = []
    for step in range(steps):
        records, grads = batch(step)
        directions, state, info = pre.step(state, records, grads)
        found.append(directions)
        flags.append(bool(info.refreshed))
    return found, flags


def turns(pre):
    """{layer: steps of a period at which it is refreshed}, read off what is due."""
    state = pre.init({name: kf.Block(*size) for name, size in SIZES.items()}, np.zeros(()))
    found = {name: [] for name in SIZES}
    for step in range(pre.clocks.refresh, 2 * pre.clocks.refresh):
        due = pre.due(type(state)(step, state.layers, state.motion, state.network, state.blocks))
        assert due.refresh is False
        for piece in due.pieces:
            for name in piece.names:
                found[name].append(step % pre.clocks.refresh)
    return found


def by_hand(clocks, schedule):
    """Directions of the method's own functions, each layer refreshed at step 0 and at its steps of a period."""
    method = kf.KFAC()
    states = {name: method.init(kf.Block(*size), np.zeros(())) for name, size in SIZES.items()}
    found = []
    for step in range(STEPS):
        records, grads = batch(step)
        hyper = kf.Hyper(step, 0.8, 0.3)
        directions = {}
        for name, state in states.items():
            if step % clocks.update == 0:
                state = method.update(state, method.measure(state, records[name], hyper), hyper)
            if step == 0 or step % clocks.refresh in schedule[name]:
                state = method.refresh(state, hyper)
            directions[name] = method.solve(state, grads[name], hyper).direction
            states[name] = state
        found.append(directions)
    return found


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("clocks", [(2, 6), (1, 3), (3, 4), (1, 1)])
def test_staggered_is_the_unstaggered_algorithm_on_its_own_schedule(clocks, stacked):
    clocks = kf.Clocks(*clocks, staggered=True)
    pre = made(clocks, stacked=stacked)
    schedule = turns(pre)
    assert all(len(steps) == 1 for steps in schedule.values())  # once a period, as before
    found, _ = run(pre)
    for got, want in zip(found, by_hand(clocks, schedule), strict=True):
        for name in SIZES:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-12)


def test_refreshes_wait_for_steps_that_do_not_update():
    clocks = kf.Clocks(2, 6, staggered=True)
    steps = {step for steps in turns(made(clocks)).values() for step in steps}
    assert steps == {1, 3, 5}
    assert run(made(clocks), 8)[1] == [True, True, False, True, False, True, False, True]


def test_pieces_are_of_equal_cost():
    pre = made(kf.Clocks(2, 5, staggered=True))  # two slots; cubes: a, b, d 91, c 133, e 224
    schedule = turns(pre)
    cost = dict.fromkeys(pre.clocks.slots(), 0)
    for name, (slot,) in schedule.items():
        d_out, d_in = SIZES[name]
        cost[slot] += d_out**3 + d_in**3
    assert sorted(cost.values()) == [315, 315]


def test_at_most_eight_pieces():
    assert kf.Clocks(10, 100, staggered=True).slots() == (1, 13, 25, 37, 51, 63, 75, 87)
    assert kf.Clocks(10, 100).slots() == (0,)


def test_a_rule_that_asks_for_a_refresh_gets_one_of_all_layers():
    whole = made(kf.Clocks(2, 6, staggered=True)).due(
        kf.Preconditioner(kf.KFAC()).init({"a": kf.Block(2, 2)}, np.zeros(()))
    )
    assert whole.refresh is True
    assert whole.pieces == ()


def test_a_network_level_method_is_refreshed_once_a_period():
    pre = kf.Preconditioner(clocks=kf.Clocks(2, 4, staggered=True), network=kf.TwoLevel(kf.KFAC()))
    chain = {"a": (3, 4), "b": (3, 4)}
    state = pre.init({name: kf.Block(*size) for name, size in chain.items()}, np.zeros(()))
    seen = []
    for step in range(8):
        records, grads = batch(step, chain)
        _, state, info = pre.step(state, records, grads)
        seen.append(bool(info.refreshed))
    assert seen == [True, True, False, True, False, True, False, True]


def test_under_jit_the_device_decides_which_piece():
    jax = pytest.importorskip("jax")
    trees = pytest.importorskip("kfaccore_jax.trees")
    jax.config.update("jax_enable_x64", True)
    pre = made(kf.Clocks(2, 4, staggered=True))
    want, _ = run(pre, 6)
    like = jax.numpy.zeros(())
    state = trees.register(pre.init({name: kf.Block(*size) for name, size in SIZES.items()}, like))

    @jax.jit
    def step(state, records, grads):
        directions, state, _ = pre.step(state, records, grads)
        return directions, trees.register(state)

    state = jax.tree.map(jax.numpy.asarray, state)
    for number in range(6):
        records, grads = batch(number)
        directions, state = step(state, records, grads)
        for name in SIZES:
            np.testing.assert_allclose(directions[name], want[number][name], rtol=1e-9)


class Thread:
    """A rank of two that are threads: what each hands in lies in `table`, which all read between two barriers."""

    world = 2

    def __init__(self, rank, fraction, table, barrier):
        self.rank = rank
        self.fraction = fraction
        self.table = table
        self.barrier = barrier

    def _gathered(self, given):
        self.table[self.rank] = given
        self.barrier.wait(timeout=60)
        found = list(self.table)
        self.barrier.wait(timeout=60)
        return found

    def all_reduce(self, given):
        return tree.map(lambda x, y: x + y, *self._gathered(given))

    def reduce(self, given, ranks):
        total = self.all_reduce(given)
        return total if self.rank in ranks else given

    def broadcast(self, given, ranks):
        if len(ranks) == 1:  # only those who receive call it
            return given
        found = self._gathered(given)
        return found[ranks[0]] if self.rank in ranks else given


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_ranks_refresh_their_own_layers_of_a_piece(fraction):
    clocks = kf.Clocks(2, 4, staggered=True)
    want = [run(made(clocks))]
    table = [None, None]
    barrier = Barrier(2)

    def rank(number):
        return run(made(clocks, comm=Thread(number, fraction, table, barrier)))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    # both ranks hold the same batch: the sums and their denominators double, the means stay
    for directions, flags in found:
        assert flags == want[0][1]
        for got, one in zip(directions, want[0][0], strict=True):
            for name in SIZES:
                np.testing.assert_allclose(got[name], one[name], rtol=1e-11)
