"""Precision of products: what is rounded, what never is, and the arithmetic of a GPU on tensors of the CPU."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import scipy.linalg

import kfaccore as kf
from kfaccore.convolution.pieces import gram_by_windows
from kfaccore.xp import gpu, halves, precision
from kfaccore.xp.blocks import stacked
from kfaccore.xp.factorise import _halved

torch = pytest.importorskip("torch")
WINDOWS = {
    "3x3": ((1, 5, 9, 8, 8), kf.Window((3, 3), 1, 1)),
    "strided, dilated, uneven": ((2, 3, 9, 8, 5), kf.Window((3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2))),
    "three channels": ((1, 4, 12, 11, 3), kf.Window((7, 7), 2, 3)),
    "one axis": ((1, 4, 12, 4), kf.Window((4,), 3, 2)),
    "three axes": ((1, 2, 5, 6, 7, 3), kf.Window((2, 3, 2), 1, 1)),
    "depthwise": ((4, 2, 6, 6, 1), kf.Window((3, 3), 1, 1)),
    "pointwise": ((1, 3, 7, 6, 5), kf.Window((1, 1), (2, 3))),
}


def by_loop(image: np.ndarray, window: kf.Window, bias: bool) -> np.ndarray:
    """Sum of a a^T, one position of one example at a time."""
    padded = np.pad(image, ((0, 0), (0, 0), *window.padding, (0, 0)))
    outputs = window.outputs(image.shape[2:-1])
    blocks = []
    for block in padded:
        rows = []
        for example in block:
            for place in np.ndindex(*outputs):
                steps = [np.multiply(offset, window.dilation) for offset in np.ndindex(*window.kernel)]
                row = [example[tuple(np.multiply(place, window.stride) + step)] for step in steps]
                rows.append(np.concatenate([*row, [1.0]] if bias else row))
        blocks.append(np.array(rows).T @ np.array(rows))
    return np.array(blocks)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "window"), WINDOWS.values(), ids=WINDOWS)
def test_grams_of_windows_are_sums_over_positions(shape, window, bias, rng, monkeypatch):
    """In float64, of one piece and of several; bfloat16 rows give the sums of the rounded ones."""
    image = rng.standard_normal(shape)
    want = by_loop(image, window, bias)
    for piece in (1 << 26, 300):
        monkeypatch.setattr("kfaccore.convolution.pieces.PIECE", piece)
        found = gram_by_windows(torch.from_numpy(image), window, bias)
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    single = torch.from_numpy(image).float()
    with kf.Precision("bfloat16").in_force():
        found = gram_by_windows(single, window, bias)
    rounded = by_loop(single.bfloat16().double().numpy(), window, bias)
    np.testing.assert_allclose(found, rounded, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("d", [1, 7, 8, 13])
@pytest.mark.parametrize("blocks", [1, 3])
def test_grams_of_rows(blocks, d, rng):
    """What a GPU multiplies, on the CPU: float64 exact, bfloat16 that of rounded rows, TF32 float32 where there is
    none."""
    x = torch.from_numpy(rng.standard_normal((blocks, 20, d)))
    torch.testing.assert_close(gpu.gram(x), x.mT @ x, rtol=1e-13, atol=1e-13)
    single = x.float()
    for how, rows in (("bfloat16", single.bfloat16().float()), ("tf32", single), ("float32", single)):
        with kf.Precision(how).in_force():
            found = gpu.gram(single)
        torch.testing.assert_close(found, rows.mT @ rows, rtol=1e-6, atol=1e-6)


def test_wide_grams_are_symmetric_from_block_rows(rng, monkeypatch):
    monkeypatch.setattr(gpu, "_WIDE", 20)
    x = torch.from_numpy(rng.standard_normal((2, 30, 45)))
    found = gpu.gram(x)
    torch.testing.assert_close(found, x.mT @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, found.mT, rtol=1e-13, atol=1e-13)  # inside a block as the product rounds
    step = -(-45 // gpu._BLOCK_ROWS // gpu.ALIGNED) * gpu.ALIGNED
    block = torch.arange(45) // step
    mirrored = block[:, None] != block
    assert mirrored.any()
    assert torch.equal(found[:, mirrored], found.mT[:, mirrored])


def test_products_find_the_zeros_behind_a_matrix(rng):
    """A product of what was cut out of zeros reads the zeros; a copy, and a change of the whole, are seen."""
    a, b, c = (torch.from_numpy(rng.standard_normal(s)).float() for s in ((2, 5, 13), (2, 13, 9), (2, 9, 9)))
    want = a @ b @ c
    inner = gpu.product(a, b)
    assert inner.shape == (2, 5, 9)
    torch.testing.assert_close(gpu.product(inner, gpu.cut(gpu._whole(c), 9, 9)), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpu.product(inner.clone(), c), want, rtol=1e-5, atol=1e-5)
    whole = gpu.cut(gpu._whole(c), 9, 9)
    whole.copy_(2 * c)
    torch.testing.assert_close(gpu.product(inner, whole), 2 * want, rtol=1e-5, atol=1e-5)
    whole.data = gpu._whole(3 * c)[:, :9, :9]  # elsewhere, laid out alike
    torch.testing.assert_close(gpu.product(inner, whole), 3 * want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [5, 8])
@pytest.mark.parametrize("columns", [6, 7])
def test_matrices_with_a_column_have_zeros_behind_them(rows, columns, rng, monkeypatch):
    """Some of them, stacked again, are found in the same memory; others, or as many of another width, are not."""
    w, b = (torch.from_numpy(rng.standard_normal(s)).float() for s in ((4, rows, columns), (4, rows)))
    want = torch.cat([w, b[..., None]], -1)
    found = gpu.with_zeros(w, b)
    assert torch.equal(found, want)
    some = stacked(list(found.unbind(0))[1:3])
    assert some.data_ptr() == found[1].data_ptr()
    behind = gpu._whole(some)
    assert torch.equal(behind[:, :rows, : columns + 1], want[1:3])
    assert behind.shape == (2, 8, 8)
    assert float(behind.abs().sum()) == pytest.approx(float(want[1:3].abs().sum()), rel=1e-6)
    if found.shape[1:] != (8, 8):
        assert behind.data_ptr() == some.data_ptr()
    narrow = found[:, :, 1:]
    assert gpu._whole(narrow).data_ptr() != narrow.data_ptr()
    assert torch.equal(gpu._whole(narrow)[:, :rows, :columns], want[:, :, 1:])
    others = [found[::2]]
    if columns == 6:
        others.append(found._base[:, :rows, 1:8])  # as large, and elsewhere in each
    for other in others:
        assert torch.equal(gpu._whole(other)[:, :rows, : columns + 1], other)
        assert gpu._whole(other).shape == (len(other), 8, 8)
    part = found[:, :, :columns]  # with something other than zeros behind it
    assert float(gpu._whole(part).abs().sum()) == pytest.approx(float(part.abs().sum()), rel=1e-6)
    right = torch.from_numpy(rng.standard_normal((2, columns + 1, 3))).float()
    torch.testing.assert_close(gpu.product(some, right), want[1:3] @ right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("images", "side", "channels"), [(3, 29, 5), (3, 28, 5), (2, 28, 300), (3, 5, 4)])
def test_gram_of_what_lies_features_first(images, side, channels, rng):
    """A product an image, where images are wide, is the sum over all rows; a gain's record is one that has them."""
    x = torch.from_numpy(rng.standard_normal((images, channels, side, side)))
    g = x.movedim(1, -1).reshape(1, 1, images, side * side, channels)
    assert g.data_ptr() == x.data_ptr()
    assert gpu.by_image_pays(g) == (side * side >= max(784, 4 * channels))
    rows = x.movedim(1, -1).reshape(-1, channels)
    record = kf.Record(torch.ones(()).double().expand(images, side * side, 1), g[0, 0], float(images))
    found = kf.KFAC().measure(kf.KFAC().init(kf.Block(channels, 1), x[:1, 0, 0]), record, kf.Hyper(1, 0.0, 1e-3))
    torch.testing.assert_close(found.G[0], rows.mT @ rows, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found.A[0], torch.full((1, 1), float(len(rows)), dtype=torch.float64))
    assert found.rows == len(rows)


