"""Training with the TensorFlow adapter: the own loop, Keras `fit`, saving, files of other frameworks, the examples."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn
from tf_shared import SAVES, SGD, L, crossentropy, keras, kt, tf
from tf_shared import double as double

pytestmark = SAVES
EXAMPLES = Path(kt.__file__).with_name("examples")
CLOCKS = {"clocks": kf.Clocks(2, 4), "schedules": kf.Schedules(0.05, 0.9)}


class Sorted(L.Layer):
    """A gain whose largest entry goes first: no product, sum, look-up or convolution."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), name="gain", initializer="normal")

    def call(self, x):
        return x * tf.math.top_k(self.gain, x.shape[-1]).values


def network(seed=3):
    """Three dense layers, the same weights every time."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((4,)), L.Dense(6, "tanh", name="a"), L.Dense(5, "relu", name="b"), L.Dense(3, name="c")]
    )


def data(count=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 4))
    return x, (x @ rng.normal(size=(4, 3))).argmax(1)


def weights(model):
    return np.concatenate([v.numpy().ravel() for v in model.trainable_variables])


def compiled(optimizer=None, loss=None, **settings):
    model = kt.KFACModel(network(), **{**CLOCKS, **settings})
    model.compile(optimizer or SGD(0.1), loss or crossentropy(), metrics=["accuracy"])
    return model


def fitted(model, epochs=2, **options):
    return model.fit(*data(), batch_size=10, epochs=epochs, shuffle=False, verbose=0, **options)


def test_fit_in_a_graph_trains_counts_and_evaluates():
    model = compiled()
    before = model.evaluate(*data(), verbose=0, return_dict=True)
    history = fitted(model, 10, validation_data=data()).history
    after = model.evaluate(*data(), verbose=0, return_dict=True)
    assert not model.run_eagerly
    assert not model.jit_compile
    assert model.engine.state.step == 40
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert history["val_loss"][-1] == pytest.approx(after["loss"])
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > 0.8
    assert model.engine.info.counts() == {kf.Code.OK: 3}


def test_fit_eager_fit_and_the_own_loop_are_one():
    graph, eager = compiled(), compiled()
    fitted(graph)
    eager.run_eagerly = True
    fitted(eager)
    net = network()
    ours = kt.Optimizer(net, crossentropy(), SGD(0.1), **CLOCKS)
    x, y = data()
    for i in range(8):
        rows = slice(10 * (i % 4), 10 * (i % 4) + 10)
        ours.step(x[rows], y[rows])
    np.testing.assert_allclose(weights(graph.inner), weights(net), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(weights(eager.inner), weights(net), rtol=1e-10, atol=1e-12)
    again = compiled()
    fitted(again)
    assert np.array_equal(weights(again), weights(graph))
    other = compiled(seed=1)
    fitted(other)
    assert np.abs(weights(other) - weights(graph)).max() > 1e-4


def test_fit_builds_what_was_not_built():
    model = kt.KFACModel(keras.Sequential([L.Dense(6, "tanh"), L.Dense(3)]), **CLOCKS)
    model.compile(SGD(0.1), crossentropy())
    losses = fitted(model, 5).history["loss"]
    assert losses[-1] < losses[0]
    assert model.engine.state.step == 20


def test_several_inputs_and_class_weights():
    """A weight on a class is that weight on its examples."""
    x, y = data()
    found = []
    for given in ({"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}}, {"sample_weight": np.array([1.0, 2.0, 0.5])[y]}):
        keras.utils.set_random_seed(1)
        one, two = keras.Input((4,), name="one"), keras.Input((2,), name="two")
        net = keras.Model({"one": one, "two": two}, L.Dense(3)(L.Concatenate()([one, L.Dense(2)(two)])))
        model = kt.KFACModel(net, **CLOCKS)
        model.compile(SGD(0.1), crossentropy())
        model.fit({"one": x, "two": x[:, :2]}, y, batch_size=10, shuffle=False, verbose=0, **given)
        found.append(weights(net))
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-8)


def test_metrics_of_an_epoch_are_those_of_keras():
    """With a rate of 0 nothing moves, so fit must report what evaluate does."""
    model = compiled(SGD(0.0))
    want = model.evaluate(*data(), verbose=0, return_dict=True)
    got = fitted(model, 1).history
    assert {name: got[name][0] for name in want} == pytest.approx(want)


def test_callbacks_work(tmp_path):
    rates = []
    calls = [
        keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.1 / (1 + epoch)),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="loss", save_best_only=True),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate))
        ),
        keras.callbacks.EarlyStopping(monitor="loss", min_delta=1e9, patience=2),
    ]
    model = compiled()
    fitted(model, 9, callbacks=calls)
    assert rates == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert keras.models.load_model(tmp_path / "best.keras").predict(data()[0], verbose=0).shape == (40, 3)


def test_a_short_last_batch_is_traced_once_more_at_most():
    traces = []

    class Counted(kt.KFACModel):
        def train_step(self, data):
            traces.append(data)
            return super().train_step(data)

    model = Counted(network(), **CLOCKS)
    model.compile(SGD(0.1), crossentropy())
    model.fit(*data(25), batch_size=10, epochs=4, verbose=0)
    assert len(traces) <= 2
    assert model.engine.state.step == 12


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: SGD(0.05, momentum=0.9), {}),
        (lambda: keras.optimizers.Adam(0.01), {"method": kf.EKFAC()}),
        (lambda: SGD(1.0), {"step": kf.SelfTuning()}),
    ],
    ids=["sgd", "adam", "self-tuning"],
)
def test_saved_models_train_on_where_they_stopped(make, options, tmp_path):
    whole, first = compiled(make(), **options), compiled(make(), **options)
    fitted(whole, 4)
    fitted(first, 2)
    first.save(tmp_path / "model.keras")
    then = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(then, kt.KFACModel)
    assert np.array_equal(weights(then), weights(first))
    fitted(then, 2)
    assert then.engine.state.step == whole.engine.state.step
    np.testing.assert_allclose(weights(then), weights(whole), rtol=1e-12, atol=1e-13)


def test_saved_weights_bring_the_curvature_along(tmp_path):
    first, then = compiled(), compiled()
    fitted(first)
    first.save_weights(tmp_path / "it.weights.h5")
    fitted(then, 1)
    then.load_weights(tmp_path / "it.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(leaves(then), leaves(first), strict=True))
    fitted(first, 1)
    fitted(then, 1)
    assert np.array_equal(weights(then), weights(first))


def leaves(model):
    return [np.asarray(leaf) for leaf in kf.tree.leaves(model.engine.state)]


def test_settings_kfaccore_does_not_know_cannot_be_saved(tmp_path):
    schedule = kf.Schedules(damping=lambda step: 0.1)
    model = compiled(schedules=schedule)
    with pytest.raises(ValueError, match=r"cannot be saved with a model|is not kfaccore's own"):
        model.save(tmp_path / "model.keras")


def test_xla_is_left_out_with_a_warning():
    model = kt.KFACModel(network())
    with pytest.warns(UserWarning, match="Proceeding with `jit_compile=False`"):
        model.compile(SGD(0.1), crossentropy(), jit_compile=True)
    fitted(model, 1)


def test_any_keras_optimizer_applies_the_directions():
    """One step of each on directions that are the gradients is the step of that optimizer."""
    x, y = data(10)
    kinds = [
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: SGD(0.1, momentum=0.9, nesterov=True, clipnorm=0.01),
        lambda: keras.optimizers.Lion(0.01),
    ]
    for make in kinds:
        ours, plain = network(), network()
        step = kt.Optimizer(ours, crossentropy(), make(), method=kf.Identity())
        plain.compile(make(), crossentropy())
        for _ in range(3):
            step.step(x, y)
            plain.train_on_batch(x, y)
        np.testing.assert_allclose(weights(ours), weights(plain), rtol=1e-9, atol=1e-11)


def test_frozen_layers_stay_and_regularisers_count():
    def made():
        net = network()
        net.layers[0].trainable = False
        net.layers[1].kernel_regularizer = keras.regularizers.L2(0.3)
        return net

    x, y = data(10)
    ours, plain = made(), made()
    optimizer = kt.Optimizer(ours, crossentropy(), SGD(0.1), method=kf.Identity())
    plain.compile(SGD(0.1), crossentropy())
    assert float(optimizer.step(x, y)) == pytest.approx(plain.train_on_batch(x, y))
    np.testing.assert_allclose(weights(ours), weights(plain), rtol=1e-9, atol=1e-11)
    assert list(optimizer.engine.plan.blocks()) == ["b", "c"]


def test_layers_may_be_frozen_later_and_thawed():
    """Frozen ones keep their curvature; with a thawed one all of it begins anew, once compiled again."""
    model = compiled()
    model.inner.layers[0].trainable = False
    fitted(model, 1)
    before = weights(model.inner.layers[1])
    model.inner.layers[1].trainable = False
    model.compile(SGD(0.1), crossentropy())
    fitted(model, 1)
    assert np.array_equal(model.inner.layers[1].get_weights()[0].ravel(), before[: 6 * 5])
    assert model.engine.state.step == 8
    model.inner.layers[0].trainable = True
    first = model.inner.layers[0].get_weights()[0]
    model.compile(SGD(0.1), crossentropy())
    fitted(model, 1)
    assert model.engine.state.step == 4
    assert not np.array_equal(model.inner.layers[0].get_weights()[0], first)
    net = network()
    net.layers[0].trainable = False
    ours = kt.Optimizer(net, crossentropy(), SGD(0.1))
    ours.step(*data())
    net.layers[0].trainable = True
    with pytest.raises(ValueError, match=r"what is trained has changed.*a/kernel.*make a new Optimizer"):
        ours.step(data()[0][:7], data()[1][:7])


def test_a_saved_model_may_be_thawed(tmp_path):
    """Its curvature is of fewer layers: it begins anew, and says so."""
    model = compiled()
    model.inner.layers[0].trainable = False
    fitted(model, 1)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    model.inner.layers[0].trainable = True
    model.compile(SGD(0.1), crossentropy())
    with pytest.warns(UserWarning, match=r"\['a'\] are trained now and were not"):
        fitted(model, 1)
    assert model.engine.state.step == 4


def test_a_saved_model_may_be_frozen(tmp_path):
    """It trains on as the one that was not saved."""
    model = compiled()
    fitted(model, 1)
    model.save(tmp_path / "model.keras")
    found = []
    for one in (model, keras.saving.load_model(tmp_path / "model.keras")):
        one.inner.layers[0].trainable = False
        one.compile(SGD(0.1), crossentropy())
        fitted(one, 1)
        found.append(one.inner.get_weights())
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_another_loss_may_be_compiled():
    model = kt.KFACModel(network(), **CLOCKS)
    model.compile(SGD(0.1), crossentropy())
    fitted(model, 1)
    model.compile(SGD(0.1), keras.losses.MeanSquaredError())
    x, y = data()
    model.fit(x, np.eye(3)[y], verbose=0)
    assert isinstance(model.engine.objective.core, kf.Gaussian)


def test_uncovered_variables_move_by_their_gradients():
    def made():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), L.Dense(5), Sorted(name="sorted"), L.Dense(3)])

    x, y = data(10)
    ours, plain = made(), made()
    with pytest.warns(UserWarning, match=r"sorted: it goes into TopKV2.*strict=True makes that an error"):
        optimizer = kt.Optimizer(ours, crossentropy(), SGD(0.1), method=kf.Identity())
    optimizer.step(x, y)
    plain.compile(SGD(0.1), crossentropy())
    plain.train_on_batch(x, y)
    for got, want in zip(ours.layers[1].get_weights(), plain.layers[1].get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_weighted_examples_count_as_often(rng):
    """An example of weight 2 is that example twice, the normaliser being the number of rows."""
    x, y = data(4)
    w, twice = np.array([2.0, 1.0, 1.0, 0.0]), [0, 0, 1, 2]
    found = []
    for rows, weight in ((slice(None), w), (twice, None)):
        net = network()
        options = {"fisher": kf.type2, "schedules": kf.Schedules(0.1, 0.0)}
        value = kt.Optimizer(net, crossentropy(), SGD(0.1), method=kf.Exact(), **options).step(x[rows], y[rows], weight)
        found.append((float(value), weights(net)))
    assert found[0][0] == pytest.approx(found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


def test_masked_sequences_ignore_their_padding():
    def made():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((5,), dtype="int32"), L.Embedding(7, 4, mask_zero=True), L.Dense(3)])

    x, y = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 1, 2]]), np.array([[0, 1, 2, 0, 0], [1, 1, 0, 2, 2]])
    found = []
    for padding in (0, 2):
        net = made()
        step = kt.Optimizer(net, crossentropy(), SGD(0.1), method=kf.Exact(), fisher=kf.type2, **CLOCKS)
        step.step(x, np.where(x == 0, padding, y))
        found.append(weights(net))
    assert np.array_equal(*found)


def test_masked_positions_have_no_curvature():
    """Type-2 draws over n are the Hessian of Keras's masked mean, by differentiating it twice."""
    net = keras.Sequential(
        [keras.Input((5,), dtype="int32"), L.Embedding(7, 4, mask_zero=True), L.Dense(3, name="out")]
    )
    x, y = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 1, 2]]), np.array([[0, 1, 2, 0, 0], [1, 1, 0, 2, 2]])
    record = kt.records(net, x, y, crossentropy(), fisher=kf.type2)["out"]
    f = net(x)
    mask, flat = f._keras_mask, tf.Variable(f)

    def loss(f):
        f = tf.reshape(f, (2, 5, 3))
        f._keras_mask = mask
        return crossentropy()(y, f)

    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            value = loss(flat)
        first = inner.gradient(value, flat)
    H = np.einsum("bsobpq->bsopq", outer.jacobian(first, flat).numpy())
    np.testing.assert_allclose(np.einsum("vbso,vbpq->bsopq", record.g[:, 0], record.g[:, 0]) / record.n, H, atol=1e-12)
    assert not np.any(record.g[:, :, 0, 3:])


