"""Patches of images against a loop over positions: rows, grams by both ways, means, in every namespace."""

import itertools

import numpy as np
import pytest

from kfaccore import Patches, Window
from kfaccore.convolution.phases import autocorrelates, fft_pays

LOW_HIGH = ((1, 0), (0, 2))


def loop(x, kernel, stride, padding, dilation, bias):
    """Rows (blocks, batch, positions, d_in) of x (blocks, batch, *spatial, C), one entry at a time; axis pairs."""
    spatial, channels = x.shape[2:-1], x.shape[-1]
    counts = [
        (h + low + high - (k - 1) * r - 1) // s + 1
        for h, (low, high), k, r, s in zip(spatial, padding, kernel, dilation, stride, strict=True)
    ]
    rows = np.zeros((*x.shape[:2], int(np.prod(counts)), int(np.prod(kernel)) * channels + bias))
    for t, position in enumerate(itertools.product(*map(range, counts))):
        for i, offset in enumerate(itertools.product(*map(range, kernel))):
            at = [
                p * s + d * r - low
                for p, s, d, r, (low, _) in zip(position, stride, offset, dilation, padding, strict=True)
            ]
            if all(0 <= a < h for a, h in zip(at, spatial, strict=True)):
                rows[:, :, t, i * channels : (i + 1) * channels] = x[(slice(None), slice(None), *at)]
        if bias:
            rows[:, :, t, -1] = 1.0
    return rows


def case(kernel, spatial, stride=1, padding=0, dilation=1, bias=False, blocks=1, batch=3, channels=2):
    """Patches of seeded images and the loop's rows; correlated pixels with a mean, so that no entry vanishes."""
    axes = len(kernel)
    every = [v if isinstance(v, tuple) else (v,) * axes for v in (stride, padding, dilation)]
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in every[1])
    x = np.random.default_rng(7).standard_normal((blocks, batch, *spatial, channels)).cumsum(axis=2) + 0.5
    rows = loop(x, kernel, every[0], pairs, every[2], bias)
    return Patches(x, Window(kernel, stride, padding, dilation), bias), rows


def gram(rows):
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    return np.stack([sum(np.outer(a, a) for a in block) for block in flat])


def close(found, expected, tolerance=1e-12):
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


GEOMETRIES = [
    *({"kernel": (k, k), "spatial": (9, 8), "padding": p} for k in (1, 2, 3, 4, 5, 7) for p in range(k)),
    *({"kernel": (k,), "spatial": (13,), "padding": p} for k in (1, 2, 3, 4, 5, 7) for p in range(k)),
    *({"kernel": (k, k), "spatial": (11, 10), "stride": s, "padding": 1} for k in (2, 3, 5, 7) for s in (2, 3)),
    *({"kernel": (k,), "spatial": (17,), "stride": s, "padding": k - 1} for k in (3, 4, 7) for s in (2, 3)),
    *({"kernel": (k, k), "spatial": (11, 13), "dilation": 2, "padding": 1} for k in (1, 2, 3, 4)),
    *({"kernel": (3,), "spatial": (9,), "dilation": 2, "padding": p} for p in (0, 2, 4)),
    {"kernel": (3, 3), "spatial": (3, 3), "padding": 2},
    {"kernel": (3, 3), "spatial": (2, 5), "padding": 1},
    {"kernel": (3, 3), "spatial": (6, 5), "padding": LOW_HIGH},
    {"kernel": (3, 3), "spatial": (6, 5), "padding": (4, 0)},
    {"kernel": (2, 5), "spatial": (7, 6), "padding": (0, 2)},
    {"kernel": (1, 3), "spatial": (4, 5), "padding": (0, 1)},
    {"kernel": (5, 3), "spatial": (9, 11), "stride": (2, 1), "padding": (2, 1)},
    {"kernel": (3, 2), "spatial": (9, 8), "dilation": (1, 2), "padding": 1},
    {"kernel": (3, 3), "spatial": (9, 8), "stride": 2, "dilation": 2, "padding": 2},
    {"kernel": (3, 3), "spatial": (7, 9), "stride": 3, "padding": LOW_HIGH},
    {"kernel": (2, 3, 2), "spatial": (4, 5, 3), "padding": (0, 1, 1)},
    {"kernel": (3, 1, 2), "spatial": (5, 4, 5), "stride": (2, 1, 2), "padding": 1, "dilation": (1, 1, 2)},
    {"kernel": (3, 3), "spatial": (5, 6), "padding": 1, "channels": 1, "batch": 1},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows_grams_and_mean_equal_a_loop_over_positions(geometry, bias):
    patches, rows = case(**geometry, bias=bias, blocks=2)
    assert patches.shape == rows.shape
    np.testing.assert_array_equal(patches.unfold(), rows)
    chunks = list(patches.rows(2))
    assert [c.shape[1] for c in chunks] == ([2, 1] if rows.shape[1] == 3 else [1])
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), rows)
    close(patches.mean(), rows.mean(axis=2, keepdims=True))
    A = gram(rows)
    close(patches.gram(), A)
    close(patches.gram_by_chunks(), A)
    if autocorrelates(patches.window, patches.spatial):
        close(patches.gram_by_fft(), A)


