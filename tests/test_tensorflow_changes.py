"""What changes after the plan was made, and what the plan has no curvature for: told, never silently plain."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


class Model(keras.Model):
    """Layers behind each other, on inputs of any shape."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = inner

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def recurrent():
    return Model(L.LSTM(3, name="it"), L.Dense(2))


def dilated():
    return Model(L.Conv1D(3, 3, dilation_rate=2, padding="same", name="it"), L.GlobalAveragePooling1D(), L.Dense(2))


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("make", [recurrent, dilated])
def test_batches_in_which_a_part_cannot_be_read_are_refused_by_name(make, judged, rng):
    """Its curvature would stay that of the first."""
    net = make()
    first, second = rng.normal(size=(4, 8, 3)), rng.normal(size=(4, 10, 3))
    net(first)
    step = kt.Optimizer(net, crossentropy(), None if judged else SGD(0.1))
    step.step(first, np.arange(4) % 2)
    step.step(first[:2], np.arange(2))  # fewer examples are no other shape
    with pytest.raises(ValueError, match=r"part '(it|it.lstm_cell)' \(.*kernel.*\) is not used as it was") as error:
        step.step(second, np.arange(4) % 2)
    assert "Give batches of one shape" in str(error.value)


class Aside(keras.Model):
    """A layer that reaches a loss of the model's own alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.aside = L.Dense(5, "tanh"), L.Dense(3), L.Dense(3, name="aside")

    def call(self, x):
        self.add_loss(tf.reduce_mean(tf.square(self.aside(x) - x[:, :3])))
        return self.b(self.a(x))


@pytest.mark.parametrize("settings", [{}, {"optimizer": SGD(0.1), "strict": True}], ids=["judged", "strict"])
def test_what_reaches_a_loss_of_the_model_alone_is_refused(settings, rng):
    net, x = Aside(), rng.normal(size=(6, 4))
    net(x)
    step = kt.Optimizer(net, crossentropy(), **settings)
    with pytest.raises(
        ValueError, match=r"aside/kernel', '.*aside/bias'\] have a gradient of the loss and no curvature"
    ):
        step.step(x, np.arange(6) % 3)


def test_what_reaches_a_loss_of_the_model_alone_is_named_once(rng):
    net, x = Aside(), rng.normal(size=(6, 4))
    net(x)
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    before = np.asarray(net.aside.kernel)
    with pytest.warns(UserWarning, match="aside/kernel.* have a gradient of the loss and no curvature"):
        step.step(x, np.arange(6) % 3)
    d = x @ before - x[:, :3]
    np.testing.assert_allclose(net.aside.kernel, before - 0.1 * 2 * x.T @ d / d.size, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.step(np.concatenate([x, x]), np.arange(12) % 3)


def frozen(thaw):
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, "tanh"), L.Dense(2)])
    net.layers[0].trainable = not thaw
    return net


def test_layers_may_be_frozen_between_two_steps_and_thawed_again(rng):
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 2, 8)
    net = frozen(thaw=False)
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    moved = []
    for trainable in (True, False, True):
        net.layers[0].trainable = trainable
        before = np.asarray(net.layers[0].kernel)
        step.step(x, y)
        moved.append(not np.array_equal(before, net.layers[0].kernel))
    assert moved == [True, False, True]


def test_a_layer_that_was_frozen_at_a_date_makes_up_for_it(rng):
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 2, 8)
    net = frozen(thaw=False)
    step = kt.Optimizer(net, crossentropy(), SGD(0.1), clocks=kf.Clocks(4, 12))
    updated, refreshed = [], []
    for i in range(15):
        net.layers[0].trainable = i not in (3, 4, 5, 11, 12)
        step.step(x, y)
        updated += [i] if step.info.updated else []
        refreshed += [i] if step.info.refreshed else []
    assert updated == [0, 4, 7, 8, 12, 14]  # it came by without records at 6 and at 13
    assert refreshed == [0, 12, 14]


@pytest.mark.parametrize("change", ["thawed", "adapters"])
def test_what_is_trained_since_the_plan_was_made_is_refused_by_name(change, rng):
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 2, 8)
    net = frozen(thaw=change == "thawed")
    step = kt.Optimizer(net, crossentropy(), SGD(0.1))
    step.step(x, y)
    if change == "thawed":
        net.layers[0].trainable = True
    else:
        net.layers[0].enable_lora(2)
    named = "kernel" if change == "thawed" else "lora_kernel_a"
    with pytest.raises(ValueError, match=f"what is trained has changed since the plan was made, at .*{named}"):
        step.step(x, y)


def test_a_model_of_which_nothing_is_trained_is_refused(rng):
    net = keras.Sequential([keras.Input((4,)), L.Dense(1)])
    step = kt.Optimizer(net, keras.losses.BinaryCrossentropy(from_logits=True), SGD(0.1))
    net.trainable = False
    with pytest.raises(ValueError, match=r"no variable of model 'sequential.*' is trainable now"):
        step.step(rng.normal(size=(8, 4)), np.ones((8, 1)))


def test_a_checkpoint_of_tensorflow_holds_the_curvature_too(rng, tmp_path):
    """Training goes on as without it, whether the new model has trained before or not."""
    x, y = rng.normal(size=(8, 5)), rng.integers(0, 3, 8)

    def made():
        inner = keras.Sequential([keras.Input((5,)), L.Dense(4, "tanh", name="a"), L.Dense(3, name="b")])
        model = kt.KFACModel(inner)
        model.compile(SGD(0.1), crossentropy())
        return model

    first = made()
    first.fit(x, y, epochs=2, verbose=0)
    where = tf.train.Checkpoint(model=first).save(str(tmp_path / "run"))
    first.fit(x, y, verbose=0)
    for trained in (False, True):
        second = made()
        if trained:
            second.fit(x, y, verbose=0)
        tf.train.Checkpoint(model=second).restore(where)
        second.fit(x, y, verbose=0)
        for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_file_of_a_convolution_goes_on_elsewhere(tmp_path):
    """NumPy's matrices, and with the blocks axis of torch's; 3 steps there and 3 here are 6 there."""
    import kfaccore_numpy as kn

    window = kf.Window((3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1))
    net = kn.Sequential((5, 4, 2), (kn.Conv2d(3, window), kn.Tanh(), kn.Flatten(), kn.Dense(3)))
    loss, method = kf.SoftmaxCrossEntropy(), (kf.KFAC(), kf.Clocks(1, 2), kf.Schedules(0.1, 0.9))
    pre = kf.Preconditioner(*method, step=kf.Fixed(0.05, 0.9))
    rng = np.random.default_rng(4)
    batches = [(rng.normal(size=(8, 5, 4, 2)), rng.integers(0, 3, 8)) for _ in range(6)]

    def steps(params, state, which):
        for i in which:
            given = batches[i], loss, pre, state, i, rng, kn.true_labels
            _, state, _ = kn.step(net, params, *given)
        return state

    start, path = net.init(np.random.default_rng(2), np.asarray), tmp_path / "x"
    whole, params = dict(start), dict(start)
    steps(whole, pre.init(net.blocks(), np.zeros(1)), range(6))
    state = steps(params, pre.init(net.blocks(), np.zeros(1)), range(3))
    for blocks in (False, True):
        kf.save(
            path, {"params": {**params, **({"conv2d0": params["conv2d0"][None]} if blocks else {})}, "state": state}
        )
        layers = [L.Conv2D(3, (3, 2), activation="tanh", name="conv2d0"), L.Flatten(), L.Dense(3, name="dense3")]
        model = keras.Sequential([keras.Input((5, 4, 2)), *layers])
        ours = kt.Optimizer(model, crossentropy(), SGD(1.0), core=pre, fisher=kf.empirical)
        ours.load(path)
        for x, y in batches[3:]:
            ours.step(x, y)
        ours.save(path)
        found = kf.load(path, like={"params": dict(start), "state": state})["params"]
        for name, W in whole.items():
            np.testing.assert_allclose(found[name], W, rtol=1e-10, atol=1e-12)


def test_a_transposed_convolution_of_torch_is_refused_by_name(tmp_path):
    path = tmp_path / "x"
    model = keras.Sequential([keras.Input((3, 2)), L.Conv1DTranspose(2, 3, 2, name="c"), L.Flatten(), L.Dense(3)])
    ours = kt.Optimizer(model, crossentropy(), SGD(1.0))
    ours.step(np.ones((4, 3, 2)), np.arange(4) % 3)
    ours.save(path)
    ours.load(path)
    tree = kf.load(path)
    kf.save(path, {**tree, "params": {**tree["params"], "c": tree["params"]["c"][None]}})
    with pytest.raises(ValueError, match=r"written by torch.*transposed convolutions.*\['c'\]"):
        ours.load(path)
