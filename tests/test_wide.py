"""Sides too wide for a matrix: diagonal factors against the dense Kronecker formula, sizes told before allocation."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from formulas import arrays, expanded, partial_traces, pi, reduced, split
from kfaccore import tree
from kfaccore.linalg.cg import Residual
from kfaccore.methods.rows import cgfac
from kfaccore.precondition.placement import costs, refreshed_leaves
from kfaccore.xp.shapes import Shape
from rows import METHODS

DAMPING = 0.1
HYPER = kf.Hyper(0, 0.0, DAMPING)
SIDES = [(True, False), (False, True), (True, True)]
WIDE = kf.Block(12000, 9)


def thinned(factors, diagonal_in, diagonal_out):
    """Factors of which some keep their diagonal alone."""

    def found(a, g, n):
        A, G = factors(a, g, n)
        return A * np.eye(A.shape[-1]) if diagonal_in else A, G * np.eye(G.shape[-1]) if diagonal_out else G

    return found


def inverted(matrix, v):
    """The matrices (blocks, D, D) solved for v (blocks, d_out, d_in)."""
    return np.linalg.solve(matrix, v.reshape(len(v), -1, 1)).reshape(v.shape)


def run(method, block, records, v):
    """The direction after one update with all `records` and a refresh."""
    state = method.init(block, records[0].g)
    stats = [method.measure(state, record, HYPER) for record in records]
    total = stats[0]
    for other in stats[1:]:
        total = method.combine(total, other)
    state = method.refresh(method.update(state, total, HYPER), HYPER)
    found = method.solve(state, v, HYPER)
    return found.direction, found.code, state


def close(x, y, tolerance=1e-10):
    return np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance * np.abs(np.asarray(y)).max()


def block_of(record, diagonal_in, diagonal_out):
    return replace(kf.Block.of(record), diagonal_in=diagonal_in, diagonal_out=diagonal_out)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("sharing", "factors"), [(kf.expand, expanded), (kf.reduce, reduced)])
@pytest.mark.parametrize("inverse", [kf.cholesky, kf.eigh])
def test_kfac_is_the_dense_formula_with_diagonals(sides, sharing, factors, inverse, xp, rng):
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    record = kf.Record(xp.put(a), xp.put(g), 5.0)
    method = kf.KFAC(sharing=sharing, inverse=inverse)
    got, code, state = run(method, block_of(record, *sides), [record], xp.put(v))
    matrix = split(pi, thinned(factors, *sides))(a, g, 5.0, DAMPING)
    assert close(xp.get(got), inverted(matrix, v))
    assert (xp.get(code) == kf.Code.OK).all()
    assert [state.A.ndim == 2, state.G.ndim == 2] == list(sides)


@pytest.mark.parametrize("sides", SIDES)
def test_tkfac_is_the_dense_formula_with_diagonals(sides, rng):
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    record = kf.Record(a, g, 5.0)
    got, _, _ = run(kf.TKFAC(split=kf.pi), block_of(record, *sides), [record], v)
    matrix = split(pi, thinned(partial_traces, *sides))(a, g, 5.0, DAMPING)
    assert close(got, inverted(matrix, v))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("method", [kf.EKFAC(), kf.TEKFAC()])
def test_moments_are_exact_in_a_half_standard_basis(method, sides, rng):
    """Both sides diagonal: the diagonal of F itself; one: the squares in the other side's eigenvectors."""
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    record = kf.Record(a, g, 5.0)
    state = method.init(block_of(record, *sides), record.g)
    for _ in range(2):
        state = method.update(method.refresh(state, HYPER), method.measure(state, record, HYPER), HYPER)
        state = method.refresh(state, HYPER)
    state = method.update(state, method.measure(state, record, HYPER), HYPER)
    factors = partial_traces if isinstance(method, kf.TEKFAC) else expanded
    A, G = thinned(factors, *sides)(a, g, 5.0)
    Qa = np.eye(4) + 0 * A if sides[0] else np.linalg.eigh(A)[1]
    Qg = np.eye(3) + 0 * G if sides[1] else np.linalg.eigh(G)[1]
    J = np.einsum("vbnso,bnsi->bvnoi", g, a).reshape(2, -1, 3, 4)
    S = ((Qg.mT[:, None] @ J @ Qa[:, None]) ** 2).sum(1) / 5.0
    want = Qg @ ((Qg.mT @ v @ Qa) / (S + DAMPING)) @ Qa.mT
    assert close(method.solve(state, v, HYPER).direction, want)