@pytest.mark.parametrize(("count", "n"), [(1, 7), (3, 50), (8, 130)])
@pytest.mark.parametrize("condition", [1e2, 1e8])
def test_inverses_by_halves(count, n, condition, rng):
    """As accurate as Cholesky by the library, at every depth; the factor's inverse is one."""
    Q = np.linalg.qr(rng.standard_normal((count, n, n)))[0]
    X = (Q * np.logspace(0, -np.log10(condition), n)) @ Q.transpose(0, 2, 1)
    X = torch.from_numpy((X + X.transpose(0, 2, 1)) / 2)
    inverse, root, good = halves.inverse(X, leaf=16)
    eye = torch.eye(n, dtype=torch.float64).expand_as(X)
    assert bool(good.all())
    torch.testing.assert_close(X @ inverse, eye, rtol=0, atol=1e-14 * condition * n**0.5)
    torch.testing.assert_close(root.mT @ root, inverse, rtol=1e-7, atol=1e-9 * condition)
    assert bool((root.triu(1) == 0).all())


def test_halves_of_another_namespace(rng, monkeypatch):
    """What CuPy runs, with SciPy in the place of its triangular solve."""
    for name in ("cupyx", "cupyx.scipy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cupyx.scipy.linalg", scipy.linalg)
    X = rng.standard_normal((3, 50, 80))
    X = X @ X.transpose(0, 2, 1)
    inverse, root, good = halves.inverse(X, leaf=16)
    np.testing.assert_allclose(inverse, np.linalg.inv(X), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(root.transpose(0, 2, 1) @ root, inverse, rtol=1e-9, atol=1e-12)
    assert good.all()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), 0.0])