def test_what_is_taken_back_is_what_was_there():
    from kfaccore_tensorflow.judge import _between

    old, new = tf.constant([1.0, 2.0]), tf.constant([np.inf, 3.0])
    assert _between(old, new, tf.constant(0.0)).numpy().tolist() == [1.0, 2.0]
    assert _between(old, new, tf.constant(0.5)).numpy().tolist() == [np.inf, 2.5]


def test_a_failing_call_leaves_no_trace():
    class Failing(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(3, "tanh")

        def call(self, x):
            self.dense(x)
            raise RuntimeError("no")

    whole = Failing()
    dense = whole.dense
    with pytest.raises(RuntimeError, match="no"):
        kt.records(whole, *data(), crossentropy())
    assert all("call" not in vars(layer) for layer in (dense, whole))


def test_records_are_drawn_when_the_clock_wants_them():
    net = network()
    optimizer = kt.Optimizer(net, crossentropy(), SGD(0.1), clocks=kf.Clocks(3, 3))
    updated = []
    for _ in range(7):
        optimizer.step(*data(10))
        updated.append(optimizer.info.updated)
    assert updated == [True, False, False] * 2 + [True]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_half_precision_trains_with_curvature_in_single(policy):
    keras.config.set_dtype_policy(policy)
    try:
        net = network()
    finally:
        keras.config.set_dtype_policy("float64")
    loss, (x, y) = kf.SoftmaxCrossEntropy(), data()
    found = kt.records(net, x, y, loss)
    assert {(r.rows().dtype, r.g.dtype) for r in found.values()} == {(np.dtype("f4"), np.dtype("f4"))}
    optimizer = kt.Optimizer(net, loss, SGD(0.3), **CLOCKS)
    losses = [float(optimizer.step(x, y)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert {leaf.dtype for leaf in map(np.asarray, kf.tree.leaves(optimizer.engine.state.layers["a"].A))} == {
        np.dtype("f4")
    }


def test_a_non_finite_batch_is_a_code_and_moves_nothing():
    net = network()
    optimizer = kt.Optimizer(net, crossentropy(), SGD(0.1), **CLOCKS)
    x, y = data(10)
    optimizer.step(x, y)
    before = weights(net)
    optimizer.step(np.where(np.arange(4) == 1, np.nan, x), y)
    assert optimizer.info.counts() == {kf.Code.NONFINITE: 3}
    assert np.array_equal(weights(net), before)
    optimizer.step(x, y)
    assert np.all(np.isfinite(weights(net)))


def numpy_steps(net, params, state, steps, pre):
    for i in steps:
        x, y = batch(i)
        _, state, _ = kn.step(
            net, params, (x, y), kf.SoftmaxCrossEntropy(), pre, state, i, np.random.default_rng([5, i])
        )
    return state


def batch(i):
    rng = np.random.default_rng([1, i])
    x = rng.normal(size=(16, 4))
    return x, np.abs(x[:, :3]).argmax(1)


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()], ids=["kfac", "ekfac"])
def test_one_file_goes_from_numpy_to_tensorflow_and_back(method, tmp_path):
    """50 steps each in NumPy, TensorFlow, NumPy are 150 in NumPy."""
    net = kn.Sequential((4,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
    options = {"clocks": kf.Clocks(2, 5), "schedules": kf.Schedules(0.1, 0.9)}
    pre = kf.Preconditioner(method, step=kf.Fixed(0.05), **options)
    start = net.init(np.random.default_rng(2), np.asarray)
    whole, mine = dict(start), dict(start)
    numpy_steps(net, whole, pre.init(net.blocks(), np.zeros(1)), range(150), pre)
    state = numpy_steps(net, mine, pre.init(net.blocks(), np.zeros(1)), range(50), pre)
    kf.save(tmp_path / "one", {"params": mine, "state": state})
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, "tanh", name="dense0"), L.Dense(3, name="dense2")])
    ours = kt.Optimizer(model, kf.SoftmaxCrossEntropy(), SGD(0.05), method=method, seed=5, **options)
    ours.load(tmp_path / "one")
    for i in range(50, 100):
        ours.step(*batch(i))
    ours.save(tmp_path / "two", task="there and back")
    assert kf.metadata(tmp_path / "two")["task"] == "there and back"
    tree = kf.load(tmp_path / "two", like={"params": mine, "state": state})
    assert tree["state"].step == 100
    numpy_steps(net, tree["params"], tree["state"], range(100, 150), pre)
    for name, W in whole.items():
        np.testing.assert_allclose(tree["params"][name], W, rtol=1e-8, atol=1e-8)


