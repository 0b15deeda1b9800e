"""Programs that compile fast are right: matrices of several sizes inverted at one, windows of images as one gather."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.record.jacobian import adjoint, outputs
from kfaccore.xp.asking import Ask, answered
from kfaccore.xp.widths import widths

jax = pytest.importorskip("jax")
jnp = jax.numpy


def factor(rng, blocks, d):
    rows = rng.normal(size=(blocks, 3 * d, d))
    return rows.mT @ rows / (3 * d)


def asks(given):
    return [Ask(side.inverse, (x, shift), side.grown) for x, shift in given]


def sizes_of(program, *given):
    """Of the matrices whose Cholesky factors a traced function makes."""
    text = str(jax.make_jaxpr(program)(*given))
    lines = [line for line in text.splitlines() if " cholesky[" in line or " cholesky " in line]
    return [line.split("f64[")[1].split("]")[0] for line in lines]


def test_few_sizes_are_bought_with_bounded_work_and_memory():
    transformer = [(12, 512), (12, 513), (112, 128), (61, 129), (1, 10)]
    assert widths(transformer) == {512: 513, 513: 513, 128: 129, 129: 129, 10: 129}
    assert widths([]) == {}
    assert widths([(3, 7), (2, 7)]) == {7: 7}
    assert widths([(1, 64), (1, 128)]) == {64: 64, 128: 128}  # 78 % more work
    assert widths([(1, 1000), (40, 60), (40, 90)]) == {1000: 1000, 60: 90, 90: 90}  # memory


def test_inverses_at_one_size_are_those_of_each_alone(rng):
    """With codes: as it is, not positive definite, and not finite, among the small ones."""
    small = factor(rng, 4, 12)
    small[1, 2, 2] = -3.0
    small[2, 3, 1] = np.nan
    small[3] *= 1e-9
    pairs = ((factor(rng, 90, 41), 0.01), (small, 1e-12), (factor(rng, 2, 40), 0.3))
    given = [(x, np.full(len(x), shift)) for x, shift in pairs]

    def program(given):
        return answered(asks(given))

    placed = jax.tree.map(jnp.asarray, given)
    assert sizes_of(program, placed) == ["96,41,41"]
    for (x, shift), (inverse, code) in zip(given, jax.jit(program)(placed), strict=True):
        wanted, codes = side.inverse(x, shift)
        assert code.tolist() == codes.tolist()
        size = abs(wanted).max((1, 2), keepdims=True)
        np.testing.assert_allclose(inverse / size, wanted / size, atol=1e-12)


def test_where_nothing_is_finite_the_identity_comes_back():
    inverse, code = jax.jit(side.inverse)(jnp.full((2, 3, 3), jnp.nan), jnp.ones(2))
    assert code.tolist() == [kf.Code.NONFINITE] * 2
    assert np.array_equal(inverse, [np.eye(3)] * 2)


def test_a_repair_at_a_wider_size_adds_the_jitter_of_its_own(rng):
    """The mean diagonal, whose multiples are tried, is the small matrix's."""
    low = rng.normal(size=(1, 6, 3))
    given = [(factor(rng, 30, 30), np.full(30, 0.01)), (1e6 * low @ low.mT, np.zeros(1))]
    _, (inverse, code) = jax.jit(lambda given: answered(asks(given)))(jax.tree.map(jnp.asarray, given))
    alone, own = jax.jit(side.inverse)(*map(jnp.asarray, given[1]))
    assert code.tolist() == own.tolist() == [kf.Code.JITTERED]
    sizes = [np.trace(found[0]) for found in (inverse, alone)]  # nearly all of it 1 / jitter
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.1)


GEOMETRIES = [
    ((7,), kf.Window((3,), 2, 1)),
    ((6, 5), kf.Window((3, 2), (1, 2), 1)),
    ((7, 6), kf.Window((2, 3), 1, ((0, 1), (2, 0)), (2, 1))),
    ((3, 4, 3), kf.Window((2, 2, 2))),
]