def test_a_failed_half_is_told_and_leaves_the_others(bad, rng):
    """The code of one block; the inverse of its neighbour is right."""
    good = np.eye(40) + 0.1 * np.ones((40, 40))
    x = torch.from_numpy(np.stack([good, good]))
    x[0, 30, 30] = bad
    assert halves.inverse(x, leaf=16)[2].tolist() == [False, True]
    inverse, ok, whole = _halved(x)
    assert ok.tolist() == [False, True]
    assert not whole
    np.testing.assert_allclose(inverse[1], np.linalg.inv(good), rtol=1e-12, atol=1e-12)


def test_the_strictest_of_a_call_counts():
    """Layers that are measured or solved together have the strictest precision of theirs; others have their own."""
    loose = kf.Precision("bfloat16", "tf32")
    with kf.precisely({"a": loose, "b": kf.Precision("tf32", "tf32"), "c": kf.Precision()}):
        for names, want in ((("a",), loose), (("a", "b"), kf.Precision("tf32", "tf32")), (("a", "c"), kf.Precision())):
            with precision.measuring(names):
                assert precision.statistics() == want.statistics
        with precision.measuring(("unknown",)):
            assert precision.statistics() is None
    assert precision.statistics() is None


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"solve='bfloat16'.*need statistics one of .* and solve one of"):
        kf.Precision("float32", "bfloat16")


def test_the_process_has_its_flag_again(monkeypatch):
    """TF32 in a solve, float32 in a factorisation whatever the process allows, and after an error as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flags = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for name, inside in (("highest", "tf32"), ("high", "ieee")):
            torch.set_float32_matmul_precision(name)
            how = "tf32" if inside == "tf32" else "float32"
            seen = []

            def failing(how=how, seen=seen):
                with precision.products(how):
                    seen.append(flags.fp32_precision)
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                failing()
            assert seen == [inside]
            assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


def test_statistics_are_rounded_and_nothing_else(xp, rng):
    """A of bfloat16 rows is that of the rounded rows, and on CuPy, which has no such product, one in TF32; float64 rows
    stay as they are."""
    a, g = (rng.standard_normal((12, d)).astype(np.float32) for d in (5, 3))
    rounded = kf.xp.to_bfloat16(a)
    rounded = a if xp.name == "cupy" else rounded
    want = rounded.T.astype(np.float64) @ rounded / 12
    most = 1e-3 if xp.name == "cupy" else 1e-6  # TF32 keeps ten bits
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(decay=0.0))
    state = pre.init({"a": kf.Block(3, 5)}, xp.put(g))
    record = kf.Record(xp.put(a), xp.put(g), 12)
    with kf.Precision("bfloat16").in_force():
        _, state, _ = pre.step(state, {"a": record}, {"a": xp.put(g[:3, :1] @ a[:1])})
    np.testing.assert_allclose(xp.get(state.layers["a"].A)[0], want, rtol=2 * most, atol=most)
    wide = kf.Record(xp.put(a.astype(np.float64)), xp.put(g.astype(np.float64)), 12)
    state = pre.init({"a": kf.Block(3, 5)}, xp.put(g.astype(np.float64)))
    with kf.Precision("bfloat16").in_force():
        _, state, _ = pre.step(state, {"a": wide}, {"a": xp.put((g[:3, :1] @ a[:1]).astype(np.float64))})
    exact = a.T.astype(np.float64) @ a.astype(np.float64) / 12
    np.testing.assert_allclose(xp.get(state.layers["a"].A)[0], exact, rtol=1e-12, atol=1e-12)
