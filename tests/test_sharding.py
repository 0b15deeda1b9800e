"""Averages and inverses of several ranks lie where layers are solved for; steps, files and codes are those of one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from kfaccore.precondition import sharding

BLOCKS = {"a": kf.Block(3, 4), "b": kf.Block(3, 4), "c": kf.Block(6, 5), "d": kf.Block(2, 7, diagonal_in=True)}
N = 6.0


@dataclass
class Table:
    """Where threads that stand for ranks meet."""

    world: int
    trees: dict = field(default_factory=dict)

    def __post_init__(self):
        self.barriers = {}
        self.lock = threading.Lock()

    def meet(self, ranks, rank, given):
        """What each of `ranks` brought, once all have come."""
        with self.lock:
            barrier = self.barriers.setdefault(ranks, threading.Barrier(len(ranks)))
        self.trees[ranks, rank] = given
        barrier.wait(20)
        found = [self.trees[ranks, other] for other in ranks]
        barrier.wait(20)
        return found


@dataclass(frozen=True, eq=False)
class Thread:
    """The communicator of one thread."""

    table: Table
    rank: int
    fraction: float

    @property
    def world(self):
        return self.table.world

    def all_reduce(self, given):
        found = self.table.meet(tuple(range(self.world)), self.rank, given)
        total = found[0]
        for other in found[1:]:
            total = tree.add(total, other)
        return total

    def reduce(self, given, ranks):
        total = self.all_reduce(given)
        return total if self.rank in ranks else given

    def broadcast(self, given, ranks):
        if self.rank not in ranks or len(ranks) == 1:
            return given
        found = self.table.meet(tuple(sorted(ranks)), self.rank, given)
        return found[sorted(ranks).index(ranks[0])]


def together(world, fraction, body):
    """body(communicator) on as many threads; what each returned."""
    table = Table(world)
    found = [None] * world
    errors = []

    def run(rank):
        try:
            found[rank] = body(Thread(table, rank, fraction))
        except Exception as error:  # handed on below
            errors.append(error)
            for barrier in table.barriers.values():
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def batch(step):
    """Records of all examples, and gradients."""
    rng = np.random.default_rng(step)
    rows = {}
    for name, block in BLOCKS.items():
        a = rng.integers(0, 7, (12, 1)) if block.diagonal_in else rng.normal(size=(12, 1, block.d_in))
        rows[name] = a, rng.normal(size=(12, 1, block.d_out))
    return rows, {name: rng.normal(size=(block.d_out, block.d_in)) for name, block in BLOCKS.items()}


def record(name, a, g, n):
    return kf.Record(kf.Ids(a, 7) if BLOCKS[name].diagonal_in else a, g, n)


def walk(comm, method, steps=5, bad=None, staggered=False):
    """Directions, codes and states of some steps, each rank with its share of the examples."""
    numbers = kf.Clocks(2, 3, staggered=staggered), kf.Schedules(0.1, 0.9)
    pre = kf.Preconditioner(method, *numbers, comm=comm, stacked=True)
    state = pre.init(BLOCKS, np.zeros(1))
    found = []
    for step in range(steps):
        rows, grads = batch(step)
        if step == bad:
            rows["c"][1][-1] = np.nan
        mine = slice(comm.rank, None, comm.world)
        records = {name: record(name, a[mine], g[mine], N / comm.world) for name, (a, g) in rows.items()}
        directions, state, info = pre.step(state, records, grads)
        found.append((directions, {name: np.array(code) for name, code in info.codes.items()}))
    return found, state, pre.gather(state)


def held(state):
    """Bytes in memory of averages and inverses."""
    leaves = tree.leaves(state.layers)
    return sum(x.nbytes if all(x.strides) else x.itemsize for x in leaves)


MIXED = {n: kf.Identity() if n in "bc" else kf.KFAC() for n in BLOCKS}


@pytest.mark.parametrize(
    "method",
    [kf.KFAC(), kf.EKFAC(), kf.SINGD(), kf.Diagonal(), kf.Identity(), MIXED],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize(("world", "fraction"), [(2, 0), (2, 1), (4, 0), (4, 0.5), (4, 1)])
def test_every_rank_steps_as_one_process(method, world, fraction):
    (wanted, _, whole), *_ = together(1, 1, lambda comm: walk(comm, method, bad=2))
    ranks = together(world, fraction, lambda comm: walk(comm, method, bad=2))
    if fraction == 0 and isinstance(method, kf.KFAC):  # each number once, but for those a block
        assert sum(held(state) for _, state, _ in ranks) < 1.3 * held(whole)
    for found, _, gathered in ranks:
        for (x, code), (y, told) in zip(found, wanted, strict=True):
            for name in BLOCKS:
                np.testing.assert_allclose(x[name], y[name], rtol=1e-9, atol=1e-11)
                assert np.array_equal(code[name], told[name]), name
        for (path, x), y in zip(tree.items(gathered), tree.leaves(whole), strict=True):
            if "Q" not in path and "/S" not in path:  # eigenvectors have no sign
                np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-10, err_msg=path)


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_pieces_of_a_refresh_are_of_their_ranks(fraction):
    """Layers that take turns: what a rank does not hold is not refreshed there, and stays hollow."""
    (wanted, _, whole), *_ = together(1, 1, lambda comm: walk(comm, kf.KFAC(), 7, staggered=True))
    ranks = together(4, fraction, lambda comm: walk(comm, kf.KFAC(), 7, staggered=True))
    assert sum(held(state) for _, state, _ in ranks) < 1.3 * max(1, 4 * fraction) * held(whole)
    for found, _, _ in ranks:
        for (x, _), (y, _) in zip(found, wanted, strict=True):
            for name in BLOCKS:
                np.testing.assert_allclose(x[name], y[name], rtol=1e-9, atol=1e-11)


def test_each_rank_holds_its_own():
    """Equal sizes, so that ranks are in balance; what a rank does not hold is no memory of its own."""
    blocks = {f"l{i}": kf.Block(9, 8) for i in range(8)}

    def body(comm):
        return pre_and_state(comm, blocks)

    def pre_and_state(comm, blocks):
        pre = kf.Preconditioner(kf.KFAC(), comm=comm)
        return held(pre.init(blocks, np.zeros(1)))

    (alone,) = together(1, 1, body)
    for fraction, most in ((0, 0.3), (0.5, 0.55), (1, 1.0)):
        sizes = together(4, fraction, body)
        assert max(sizes) <= most * alone
        assert sum(sizes) >= max(1, 4 * fraction) * alone * 0.99


def test_a_basis_that_measure_needs_stays_everywhere():
    shards = sharding.Shards(Thread(Table(4), 1, 0), dict.fromkeys("k", kf.KFAC()), {"k": kf.Block(2, 2)}, {"k": (3,)})
    assert shards.holders("k") == (3,)
    for method in (kf.EKFAC(), kf.SINGD(), kf.KPSVD()):
        assert replace(shards, methods={"k": method}).holders("k") == (3, 0, 1, 2)


def test_layers_follow_their_ranks_when_others_join():
    """More layers change who owns what: states travel from where they were, and stay what they were."""
    more = {**BLOCKS, "e": kf.Block(9, 9), "f": kf.Block(8, 8)}

    def body(comm):
        pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1, 0.9), comm=comm)
        rows, grads = batch(0)
        mine = slice(comm.rank, None, comm.world)
        records = {name: record(name, a[mine], g[mine], N / comm.world) for name, (a, g) in rows.items()}
        _, old, _ = pre.step(pre.init(BLOCKS, np.zeros(1)), records, grads)
        new = pre.init(more, np.zeros(1))
        state = replace(new, step=1, layers={**new.layers, **old.layers}, places=old.places)
        directions, state, _ = pre.do(kf.Due(False, False), state, None, grads)
        return directions, {name: len(set(ranks)) for name, ranks in state.places}

    (wanted, _), *_ = together(1, 1, body)
    for found, places in together(4, 0, body):
        assert places == dict.fromkeys(more, 1)
        for name in BLOCKS:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-10, atol=1e-12)