def test_which_geometries_have_an_autocorrelation():
    forms = {str(g): autocorrelates(case(**g)[0].window, g["spatial"]) for g in GEOMETRIES}
    without = [name for name, form in forms.items() if not form]
    assert without == [str(g) for g in GEOMETRIES if _has_none(g)]
    assert len(without) == 4


def _has_none(g):
    """3 axes, an image shorter than the kernel, stride and dilation together."""
    both = "stride" in g and "dilation" in g
    return len(g["kernel"]) == 3 or g["spatial"] == (2, 5) or both


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if not _has_none(g)][::7], ids=str)
def test_float32_agrees_with_float64(geometry):
    patches, rows = case(**geometry, bias=True)
    single = Patches(patches.image.astype(np.float32), patches.window, True)
    for found in (single.gram_by_fft(), single.gram_by_chunks()):
        assert found.dtype == np.float32
        close(found, gram(rows), 1e-6)


@pytest.mark.parametrize("size", [(64, 3, 20), (3, 40, 20)], ids=["many images", "many channels"])
def test_chunks_of_spectra_and_groups_of_frequencies_add_up(size, monkeypatch):
    from kfaccore.convolution import autocorrelation

    batch, channels, side = size
    patches, _ = case((3, 3), (side, 7), padding=1, batch=batch, channels=channels)
    expected = patches.gram_by_chunks()
    for spectrum, group in ((1 << 12, 1 << 30), (1 << 30, 1), (1 << 15, 1 << 12)):
        monkeypatch.setattr(autocorrelation, "_SPECTRUM_BYTES", spectrum)
        monkeypatch.setattr(autocorrelation, "_GROUP", group)
        close(patches.gram_by_fft(), expected)


def test_gram_is_exactly_symmetric():
    for geometry in ({"padding": 1}, {"stride": 2}, {"dilation": 2}):
        patches, _ = case((5, 3), (12, 11), **geometry, bias=True)
        A = patches.gram_by_fft()
        np.testing.assert_array_equal(A, A.mT)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (3, 3), "spatial": (8, 7), "padding": (LOW_HIGH[0], 1)},
        {"kernel": (4,), "spatial": (9,), "padding": 3},
        {"kernel": (5, 3), "spatial": (9, 8), "stride": 2, "padding": 1},
        {"kernel": (3, 3), "spatial": (9, 8), "dilation": 2, "padding": 1},
        {"kernel": (2, 2, 2), "spatial": (4, 3, 4), "padding": 1},
    ],
    ids=str,
)
def test_every_namespace_agrees_and_leaves_the_image_alone(xp, geometry):
    numpy_patches, rows = case(**geometry, bias=True, blocks=2)
    before = numpy_patches.image.copy()
    image = xp.put(before)

    def found(way):
        return xp.whole(lambda x: way(Patches(x, numpy_patches.window, True)))(image)

    ways = [Patches.gram, Patches.gram_by_chunks]
    if autocorrelates(numpy_patches.window, numpy_patches.spatial):
        ways.append(Patches.gram_by_fft)
    for way in ways:
        A = found(way)
        assert type(A) is type(image)
        assert A.dtype == image.dtype
        close(xp.get(A), gram(rows))
    close(xp.get(found(Patches.unfold)), rows)
    close(xp.get(found(Patches.mean)), rows.mean(axis=2, keepdims=True))
    close(xp.get(found(lambda patches: patches.concat(patches).gram())), 2 * gram(rows))
    np.testing.assert_array_equal(xp.get(image), before)


def test_gram_under_jit():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    patches, rows = case((3, 3), (8, 7), padding=1, bias=True)
    found = jax.jit(lambda image: Patches(image, patches.window, True).gram_by_fft())(jax.numpy.asarray(patches.image))
    close(found, gram(rows))


