"""What Keras's own train_step hands to its optimizer, and what of that is the optimizer's: directions in its place."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double


class Centred(SGD):
    """Centres gradients on their way in."""

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(g - tf.reduce_mean(g, 0, keepdims=True), v) for g, v in grads_and_vars])


class Own(SGD):
    """A loss scale of its own, taken back where updates are made."""

    def scale_loss(self, loss):
        return 8.0 * loss

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient / 8.0, variable, learning_rate)


OPTIMIZERS = {
    "scaled": lambda: SGD(0.1, loss_scale_factor=128.0),
    "scaled, accumulated": lambda: SGD(0.1, loss_scale_factor=100.0, gradient_accumulation_steps=2, clipnorm=0.01),
    "a scale of its own": lambda: Own(0.1),
    "accumulated": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, gradient_accumulation_steps=3),
    "averaged": lambda: SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2, global_clipnorm=0.01),
    "gradients changed": lambda: Centred(0.1),
    "muon": lambda: keras.optimizers.Muon(0.01),
}


def network():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh"), L.Dense(3)])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fit", [False, True])
def test_an_optimizer_takes_directions_as_gradients_of_keras(make, fit, rng):
    """Without curvature steps are its own: loss scales, accumulation, averages and overridden methods."""
    x, y = rng.normal(size=(32, 4)), rng.integers(0, 3, 32)
    ours, plain = network(), network()
    plain.compile(make(), crossentropy())
    if fit:
        model = kt.KFACModel(ours, method=kf.Identity())
        model.compile(make(), crossentropy())
        step = model.train_on_batch
    else:
        step = kt.Optimizer(ours, crossentropy(), make(), method=kf.Identity()).step
    for _ in range(7):
        step(x, y)
        plain.train_on_batch(x, y)
    for one, other in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


def test_a_scale_of_the_loss_changes_no_step_with_curvature(rng):
    x, y = rng.normal(size=(32, 4)), rng.integers(0, 3, 32)
    found = []
    for factor in (None, 128.0):
        net = network()
        step = kt.Optimizer(net, crossentropy(), SGD(0.1, loss_scale_factor=factor), fisher=kf.type2)
        for _ in range(2):
            step.step(x, y)
        found.append(np.concatenate(net.get_weights(), None))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_a_loss_that_knows_no_training_is_asked_as_keras_asks(rng):
    """Overrides written before Keras had the argument."""

    class Older(kt.KFACModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return super().compute_loss(x, y, y_pred, sample_weight)

    x, y = rng.normal(size=(32, 4)), rng.integers(0, 3, 32)
    found = []
    for kind in (kt.KFACModel, Older):
        model = kind(network())
        model.compile(SGD(0.1), crossentropy())
        model.fit(x, y, verbose=0)
        found.append(np.concatenate(model.get_weights(), None))
    np.testing.assert_array_equal(*found)


def test_variables_beside_the_inner_model_that_move_the_loss_are_refused(rng):
    """They would never be trained; a copy that is kept beside, as of averaged weights, moves nothing."""

    class Beside(kt.KFACModel):
        def __init__(self, model, **settings):
            super().__init__(model, **settings)
            self.temperature = self.add_weight(shape=(), name="temperature")
            self.averaged = keras.models.clone_model(model)
            self.tempered = False

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + self.temperature**2 if self.tempered else loss

    x, y = rng.normal(size=(8, 4)), np.arange(8) % 3
    for tempered in (False, True):
        model = Beside(network())
        model.tempered = tempered
        model.compile(SGD(0.1), crossentropy())
        if not tempered:
            model.train_on_batch(x, y)
            continue
        with pytest.raises(ValueError, match=r"the loss is made of \['[\w/]*temperature'\], which are no variables of"):
            model.train_on_batch(x, y)
