"""Laws on what a record may hold: masks, ids, patches, zero draws; and on blocks of different dampings.

Shapes are those of test_laws.py; where `Ids` force another, NumPy alone runs.
"""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW
from kfaccore import tree
from kfaccore.method import Unmeasured, declares
from rows import arrays
from test_laws import DAMPING, N, close, rows, solve

few = pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
HYPER = kf.Hyper(0, 0.0, DAMPING)


@rows
@few
def test_a_mask_is_the_record_without_its_rows(row, xp, rng):
    """The last example and the last position are padding, NaN and all."""
    a, g = arrays(rng)
    v = xp.put(rng.normal(size=(2, 3, 4)))
    mask = np.ones((5, 3), dtype=bool)
    mask[4, :] = False
    mask[:, 2] = False
    kept = kf.Record(xp.put(a[:, :4, :2]), xp.put(g[:, :, :4, :2]), N)
    a[:, ~mask] = np.nan
    g[:, :, ~mask] = np.nan
    padded = kf.Record(xp.put(a), xp.put(g), N, mask=xp.put(mask))
    got, want = (solve(row, record, v) for record in (padded, kept))
    assert close(xp.get(got.direction), xp.get(want.direction), 1e-11)
    assert np.array_equal(xp.get(got.code), xp.get(want.code))


@rows
def test_a_ragged_mask_is_the_parts_of_equal_lengths(row, rng):
    """Examples of 3, 2, 1 and no positions: as Stats of four records without padding, combined."""
    if row.aligned:
        return
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    lengths = np.array([3, 2, 2, 1, 0])
    padded = kf.Record(a, g, N, mask=np.arange(3) < lengths[:, None])
    state = kf.settle(row.method, padded, damping=DAMPING)
    parts = []
    for length in (3, 2, 1):
        (at,) = np.nonzero(lengths == length)
        part = kf.Record(a[:, at, :length], g[:, :, at, :length], N * len(at) / 4)
        parts.append(row.method.measure(state, part, HYPER))
    stats = row.method.combine(row.method.combine(parts[0], parts[1]), parts[2])
    apart = row.method.refresh(row.method.update(state, stats, HYPER), HYPER)
    whole = row.method.refresh(row.method.update(state, row.method.measure(state, padded, HYPER), HYPER), HYPER)
    got, want = (row.method.solve(x, v, HYPER).direction for x in (whole, apart))
    assert close(got, want, 1e-10)


@rows
def test_ids_are_one_hot_rows(row, rng):
    """An embedding's diagonal A against the full A of its one-hot rows; two ids in use, as many as the modes kept."""
    _, g = arrays(rng, blocks=1)
    index = rng.choice([1, 3], size=(5, 3))
    ids = kf.Record(kf.Ids(index, 4), g, N)
    v = rng.normal(size=(1, 3, 4))
    if row.no_ids:
        with pytest.raises((TypeError, ValueError), match=row.no_ids):
            solve(row, ids, v)
        return
    got, want = (solve(row, record, v) for record in (ids, kf.Record(np.eye(4)[index][None], g, N)))
    assert close(got.direction, want.direction, 1e-11)
    assert np.array_equal(got.code, want.code)


@rows
@few
def test_patches_are_their_unfolded_rows(row, xp, rng):
    """Three positions of a kernel of three and the bias: rows of the usual shape, overlapping."""
    _, g = arrays(rng)
    image = rng.normal(size=(2, 5, 5, 1))
    patches = kf.Patches(xp.put(image), kf.Window((3,)), bias=True)
    rows = np.stack([np.concatenate([image[:, :, s : s + 3, 0], np.ones((2, 5, 1))], -1) for s in range(3)], 2)
    v = xp.put(rng.normal(size=(2, 3, 4)))
    got, want = (solve(row, kf.Record(x, xp.put(g), N), v) for x in (patches, xp.put(rows)))
    assert close(xp.get(got.direction), xp.get(want.direction), 1e-10)
    assert np.array_equal(xp.get(got.code), xp.get(want.code))