RULES = {
    "self-tuning": ({"step": kf.SelfTuning()}, None, {}),
    "that is taken back": ({"step": kf.SelfTuning(tolerance=-0.02)}, None, {}),
    "line search": ({"step": kf.LineSearch(cap=8.0)}, None, {}),
    "penalty": ({"step": kf.SelfTuning()}, None, {"l2": 0.03}),
    "penalty and rate": ({"step": kf.Fixed(0.05, 0.9)}, SGD, {"l2": 0.03}),
    "decay": ({"step": kf.Fixed(0.05)}, SGD, {"weight_decay": 0.3}),
    "decay and line search": ({"step": kf.LineSearch()}, None, {"weight_decay": 0.3}),
}


@pytest.mark.parametrize(("rule", "plain", "numbers"), RULES.values(), ids=RULES)
def test_steps_of_every_rule_are_those_of_the_numpy_network(rule, plain, numbers):
    net = kn.Sequential((4,), (kn.Dense(6), kn.Tanh(), kn.Dense(3)))
    options = {"clocks": kf.Clocks(1, 3), "schedules": kf.Schedules(0.1, 0.9, **numbers)}
    params, loss = net.init(np.random.default_rng(2), np.asarray), kf.SoftmaxCrossEntropy()
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, "tanh", name="dense0"), L.Dense(3, name="dense2")])
    ours = kt.Optimizer(model, loss, plain and plain(1.0), seed=5, **options, **rule)
    pre = kf.Preconditioner(kf.KFAC(), **options, **rule)
    state = pre.init(net.blocks(), np.zeros(1))
    ours.engine.replant({"params": params, "state": ours.engine.state})
    for i in range(12):
        noise = np.random.default_rng([5, i])
        value, state, info = kn.step(net, params, batch(i), loss, pre, state, i, noise)
        assert float(ours.step(*batch(i))) == pytest.approx(value, rel=1e-10)
        for name, number in info.step.items():
            assert float(ours.info.step[name]) == pytest.approx(float(number), rel=1e-8, abs=1e-12), name
    found = ours.engine.tree()
    for name, W in params.items():
        np.testing.assert_allclose(found["params"][name], W, rtol=1e-10, atol=1e-10)
    assert getattr(found["state"].motion, "rejected", 0) == getattr(state.motion, "rejected", 0)