def test_half_precision_is_widened_and_integers_are_refused():
    image = np.ones((2, 5, 5, 1))
    assert Patches(image.astype(np.float16), Window((3, 3))).gram().dtype == np.float32
    with pytest.raises(TypeError, match="image has dtype int64"):
        Patches(image.astype(np.int64), Window((3, 3)))


def test_concat_joins_batches_and_refuses_other_windows():
    patches, rows = case((3, 3), (5, 6), padding=1, bias=True)
    twice = patches.concat(patches)
    assert twice.shape == (1, 6, 30, 19)
    close(twice.gram(), 2 * gram(rows))
    with pytest.raises(ValueError, match="patches differ"):
        patches.concat(Patches(patches.image, Window((3, 3)), True))
    with pytest.raises(ValueError, match="patches differ"):
        patches.concat(Patches(patches.image, patches.window))


def test_same_and_valid_padding():
    assert Window((3, 4), padding="same").outputs((7, 6)) == (7, 6)
    assert Window((4,), padding="same").padding == ((1, 2),)
    assert Window((3,), padding="same", dilation=2).padding == ((2, 2),)
    assert Window((3, 4), padding="valid").outputs((7, 6)) == (5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": 3}, "kernel is 3; need a tuple"),
        ({"kernel": (2, 2, 2, 2)}, "need a tuple of 1, 2 or 3 sizes"),
        ({"kernel": (0, 3)}, r"kernel is \(0, 3\)"),
        ({"kernel": (3, 3), "stride": 0}, r"stride is \(0, 0\).*at least 1"),
        ({"kernel": (3, 3), "stride": (1, 1, 1)}, "stride is .* need 2 numbers"),
        ({"kernel": (3, 3), "dilation": 0}, "dilation is"),
        ({"kernel": (3, 3), "padding": -1}, "padding is .*at least 0"),
        ({"kernel": (3, 3), "padding": ((1, 1, 1), 0)}, r"need 2 numbers or \(low, high\) pairs"),
        ({"kernel": (3, 3), "padding": "full"}, "padding is 'full'"),
        ({"kernel": (3, 3), "padding": "same", "stride": 2}, "padding is 'same' at stride"),
    ],
)
def test_bad_windows(arguments, message):
    with pytest.raises(ValueError, match=message):
        Window(**arguments)


def test_bad_images():
    with pytest.raises(ValueError, match=r"image has shape \(5, 5, 1\) for a kernel of 2 axes"):
        Patches(np.ones((5, 5, 1)), Window((3, 3)))
    with pytest.raises(ValueError, match=r"reaching \[5, 5\] does not fit the padded image \[4, 9\]"):
        Patches(np.ones((2, 4, 9, 1)), Window((3, 3), dilation=2))
    with pytest.raises(ValueError, match="has no autocorrelation form"):
        Patches(np.ones((2, 4, 4, 4, 1)), Window((3, 3, 3))).gram_by_fft()


@pytest.mark.parametrize(
    ("shape", "window", "pays"),
    [
        ((1, 128, 32, 32, 64), Window((3, 3), padding=1), True),
        ((1, 128, 32, 32, 32), Window((5, 5), padding=2), True),
        ((1, 128, 32, 32, 3), Window((7, 7), 2, 3), False),
        ((1, 128, 32, 32, 32), Window((5, 5), 2, 2), True),
        ((1, 128, 32, 32, 32), Window((3, 3), 2, 1), False),
        ((1, 128, 32, 32, 32), Window((1, 1)), False),
        ((1, 64, 191, 1, 128), Window((64, 1)), False),
        ((1, 64, 1, 191, 16), Window((1, 64)), False),
        ((1, 64, 128, 256), Window((16,), padding=7), True),
        ((1, 16, 4096, 1), Window((1024,)), False),
        ((1, 32, 16, 16, 256), Window((3, 3), padding=1), True),
        ((1, 128, 32, 32, 32), Window((3, 3), padding=2, dilation=2), True),
        ((1, 1, 4, 4, 2), Window((3, 3), padding=1), False),
        ((1, 8, 8, 8, 8, 4), Window((3, 3, 3), padding=1), False),
    ],
)
def test_choice_of_algorithm(shape, window, pays):
    assert fft_pays(window, shape) is pays


def test_short_runs_of_patches_are_dearer_where_no_strided_copy_is():
    assert fft_pays(Window((7, 7), 2, 3), (1, 128, 32, 32, 3), strided=False)