@rows
@few
def test_zero_draws_mean_that_G_is_the_identity(row, xp, rng):
    """As draws with (1/n) sum g g^T = I do, or a refusal that says what is needed."""
    a, g = arrays(rng, draws=3)
    v = xp.put(rng.normal(size=(2, 3, 4)))
    none = kf.Record(xp.put(a), xp.put(g[:0]), N)
    if row.no_draws:
        with pytest.raises(ValueError, match=row.no_draws):
            solve(row, none, v)
        return
    g = np.zeros_like(g)
    g[:, :, 0, 0, :] = np.sqrt(N) * np.eye(3)[:, None]
    got, want = (solve(row, record, v) for record in (none, kf.Record(xp.put(a), xp.put(g), N)))
    assert close(xp.get(got.direction), xp.get(want.direction), 1e-11)
    assert np.array_equal(xp.get(got.code), xp.get(want.code))


@rows
@few
@pytest.mark.parametrize("n", [0.0, np.nan], ids=["zero", "unread"])
def test_what_counts_nothing_moves_no_average(row, xp, n, rng):
    """All labels are ignored, and only the device knows: no gradient, and n is 0, or NaN where it was not read."""
    a, g = arrays(rng)
    state = kf.settle(row.method, kf.Record(xp.put(a), xp.put(g), N), damping=DAMPING)
    nothing = kf.Record(xp.put(a + 1.0), xp.put(0.0 * g), xp.put(np.asarray(n)))
    with np.errstate(all="ignore"):  # as a step has it
        moved = row.method.update(state, row.method.measure(state, nothing, HYPER), HYPER)
    for (path, old), new in zip(tree.items(state), tree.leaves(moved), strict=True):
        assert np.array_equal(xp.get(old), xp.get(new)), path


@rows
@few
def test_blocks_of_different_dampings_are_blocks_apart(row, xp, rng):
    """Each block as when its own damping is that of all."""
    a, g = arrays(rng)
    record = kf.Record(xp.put(a), xp.put(g), N)
    v = xp.put(rng.normal(size=(2, 3, 4)))
    dampings = (DAMPING, 3.0)
    each = xp.get(solve(row, record, v, xp.put(np.array(dampings))).direction)
    for block, damping in enumerate(dampings):
        alone = xp.get(solve(row, record, v, damping).direction)
        assert close(each[block], alone[block], 1e-11)


@rows
def test_blocks_do_not_see_each_other(row, rng):
    """A record of one block is that block of the record of two."""
    if row.sketched:
        return
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    together = solve(row, kf.Record(a, g, N), v).direction
    for block in range(2):
        span = slice(block, block + 1)
        apart = solve(row, kf.Record(a[span], g[:, span], N), v[span]).direction
        assert close(together[span], apart, 1e-10)


@rows
def test_unmeasured_methods_say_so(row, rng):
    """A record changes the state of every method but those."""
    assert declares(row.method, Unmeasured) == row.unmeasured
    record = kf.Record(*arrays(rng), N)
    start = row.method.init(kf.Block.of(record), record.g)
    state = row.method.update(start, row.method.measure(start, record, HYPER), HYPER)
    same = all(np.array_equal(x, y) for x, y in zip(tree.leaves(start), tree.leaves(state), strict=True))
    assert same == row.unmeasured


@rows
@pytest.mark.parametrize("shape", [(4, 3), (2, 6), (12, 1), (3, 1), (1, 4), (1, 1, 12)])
def test_gradients_of_another_shape_are_refused(row, shape, rng):
    """A kernel of JAX or Keras is the transpose: as many numbers, and another matrix."""
    a, g = arrays(rng, blocks=1)
    record = kf.Record(a, g, N)
    hyper = kf.Hyper(0, 0.0, 0.1)
    state = kf.settle(row.method, record, damping=0.1)
    v = rng.normal(size=shape)
    with pytest.raises(ValueError, match=r"grad has shape .* \(1, 3, 4\)"):
        row.method.solve(state, v, hyper, record)
    with pytest.raises(ValueError, match=r"grad has shape .* \(1, 3, 4\)"):
        row.method.solve(state, kf.Factored(*(rng.normal(size=(5, d)) for d in shape[:-3:-1]), 5.0), hyper, record)
    if not row.no_matrix:
        with pytest.raises(ValueError, match=r"shape|mismatch|size"):
            row.method.matvec(state, v if v.ndim == 3 else v[None], hyper)