@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize("clocks", [kf.Clocks(1, 2), kf.Clocks(3, 3)])
def test_self_tuned_fit_is_the_own_loop_even_many_steps_a_graph(several, clocks):
    loss, net = crossentropy(), network()
    model = kt.KFACModel(network(), step=kf.SelfTuning(tolerance=-0.06), clocks=clocks)
    model.compile(SGD(1.0), loss, steps_per_execution=several)
    fitted(model, 3)
    ours = kt.Optimizer(net, loss, step=kf.SelfTuning(tolerance=-0.06), clocks=clocks)
    x, y = data()
    for i in range(12):
        rows = slice(10 * (i % 4), 10 * (i % 4) + 10)
        ours.step(x[rows], y[rows])
    assert ours.engine.state.motion.rejected > 0
    assert model.engine.state.motion.rejected == ours.engine.state.motion.rejected
    np.testing.assert_allclose(weights(model.inner), weights(net), rtol=1e-9, atol=1e-11)


def test_fit_takes_many_steps_a_graph():
    """The clock is asked between steps, and each step sees what the one before it left."""
    one, many = compiled(clocks=kf.Clocks(3, 3)), compiled(clocks=kf.Clocks(3, 3))
    many.compile(SGD(0.1), crossentropy(), steps_per_execution=4)
    fitted(one, 3)
    fitted(many, 3)
    assert many.engine.state.step == 12
    np.testing.assert_allclose(weights(many), weights(one), rtol=1e-10, atol=1e-12)


