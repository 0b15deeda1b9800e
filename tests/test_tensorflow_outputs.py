"""Models of several outputs whose names are one, or are not the keys that they are returned by: Keras goes by place."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from tf_shared import SGD, L, crossentropy, keras, kt
from tf_shared import double as double

MSE = keras.losses.MeanSquaredError


def trained(make, loss, shell, x, y, **options):
    """(loss, weights) after one update."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    net = make()
    schedules = kf.Schedules(1e-2, 0.0)
    if shell == "fit":
        model = kt.KFACModel(net, fisher=kf.type2, schedules=schedules)
        model.compile(SGD(1.0), loss, **options)
        value = float(np.ravel(model.train_on_batch(x, y))[0])
    else:
        value = float(kt.Optimizer(net, loss, SGD(1.0), fisher=kf.type2, schedules=schedules).step(x, y))
    return value, net.get_weights()


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for found, want in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shell", ["fit", "step"])
@pytest.mark.parametrize("many", [False, True], ids=["one loss", "a list"])
def test_one_head_called_twice(many, shell, double, rng):
    """Siamese networks: both outputs bear the head's name."""
    x = [rng.normal(size=(6, 4)), rng.normal(size=(6, 4))]
    y = [rng.integers(3, size=6), rng.integers(3, size=6)]

    def make(apart):
        i, j = keras.Input((4,)), keras.Input((4,))
        trunk, head = L.Dense(5, "tanh"), L.Dense(3, name="f")
        outputs = [head(trunk(i)), head(trunk(j))]
        return keras.Model(
            [i, j], [L.Identity(name=n)(o) for n, o in zip("lr", outputs, strict=True)] if apart else outputs
        )

    def loss():
        return [crossentropy(), crossentropy()] if many else crossentropy()

    same(trained(lambda: make(False), loss(), shell, x, y), trained(lambda: make(True), loss(), shell, x, y))


@pytest.mark.parametrize("shell", ["fit", "step"])
def test_a_part_with_two_outputs(shell, double, rng):
    """A model inside another: both outputs bear its name."""
    x, y = rng.normal(size=(6, 4)), [rng.integers(3, size=6), rng.normal(size=(6, 2))]

    def make(wrapped):
        i = keras.Input((4,))
        h = L.Dense(5, "tanh")(i)
        net = keras.Model(i, [L.Dense(3, name="f")(h), L.Dense(2, name="g")(h)])
        if not wrapped:
            return net
        j = keras.Input((4,))
        return keras.Model(j, net(L.Rescaling(1.0)(j)))

    found = [trained(lambda w=w: make(w), [crossentropy(), MSE()], shell, x, y) for w in (True, False)]
    same(*found)


def returned(keys):
    """Outputs by keys; the layers have other names."""
    i = keras.Input((4,))
    h = L.Dense(5, "tanh")(i)
    return keras.Model(i, {keys[0]: L.Dense(3, name="p")(h), keys[1]: L.Dense(2, name="q")(h)})


@pytest.mark.parametrize("weights", [None, [1.0, 0.5]])
def test_outputs_in_a_dict_go_by_their_keys(weights, double, rng):
    """Lists of losses and weights are read in the order of the keys, as by Keras."""
    x = rng.normal(size=(6, 4))
    y = {"b": rng.integers(3, size=6), "a": rng.normal(size=(6, 2))}
    by_key = None if weights is None else dict(zip("ab", weights, strict=True))
    want = trained(lambda: returned("ba"), {"b": crossentropy(), "a": MSE()}, "fit", x, y, loss_weights=by_key)
    same(trained(lambda: returned("ba"), [MSE(), crossentropy()], "fit", x, y, loss_weights=weights), want)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")  # Keras's own
