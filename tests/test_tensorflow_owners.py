"""Whose row is whose: what one batch cannot show is asked of the next, and what it showed is asked again."""

from __future__ import annotations

from contextlib import nullcontext as nothing

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

owners = pytest.importorskip("kfaccore_tensorflow.owners")
places = pytest.importorskip("kfaccore_tensorflow.places")


class TimeMajor(L.Layer):
    """Rows (positions, examples), flattened."""

    def build(self, shape):
        self.w = self.add_weight(shape=(4, 3), name="w")

    def call(self, x):
        h = tf.reshape(tf.transpose(x, [1, 0, 2]), [-1, 4]) @ self.w
        return tf.transpose(tf.reshape(h, [x.shape[1], -1, 3]), [1, 0, 2])


@pytest.mark.parametrize(
    ("first", "zero"), [(3, False), (1, False), (3, True)], ids=["shown", "one example", "no gradient"]
)
def test_what_the_first_batch_could_not_show_is_asked_again(first, zero, rng):
    """A under reduce is of the means over each example's positions."""
    head = L.Dense(2, kernel_initializer="zeros" if zero else "glorot_uniform")
    net = keras.Sequential([keras.Input((6, 4)), TimeMajor(name="it"), L.GlobalAveragePooling1D(), head])
    options = {"method": kf.KFAC(sharing=kf.reduce), "schedules": kf.Schedules(1e-2, 0.0), "fisher": kf.type2}
    step = kt.Optimizer(net, crossentropy(), SGD(0.0), **options)
    step.step(rng.normal(size=(first, 6, 4)), rng.integers(0, 2, first))
    head.kernel.assign(rng.normal(size=(3, 2)))
    x = rng.normal(size=(3, 6, 4))
    step.step(x, rng.integers(0, 2, 3))
    mean = x.mean(1)
    np.testing.assert_allclose(np.asarray(step.engine.state.layers["it.w"].A)[0], mean.T @ mean / 3, rtol=1e-12)


@pytest.mark.parametrize(("sizes", "zero"), [((8,), False), ((1, 8), False), ((8, 8), True)])
def test_rows_that_mix_examples_are_marked_once_a_batch_shows_it(sizes, zero, rng):
    def made():
        head = L.Dense(3, kernel_initializer="zeros" if zero else "glorot_uniform")
        return keras.Sequential([keras.Input((4,)), L.Dense(5, name="a"), L.BatchNormalization(), L.ReLU(), head])

    batches = [(rng.normal(size=(size, 4)), rng.integers(0, 3, size)) for size in sizes]
    step = kt.Optimizer(made(), crossentropy(), SGD(0.5))
    for x, y in batches:
        step.step(x, y)
    assert step.engine.mixing == ["a"]
    step = kt.Optimizer(made(), crossentropy(), SGD(0.5), method=kf.FNGD(steps=0))
    for x, y in batches[:-1]:
        step.step(x, y)
    with pytest.raises(Exception, match="mix examples or are shared by them"):
        step.step(*batches[-1])


class Ragged(keras.Model):
    """Rows of each example behind each other, as many as there are."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = L.Dense(4, "tanh", name="inner"), L.Dense(3)

    def call(self, given):
        x, there = given
        rows = self.inner(tf.boolean_mask(x, there))
        return self.head(tf.math.unsorted_segment_sum(rows, tf.where(there)[:, 0], tf.shape(x)[0]))


def test_rows_of_other_sizes_are_asked_of(rng):
    net = Ragged()
    x = rng.normal(size=(4, 3, 5))
    even, odd = np.ones((4, 3), bool), np.array([[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
    net([x, even])
    step = kt.Optimizer(net, crossentropy(), SGD(0.0))
    for there, mixing in ((even, []), (odd, ["inner"]), (even, []), (odd, ["inner"])):
        new = there is odd and not step.engine.owners.ragged
        with pytest.warns(UserWarning, match=r"rows of \['inner'\] are each of one") if new else nothing():
            step.step([x, there], np.zeros(4, int))
        assert step.engine.mixing == mixing


def test_batches_are_asked_at_powers_of_two_and_where_sizes_are_new():
    asked = owners.Owners()
    sizes = [(8, 3)] * 8 + [(1, 3), (5, 3), (5, 3)]
    due = []
    for one in sizes:
        due.append(asked.due(one))
        asked.look({})
    assert due == [True, True, False, True, False, False, False, True, False, True, False]


def test_an_answer_is_one_only_where_rows_show_it(rng):
    s = places.factors(3)
    first = rng.normal(size=(6, 2))
    inner = first * np.tile(s, 2)[:, None]
    assert places.owned(first, inner, 3) == (places.Place(0, inner=True), True)
    assert places.owned(0 * first, 0 * inner, 3) == (places.Place(0), False)
    assert places.owned(0 * first, 0 * inner, 3, places.Place(0, inner=True)) == (places.Place(0, inner=True), False)
    lone = np.arange(6)[:, None] == 0  # the first row is of the first example both ways
    assert places.owned(first * lone, inner * lone, 3) == (places.Place(0), False)
    assert places.owned(first, first * s.sum(), 3) == (places.Place(None, mixes=True), True)
    odd = first * s[[0, 1, 1, 1, 2, 2]][:, None]
    assert places.owned(first, odd, 3) == (places.Place(None, mixes=True), True)
    assert places.ragged(first, odd, 3)
    assert not places.ragged(first, first * s.sum(), 3)
