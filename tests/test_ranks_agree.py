"""Ranks that measure different layers are refused, all of them alike, before any of them waits for another."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from test_sharding import together

BLOCKS = {"a": kf.Block(2, 3), "b": kf.Block(2, 3), "c": kf.Block(2, 5)}
RNG = np.random.default_rng(0)
ROWS = {name: (RNG.normal(size=(4, b.d_in)), RNG.normal(size=(4, b.d_out))) for name, b in BLOCKS.items()}
GRADS = {name: RNG.normal(size=(b.d_out, b.d_in)) for name, b in BLOCKS.items()}
GIVEN = {"an expert a rank": ("ac", "bc"), "other shapes": ("ab", "ac"), "none on one": ("abc", "")}


def stepping(comm):
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1), comm=comm)
    return pre, pre.init(BLOCKS, np.zeros(1))


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("fraction", [0, 1])
def test_records_on_some_ranks_only_are_refused_on_all(case, fraction):
    def walk(comm):
        pre, state = stepping(comm)
        with pytest.raises(
            ValueError, match=r"layers \[.*\] have records on some ranks only.*rows are all masked"
        ) as e:
            pre.step(state, {n: kf.Record(*ROWS[n], 4.0) for n in GIVEN[case][comm.rank]}, GRADS)
        return str(e.value)

    one, two = together(2, fraction, walk)
    assert one == two
    lacking = set(GIVEN[case][0]) ^ set(GIVEN[case][1])
    assert f"layers {sorted(lacking)}" in one


def test_a_record_that_is_all_masked_stands_for_a_layer_that_a_rank_had_no_example_of():
    def walk(comm):
        pre, state = stepping(comm)
        mine = BLOCKS if comm.world == 1 else "ac" if comm.rank == 0 else "b"
        records = {}
        for name in BLOCKS:
            a, g = ROWS[name]
            here = name in mine
            mask = np.full((4, 1), here)
            records[name] = kf.Record(a * here, g * here, 4.0 if here else 1e-9, mask)
        return pre.step(state, records, GRADS)[0]

    (want,) = together(1, 1, walk)
    for found in together(2, 1, walk):
        for name in BLOCKS:
            assert np.allclose(found[name], want[name], rtol=1e-7, atol=1e-9)