def test_a_head_with_weight_zero_is_one_without_a_loss(double, rng):
    x = rng.normal(size=(6, 4))
    y = {"b": rng.integers(3, size=6), "a": rng.normal(size=(6, 2))}
    both = {"b": crossentropy(), "a": MSE()}
    want = trained(lambda: returned("ba"), both | {"a": None}, "fit", x, y)
    same(trained(lambda: returned("ba"), both, "fit", x, y, loss_weights={"b": 1.0, "a": 0.0}), want)
    with pytest.raises(ValueError, match=r"none of the outputs .* has a loss"):
        trained(lambda: returned("ba"), both, "fit", x, y, loss_weights={"b": 0.0, "a": 0.0})


class Returned(keras.Model):
    """What it returns only a batch shows."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.inner = L.Dense(5, "tanh")
        self.second = L.Dense(3)  # weights in the order of the keys, as of a functional model
        self.first = L.Dense(3)

    def call(self, x):
        h = self.inner(x)
        p, q = self.first(h), self.second(h)
        return {"tuple": (p, q), "list": [p, q], "dict": {"z": p, "b": q}}[self.kind]


@pytest.mark.parametrize("shell", ["fit", "step"])
@pytest.mark.parametrize("many", [False, True], ids=["one loss", "a list"])
@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_outputs_that_only_a_batch_shows(kind, many, shell, double, rng):
    """One loss is each output's, a list goes by the sorted keys of a dict, as by Keras."""
    x, p, q = rng.normal(size=(6, 4)), rng.integers(3, size=6), rng.normal(size=(6, 3))
    q = q if many else rng.integers(3, size=6)
    y = {"z": p, "b": q} if kind == "dict" else (p, q)
    losses = {"z": crossentropy(), "b": MSE() if many else crossentropy()}
    given = [losses[key] for key in ("bz" if kind == "dict" else "zb")] if many else crossentropy()

    def make(functional):
        i = keras.Input((4,))
        h = L.Dense(5, "tanh")(i)
        net = keras.Model(i, {"z": L.Dense(3)(h), "b": L.Dense(3)(h)}) if functional else Returned(kind)
        net(x)
        net.set_weights([np.cos(np.arange(v.size)).reshape(v.shape) for v in net.get_weights()])
        return net

    want = trained(lambda: make(True), losses, shell, x, {"z": p, "b": q})
    same(trained(lambda: make(False), given, shell, x, y), want)


@pytest.mark.parametrize("weights", [None, 0.5])
def test_one_loss_of_outputs_that_only_a_batch_shows_is_that_of_keras(weights, double, rng):
    x, y = rng.normal(size=(6, 4)), (rng.integers(3, size=6), rng.integers(3, size=6))
    keras.utils.set_random_seed(1)
    net = Returned("tuple")
    net.compile(SGD(0.1), crossentropy(), loss_weights=weights)
    want = net.fit(x, y, batch_size=6, epochs=2, verbose=0).history["loss"]
    keras.utils.set_random_seed(1)
    model = kt.KFACModel(Returned("tuple"), method=kf.Identity())
    model.compile(SGD(0.1), crossentropy(), loss_weights=weights)
    found = model.fit(x, y, batch_size=6, epochs=2, verbose=0).history["loss"]
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_records_go_by_the_names_of_outputs(rng):
    """Losses in a dict of another order than that of the outputs, which are a list."""
    x, y = rng.normal(size=(6, 4)), {"a": rng.normal(size=(6, 2)), "b": 5 * rng.normal(size=(6, 2))}
    i = keras.Input((4,))
    net = keras.Model(i, [L.Dense(2, name=name)(i) for name in "ab"])
    found = [kt.records(net, x, y, {name: MSE() for name in names}, fisher=kf.empirical) for names in ("ab", "ba")]
    for name in "ab":
        want = net(x)[name == "b"].numpy() - y[name]  # the loss is the mean over two outputs
        for one in found:
            g = np.asarray(one[name].g).reshape(6, 2)
            np.testing.assert_allclose(g, want, rtol=1e-10)