OTHERS = {
    "randomized": kf.RandomizedKFAC(),
    "brand": kf.BrandKFAC(),
    "brand-r": kf.BrandRKFAC(),
    "brand-c": kf.BrandCKFAC(),
    "skfac": kf.SKFAC(),
    "skfac-rows": kf.SKFAC(rows=96, branch=lambda rows, d: True),
    "cgfac": kf.CGFAC(cgfac.KronFactored(), cgfac.CG(Residual(1e-15), 400), 96),
    "ikfac": next(row.method for row in METHODS if row.name == "singd-ikfac"),
}


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_take_diagonal_sides(name, sides, rng):
    """All are K-FAC where nothing is cut off, and with a diagonal they are what K-FAC is with it."""
    a, g = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    record = kf.Record(a, g, 5.0)
    block = replace(block_of(record, *sides), rows=96)
    method = OTHERS[name]
    want, _, _ = run(kf.KFAC(split=kf.per_factor if name == "ikfac" else kf.pi), block, [record], v)
    if name == "ikfac":
        state = method.init(block, record.g)
        for _ in range(method.cycles):
            state = method.update(state, method.measure(state, record, HYPER), HYPER)
        got = method.solve(state, v, HYPER).direction
    else:
        got, _, _ = run(method, block, [record], v)
    assert close(got, want, 1e-8)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", ["kfac", "tkfac", "brand", "brand-r", "skfac-rows"])
def test_micro_batches_factored_gradients_and_masks(name, sides, rng):
    """Halves combine to the whole, a mask drops its rows, a gradient need not be multiplied out."""
    method = {"kfac": kf.KFAC(), "tkfac": kf.TKFAC(), **OTHERS}[name]
    a, g = arrays(rng, batch=6)
    mask = rng.random((6, 3)) < 0.7
    mask[:, 0] = True
    v = rng.normal(size=(2, 3, 4))
    whole = kf.Record(a, g, 6.0, mask)
    block = replace(block_of(whole, *sides), rows=96)
    want, _, state = run(method, block, [whole], v)
    parts = [kf.Record(a[:, i], g[:, :, i], 3.0, mask[i]) for i in (slice(0, 3), slice(3, 6))]
    assert close(run(method, block, parts, v)[0], want)
    rows = np.nonzero(mask.ravel())[0]
    flat = kf.Record(
        a.reshape(2, 18, 1, 4)[:, rows], g.reshape(2, 2, 18, 1, 3)[:, :, rows], 6.0
    )  # every valid position an example of its own
    assert close(run(method, block, [flat], v)[0], want)
    factored = kf.Factored(a, g[0], 6.0)
    dense = method.solve(state, factored.dense(), HYPER).direction
    assert close(method.solve(state, factored, HYPER).direction, dense)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("blocks", "bias"), [(1, True), (2, False), (2, True)])
