"""Streams of Keras models: per-example gradients from tf.GradientTape, one example at a time."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import L, keras, kt, tf
from tf_shared import double as double


@pytest.fixture
def model():
    inner = [L.Conv2D(4, 2, name="conv"), L.BatchNormalization(name="norm"), L.Flatten()]
    return keras.Sequential([keras.Input((4, 4, 2)), *inner, L.Dropout(0.5), L.Dense(3, name="head")])


@pytest.fixture
def batches(rng):
    x = rng.normal(size=(7, 4, 4, 2))
    y = rng.integers(0, 3, 7)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(3)


def one_by_one(model, batches, pull):
    """{part: (draws, examples, *matrix)} of pull(f (1, C), y (1,)) -> list of scalars, not in training."""
    parts = kt.coverage(model).parts
    found = {part.name: {} for part in parts}
    for x, y in batches:
        for i in range(len(x)):
            with tf.GradientTape(persistent=True) as tape:
                values = list(pull(model(x[i : i + 1], training=False), y[i : i + 1]))
            for draw, value in enumerate(values):
                for part in parts:
                    rows = {role: tf.convert_to_tensor(tape.gradient(value, v)) for role, v in part.variables.items()}
                    matrix = part.matrix({role: row.numpy() for role, row in rows.items()})
                    found[part.name].setdefault(draw, []).append(matrix)
    return {name: np.stack([np.stack(rows) for rows in draws.values()]) for name, draws in found.items()}


def joined(stream):
    """{part: (draws, examples, *matrix)} of all batches."""
    every = list(stream)
    parts = {name: [batch[name].examples().swapaxes(1, 2) for batch in every] for name in every[0]}
    return {name: np.concatenate(part, 1) for name, part in parts.items()}, every


def check(got, want):
    assert set(got) == set(want)
    for name, g in got.items():
        np.testing.assert_allclose(g, want[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_streams_of_a_model(model, batches):
    """The loss's own gradients with their share of the mean, outputs, a margin; the same draws in every pass."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    before = [np.array(w) for w in model.get_weights()]
    stream = kt.Stream(model, loss, batches, fisher=kf.empirical)
    got, every = joined(stream)
    assert [batch["head"].n for batch in every] == [3, 3, 1]
    check(got, one_by_one(model, batches, lambda f, y: [loss(y, f)]))
    assert all(np.array_equal(w, old) for w, old in zip(model.get_weights(), before, strict=True))
    assert len(stream) == 3
    assert len(stream._traced) == 1
    assert "conv" in str(stream.coverage)
    drawn = kt.Stream(model, loss, batches, draws=2, seed=3)
    first, again = joined(drawn)[0], joined(drawn)[0]
    assert first["head"].shape[:2] == (2, 7)
    assert all(np.array_equal(g, again[name]) for name, g in first.items())
    batch = next(iter(batches))
    one, other = kt.Stream(model, loss, [batch, batch])
    assert not np.array_equal(one["head"].g, other["head"].g)  # another draw for another batch
    got, every = joined(kt.outputs(model, batches, select=lambda f: f[:, 1:]))
    want = one_by_one(model, batches, lambda f, y: [f[0, 1], f[0, 2]])
    check(got, want)
    P = kf.Posterior(kt.matrices(model), kf.fit(kf.KFAC(), drawn), 0.5)
    V = np.concatenate([np.asarray(P.covariance(records)) for records in every])
    solved = P.solve({name: g.reshape(2 * 7, *P.curvature.layers[name].shape) for name, g in want.items()})
    dense = sum(
        np.einsum("vbd,wbd->bvw", want[k].reshape(2, 7, -1), np.asarray(x).reshape(2, 7, -1)) for k, x in solved.items()
    )
    np.testing.assert_allclose(V, dense, rtol=1e-9, atol=1e-12)

    def margin(f, y):
        return tf.gather(f, y, axis=1, batch_dims=1) - tf.reduce_logsumexp(f, 1)

    check(joined(kt.measured(model, margin, batches))[0], one_by_one(model, batches, margin))


def test_what_streams_refuse(model, batches):
    with pytest.raises(ValueError, match=r"measure gave shape \(\)"):
        list(kt.measured(model, lambda f, y: tf.reduce_sum(f), batches))
    with pytest.raises(ValueError, match=r"outputs got a prediction of \(None,\).*give `select`"):
        list(kt.outputs(model, batches, select=lambda f: f[:, 0]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    nothing = [(np.zeros((2, 4, 4, 2)), np.array([-1, -1]))]
    with pytest.raises(ValueError, match="batch 0 has no records"):
        list(kt.Stream(model, loss, nothing))


def test_matrices_and_back(model):
    before = [v.numpy() for v in model.trainable_variables]
    found = kt.matrices(model)
    assert found["conv"].shape == (4, 9)
    kt.assign(model, {name: 2 * W for name, W in found.items()})
    for v, old in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(v.numpy(), 2 * old)
    with pytest.raises(ValueError, match=r"the model has no parts \['x'\]"):
        kt.assign(model, {"x": found["head"]})
    with pytest.raises(ValueError, match="part 'head' got a matrix of"):
        kt.assign(model, {"head": np.zeros((2, 2))})