def test_a_step_goes_through_no_foreign_memory(monkeypatch):
    def never(*args):
        raise AssertionError("memory of another library reached TensorFlow")

    monkeypatch.setattr(tf.experimental.dlpack, "from_dlpack", never)
    ours = kt.Optimizer(network(), crossentropy())
    before = weights(ours.model)
    ours.step(*data(10))
    assert np.abs(weights(ours.model) - before).max() > 0


def test_files_of_other_layers_are_refused(tmp_path):
    ours = kt.Optimizer(network(), crossentropy())
    kf.save(tmp_path / "other", {"params": {"x": np.ones((2, 2))}, "state": {}})
    with pytest.raises(ValueError, match="params"):
        ours.load(tmp_path / "other")


def test_records_pass_through_a_file(tmp_path):
    net = network()
    found = kt.records(net, *data(6), crossentropy(), fisher=kf.type2)
    kf.save(tmp_path / "records", {name: {"a": r.a, "g": r.g} for name, r in found.items()})
    for name, back in kf.load(tmp_path / "records").items():
        want = kf.direction(found[name], ones(found[name]))
        again = kf.Record(back["a"], back["g"], found[name].n)
        np.testing.assert_array_equal(kf.direction(again, ones(again)), want)


def ones(record):
    block = kf.Block.of(record)
    return np.ones((block.blocks, block.d_out, block.d_in))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_and_are_short(path):
    keras.config.set_floatx("float32")
    assert len(path.read_text().splitlines()) < 40
    main = runpy.run_path(str(path))["main"]
    if path.stem == "keras_fit":
        assert main(epochs=8, count=600) > 0.8
    else:
        losses = main(steps=40)
        assert np.mean(losses[-5:]) < 0.8 * losses[0]