def test_the_diagonal_of_patches_is_that_of_their_gram(masked, blocks, bias, xp, rng):
    window = kf.Window((3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
    image = rng.normal(size=(blocks, 4, 7, 6, 3))
    patches = kf.Patches(xp.put(image), window, bias)
    _, batch, shared, d_in = patches.shape
    mask = rng.random((batch, shared)) < 0.6 if masked else None
    g = xp.put(rng.normal(size=(2, blocks, batch, shared, 5)))
    record = kf.Record(patches, g, 4.0, None if mask is None else xp.put(mask))
    rows = xp.get(record.rows()).reshape(blocks, -1, d_in)
    assert close(xp.get(patches.gram_diagonal(record.mask)), (rows * rows).sum(1), 1e-13)
    unfolded = kf.Record(record.rows(), g, 4.0, record.mask)
    v = xp.put(rng.normal(size=(blocks, 5, d_in)))
    block = block_of(record, True, True)
    for method in (kf.KFAC(), kf.TKFAC(), kf.EKFAC()):
        both = xp.whole(lambda method=method: [run(method, block, [given], v)[0] for given in (record, unfolded)])()
        assert close(*map(xp.get, both))


def test_a_diagonal_of_patches_unfolds_nothing(rng, monkeypatch):
    record = kf.Record(kf.Patches(rng.normal(size=(4, 6, 6, 3)), kf.Window((3, 3))), rng.normal(size=(4, 16, 5)), 4.0)
    monkeypatch.setattr(kf.Patches, "unfold", None)
    monkeypatch.setattr(kf.Patches, "rows", None)
    monkeypatch.setattr(kf.Patches, "gram", None)
    block = block_of(record, True, False)
    run(kf.KFAC(), block, [record], rng.normal(size=(1, 5, 27)))


def test_an_embedding_may_have_a_diagonal_output_side(rng):
    """Ids are one-hot rows with any output side."""
    index = rng.integers(0, 7, size=(6, 3))
    g = rng.normal(size=(2, 6, 3, 4))
    v = rng.normal(size=(1, 4, 7))
    ids = kf.Record(kf.Ids(index, 7), g[:, None], 6.0)
    hot = kf.Record(np.eye(7)[index][None], g[:, None], 6.0)
    for method in (kf.KFAC(), kf.TKFAC(), kf.EKFAC(), kf.BrandKFAC()):
        block = block_of(ids, True, True)
        assert close(run(method, block, [ids], v)[0], run(method, block, [hot], v)[0])


def test_zero_draws_mean_the_identity_on_a_diagonal_side(rng):
    a, _ = arrays(rng)
    v = rng.normal(size=(2, 3, 4))
    record = kf.Record(a, np.zeros((0, 2, 5, 3, 3)), 5.0)
    want = run(kf.KFAC(), block_of(record, False, False), [record], v)[0]
    for name in ("randomized", "brand", "skfac"):
        assert close(run(OTHERS[name], replace(block_of(record, False, True), rows=96), [record], v)[0], want)
    assert close(run(kf.KFAC(), block_of(record, False, True), [record], v)[0], want)


REFUSING = [kf.KPSVD(), kf.Deflation(), kf.Lanczos(), kf.KFACCorrected(), kf.PINNKFAC(terms=1)]


@pytest.mark.parametrize("method", REFUSING, ids=lambda m: type(m).__name__)
def test_methods_of_dense_factors_refuse_by_name_at_init(method):
    pre = kf.Preconditioner(method)
    with pytest.raises((ValueError, TypeError), match=rf"{type(method).__name__} got outputs too wide .*12000.*widest"):
        pre.init({"head": WIDE}, np.zeros(1))
    with pytest.raises((ValueError, TypeError), match="got an embedding, or inputs too wide") as caught:
        pre.memory({"head": kf.Block(3, 9000)})
    assert "in layer 'head'" in caught.value.__notes__


def test_the_preconditioner_narrows_blocks_and_not_the_users(rng):
    a, g = arrays(rng, blocks=1)
    v = rng.normal(size=(3, 4))
    blocks = {"fc": kf.Block(3, 4), "narrow": kf.Block(2, 2)}
    record = kf.Record(a, g, 5.0)
    for widest, sides in ((3, (True, False)), (2, (True, True)), (4, (False, False))):
        pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(DAMPING, 0.0), widest=widest)
        state = pre.init(blocks, record.g)
        assert dict(state.blocks) == blocks
        assert [state.layers["fc"].A.ndim == 2, state.layers["fc"].G.ndim == 2] == list(sides)
        assert state.layers["narrow"].A.ndim == 3
        updates, _, info = pre.step(state, {"fc": record}, {"fc": v})
        matrix = split(pi, thinned(expanded, *sides))(a, g, 5.0, DAMPING)
        assert close(updates["fc"], inverted(matrix, v[None])[0])
        assert info.counts() == {kf.Code.OK: 1}


def test_a_method_of_linear_sides_keeps_its_modes():
    """By the caller's choice a wide side is low-rank; other layers of the same run are diagonal."""
    pre = kf.Preconditioner(
        {"head": kf.BrandKFAC(rank=kf.Rank(8, 8)), "other": kf.BrandRKFAC(), "third": kf.RandomizedKFAC()}
    )
    state = pre.init({"head": WIDE, "other": WIDE, "third": WIDE}, np.zeros(1, np.float32))
    assert state.layers["head"].G.U.shape == (1, 12000, 8)
    assert state.layers["other"].G.shape == state.layers["third"].modes_G.shape == (1, 12000)
    assert state.layers["other"].omega_G.size == state.layers["third"].omega_G.size == 0
    dense = kf.Preconditioner(kf.SINGD()).init({"head": WIDE}, np.zeros(1))
    assert {x.size for x in tree.leaves(dense.layers["head"].C)} == {12000}


@pytest.mark.parametrize("widest", [0, -1])
def test_widest_is_checked(widest):
    with pytest.raises(ValueError, match=f"Preconditioner.widest is {widest}; need a positive number"):
        kf.Preconditioner(kf.KFAC(), widest=widest)


def test_network_methods_are_given_narrow_blocks(rng):
    blocks = {"a": kf.Block(3, 4), "b": kf.Block(2, 9)}
    records = {
        name: kf.Record(rng.normal(size=(7, block.d_in)), rng.normal(size=(7, block.d_out)), 7.0)
        for name, block in blocks.items()
    }
    grads = {name: rng.normal(size=(block.d_out, block.d_in)) for name, block in blocks.items()}
    for method in (kf.KFAC(), kf.EKFAC()):
        for space in (kf.network.Nicolaides(), kf.network.Enriched(3)):
            pre = kf.Preconditioner(network=kf.TwoLevel(method, space), widest=2)
            updates, state, _ = pre.step(pre.init(blocks, grads["a"]), records, grads)
            assert state.network.layers["b"].A.shape == (1, 9)
            assert all(np.isfinite(x).all() for x in updates.values())
    with pytest.raises(ValueError, match="layer 'a' is an embedding; Tridiagonal takes dense layers"):
        kf.Preconditioner(network=kf.Tridiagonal(order=("a",)), widest=2).init(blocks, grads["a"])


def test_placement_counts_a_diagonal_for_nothing():
    assert costs({"x": kf.Block(2, 9, diagonal_out=True), "y": kf.Block(2, 9, 1, True, diagonal_out=True)}) == {
        "x": 729.0,
        "y": 0.0,
    }
    block = kf.Block(9, 9, diagonal_out=True)
    for method in (kf.KFAC(), kf.RandomizedKFAC()):
        written, _ = refreshed_leaves(method, np.zeros(1), block)
        assert len(written) == len(tree.leaves(method.init(block, np.zeros(1))))


@pytest.mark.parametrize("block", [kf.Block(7, 5, 2, rows=9, samples=11), kf.Block(7, 5, 2, True, diagonal_out=True)])
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_shapes_are_those_of_a_real_state(row, block):
    try:
        want = tree.leaves(row.method.init(block, np.zeros(1, np.float32)))
    except (ValueError, TypeError):
        pytest.skip("refuses a diagonal side")
    got = tree.leaves(row.method.init(block, Shape((1,), np.dtype(np.float32))))
    seen = [(tuple(x.shape), x.dtype) if isinstance(x, Shape) else (np.shape(x), np.asarray(x).dtype) for x in got]
    assert seen == [(np.shape(x), np.asarray(x).dtype) for x in want]
    parts = kf.Preconditioner(row.method).footprint({"fc": block})["fc"]
    assert parts.state == sum(np.asarray(x).nbytes for x in want)


def test_memory_allocates_nothing_and_takes_no_time():
    blocks = {f"head{i}": kf.Block(50257, 769) for i in range(20)} | {"dense": kf.Block(8000, 8000)}
    tracemalloc.start()
    start = time.perf_counter()
    found = kf.Preconditioner(kf.KFAC()).footprint(blocks, np.zeros(1))
    taken = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 1
    assert peak < 1e6
    assert found["head0"].averages == 8 * (50257 + 769**2 + 1)
    assert found["dense"].inverses == 8 * 2 * 8000**2 + 4


def test_wide_layers_are_made_in_no_time():
    start = time.perf_counter()
    kf.Preconditioner(kf.KFAC()).init({"fc": WIDE}, np.zeros(1, np.float32))
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=lambda m: type(m).__name__)
def test_the_peak_is_what_an_update_takes(method, donate, rng):
    """Of NumPy's own allocations: never over what is told, and not far under it."""
    a = rng.normal(size=(4, 400))
    g = rng.normal(size=(4, 300))
    record = kf.Record(a, g, 4.0)
    pre = kf.Preconditioner(method, donate=donate)
    blocks = {"fc": kf.Block.of(record)}
    told = pre.footprint(blocks, a)["fc"].peak
    grads = {"fc": kf.Factored(a, g, 4.0)}
    warm = pre.step(pre.init(blocks, a), {"fc": record}, grads)[1]
    del warm
    tracemalloc.start()
    state = pre.init(blocks, a)
    pre.step(state, {"fc": record}, grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.6 * told <= peak <= 1.05 * told