@pytest.mark.parametrize(("spatial", "window"), GEOMETRIES, ids=["1d", "strided", "dilated", "3d"])
def test_windows_under_jit_are_those_of_numpy(rng, spatial, window):
    """Rows, their sums of squares with and without positions that do not exist, their mean; of groups, with bias."""
    host = Patches(rng.normal(size=(2, 3, *spatial, 2)), window, True)
    mask = rng.random(host.shape[1:3]) < 0.5

    def program(image, mask):
        found = Patches(image, window, True)
        return found.unfold(), found.gram_diagonal(), found.gram_diagonal(mask), found.mean()

    rows, diagonal, masked, mean = jax.jit(program)(jnp.asarray(host.image), jnp.asarray(mask))
    wanted = host.unfold()
    assert np.array_equal(rows, wanted)
    np.testing.assert_allclose(diagonal, (wanted**2).sum((1, 2)), rtol=1e-13)
    np.testing.assert_allclose(masked, (wanted**2 * mask[None, :, :, None]).sum((1, 2)), rtol=1e-13)
    np.testing.assert_allclose(mean, wanted.mean(2, keepdims=True), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", [6, 7])
def test_a_gram_in_turns_has_every_example_once(rng, monkeypatch, batch):
    """In pieces of two, with and without one left over."""
    monkeypatch.setattr("kfaccore.convolution.patches.rows_held", lambda d_in: 2 * 2 * 12)
    image = rng.normal(size=(2, batch, 5, 4, 2))
    window = kf.Window((2, 2))
    found = jax.jit(lambda image: Patches(image, window, True).gram_by_chunks())(jnp.asarray(image))
    rows = Patches(image, window, True).unfold().reshape(2, batch * 12, 9)
    np.testing.assert_allclose(found, rows.mT @ rows, rtol=1e-12, atol=1e-12)


def test_a_traced_n_is_that_of_every_group_of_stacked_layers(rng):
    """Two layers of three groups each are one stack; n is an array, as a masked loss gives it."""
    layers = ("first", "second")
    pre = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1), kf.Schedules(0.1))
    blocks = {name: kf.Block(2, 4, blocks=3) for name in layers}
    window = kf.Window((2,), 2)
    rows = {name: (rng.normal(size=(3, 5, 4, 2)), rng.normal(size=(1, 3, 5, 2, 2))) for name in layers}
    grads = {name: rng.normal(size=(3, 2, 4)) for name in layers}

    def step(rows, grads, n):
        records = {name: kf.Record(Patches(image, window), g, n) for name, (image, g) in rows.items()}
        state = pre.init(blocks, grads["first"])
        return pre.step(state, records, grads)[0]

    wanted = step(rows, grads, 4.0)
    found = jax.jit(step)(*jax.tree.map(jnp.asarray, (rows, grads)), jnp.asarray(4.0))
    for name in layers:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)


@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_patches_are_unfolded_a_few_examples_at_a_time(rng, monkeypatch, batch, masked):
    """J v and J^T w of whole rows, eager and in one loop of a compiled program, with and without one left over."""
    monkeypatch.setattr("kfaccore.record.chunks._held", lambda record: 2)
    image, g = rng.normal(size=(2, batch, 5, 4, 2)), rng.normal(size=(3, 2, batch, 12, 3))
    mask = rng.random((batch, 12)) < 0.7 if masked else None
    v = [rng.normal(size=(2, 3, 9)) for _ in range(2)]
    w = rng.normal(size=(3, batch))

    def program(image, g, mask, v, w):
        record = kf.Record(Patches(image, kf.Window((2, 2)), True), g, 1.0, mask)
        return outputs(record, *v), adjoint(record, w)

    whole = kf.Record(kf.Record(Patches(image, kf.Window((2, 2)), True), g, 1.0).rows(), g, 1.0, mask)
    want = [np.einsum("kbsi,koi->kbso", whole.a, x) for x in v]
    back = np.einsum("vb,vkbso,kbsi->koi", w, whole.g, whole.a)
    for found in (program(image, g, mask, v, w), jax.jit(program)(*jax.tree.map(jnp.asarray, (image, g, mask, v, w)))):
        for x, y in zip((*found[0], found[1]), (*want, back), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
