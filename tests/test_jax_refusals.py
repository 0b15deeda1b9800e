"""Models that are not covered, each with the exact reason in the table; and misuse of plan and capture."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import mlp, mlp_params, normal
from jax_needed import jax, jnp, kj, lax, optax

W, X = normal((4, 4)), normal((6, 4), seed=2)


@jax.custom_vjp
def by_hand(x, w):
    return x @ w


by_hand.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def carried(w, x):
    return lax.scan(lambda w, x: (0.9 * w, x @ w), w, x[None])[1][0]


REFUSED = {  # model of one leaf w (4, 4): the reason
    "cond": (lambda w, x: lax.cond(True, lambda w: x @ w, lambda w: x - w[0], w), "goes into: cond"),
    "custom_vjp": (lambda w, x: by_hand(x, w), "goes into: custom_vjp_call"),
    "squared": (lambda w, x: x @ (w * w), "goes into: mul of two leaves"),
    "normalised": (lambda w, x: x @ (w / jnp.linalg.norm(w)), "goes into: mul of two leaves"),
    "largest": (lambda w, x: x @ w + w.max(), "goes into: reduce_max"),
    "joined and squared": (lambda w, x: x @ jnp.concatenate([w, w], 1) ** 2, "goes into: integer_pow"),
    "exponential": (lambda w, x: x @ jnp.exp(w), "goes into: exp"),
    "penalty": (lambda w, x: x @ w + (w**2).sum(), "goes into: integer_pow"),
    "a half tied": (lambda w, x: jnp.tanh(x @ w) @ w[:2].T, "goes into: dense in two arrangements"),
    "tied and added": (lambda w, x: jnp.tanh(x @ w) @ w.T + w[0], "goes into: used as bias and dense"),
    "shared and owned": (
        lambda w, x: x @ w + jnp.ones(4) @ w @ w,
        "goes into: dense on rows of examples and on rows that all of them share",
    ),
    "scan carry": (carried, "goes into: scan as its carry"),
    "product of leaves": (lambda w, x: x @ (w @ w), "goes into: dot_general of two leaves"),
    "gathered columns": (lambda w, x: x @ w[:, jnp.array([2, 0])], "goes into: gather"),
    "sorted": (lambda w, x: x @ jnp.sort(w, 0), "goes into: sort"),
    "indexed by data": (
        lambda w, x: lax.dynamic_slice(w, (x[0, 0].astype(int), 0), (2, 4)) @ x[0] + x[:, :2],
        "goes into: dynamic_slice",
    ),
    "filter": (lambda w, x: jnp.fft.ifft(jnp.fft.fft(x) * w[0]).real, "goes into: complex convert_element_type"),
    "real and imaginary": (lambda w, x: (x @ lax.complex(w, w)).imag, "goes into: complex complex"),
    "complex mask": (lambda w, x: x @ (w * jnp.exp(1j * x[:4])).real, "goes into: complex convert_element_type"),
    "never used": (lambda w, x: x, "never used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_printed(name):
    apply, reason = REFUSED[name]
    plan = kj.plan(lambda p, x: apply(p["w"], x), {"w": W}, X)
    (row,) = plan.table
    assert row.reason == reason
    assert str(plan).split() == ["w", "(4,", "4)", "-", "NOT", *reason.split()]
    assert not plan.layers
    with pytest.raises(ValueError, match=r"leaves that are not covered:\nw \(4, 4\): "):
        kj.plan(lambda p, x: apply(p["w"], x), {"w": W}, X, strict=True)


def test_the_table_names_layers_and_biases():
    plan = kj.plan(mlp, mlp_params(), normal((6, 5)))
    assert str(plan).splitlines() == [
        "0.0  (5, 4)  dense  covered  1 call, with bias 0.1",
        "0.1  (4,)    bias   covered  1 call, of 0.0",
        "1.0  (4, 3)  dense  covered  1 call, with bias 1.1",
        "1.1  (3,)    bias   covered  1 call, of 1.0",
    ]


def test_a_refused_leaf_leaves_the_others_covered():
    def apply(p, x):
        return mlp(p["net"], x) + jnp.exp(p["odd"])

    plan = kj.plan(apply, {"net": mlp_params(), "odd": normal((3,))}, normal((6, 5)))
    assert set(plan.blocks) == {"net.0.0", "net.1.0"}


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"first axes \{(6, 5|5, 6)\}; need one batch"):
        kj.plan(lambda p, x, y: x @ p, W, X, normal((5, 4)), batched=(0, 1))
    with pytest.raises(TypeError, match="apply gave a tuple; need one array, a dict of arrays by head"):
        kj.plan(lambda p, x: (x @ p, x), W, X)
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions") as caught:
        kj.plan(lambda p, x: x @ p, W, normal((6, 3)))
    assert "plan traces apply at 6 and 12 examples" in caught.value.__notes__[-1]
    plan = kj.plan(lambda p, x: x @ p if x.ndim == 2 else x, W, X)
    with pytest.raises(ValueError, match="apply runs other layers than when it was planned"):
        kj.capture(plan, W, X[:, None])
    with pytest.raises(ValueError, match="that is no leaf of params"):
        kj.plan(lambda p, x, tap: tap.dense(x, 2 * p), W, X, explicit=True)


def test_the_batch_axis_is_where_the_batch_is():
    n, x = 6, normal((6, 4, 4), seed=4)
    minor = kj.plan(lambda p, x: (x.swapaxes(0, 1).reshape(-1, 4) @ p).reshape(4, -1, 4).sum(0), W, x)
    major = kj.plan(lambda p, x: (x.reshape(-1, 4) @ p).reshape(-1, 4, 4).sum(1), W, x)
    assert major.table[0].covered
    for plan in (minor, major):
        records = kj.capture(plan, W, x).records(jnp.ones((1, n, 4)), n)
        assert records["params"].a.shape == (1, 6, 4, 4)
        np.testing.assert_array_equal(records["params"].a[0], x)


def test_what_cannot_be_planned_is_named():
    with pytest.raises(ValueError, match="more rounds from 1626"):
        kj.plan(
            lambda p, x, key: x * jax.random.permutation(key, len(x))[:, None] @ p,
            W,
            jnp.ones((1000, 4)),
            jax.random.key(0),
        )
    with pytest.raises(ValueError, match=r"several leaves have the names \['a.b.c'\]"):
        kj.plan(lambda p, x: x @ p["a"]["b.c"] @ p["a.b"]["c"], {"a": {"b.c": W}, "a.b": {"c": W}}, X)
    with pytest.raises(TypeError, match="hold a float; need arrays with examples on their first axis"):
        kj.plan(lambda p, b: b["x"] @ p * b["s"], W, {"x": X, "s": 2.0})


def test_one_array_under_two_names_is_not_given_away():
    params = {"a": W, "b": W}
    step = kj.step(kj.plan(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, X), kf.Gaussian())
    with pytest.raises(ValueError, match="one array as a and as b"):
        step.init(params)


@jax.custom_vjp
def turned_by_rule(rows):
    return rows[::-1]


turned_by_rule.defvjp(lambda rows: (rows[::-1], None), lambda _, g: (g[::-1],))


MOVING = {
    "sorted": (lambda w, x: jnp.sort(x, 0) @ w, "sort"),
    "permuted by data": (lambda w, x: jnp.tanh(x[jnp.argsort(x[:, 0])]) @ w, "gather"),
    "reversed after": (lambda w, x: jnp.tanh(x @ w)[::-1], "rev"),
    "there and back": (lambda w, x: jnp.tanh(x[::-1] @ w)[::-1], "rev"),
    "rolled under jit": (lambda w, x: jax.jit(lambda x: jnp.roll(x, 1, 0) @ w)(x), "concatenate"),
    "added up": (lambda w, x: jnp.cumsum(x @ w, 0), "cumsum"),
    "smallest so far": (lambda w, x: lax.cummin(x @ w, axis=0), "cummin"),
    "turn by turn": (
        lambda w, x: lax.scan(lambda h, _: (h[::-1], jnp.tanh(h @ w)), x, None, length=2)[1].sum(0),
        "rev",
    ),
    "before turns that are examples": (lambda w, x: lax.map(jnp.tanh, x[::-1]) @ w, "rev"),
    "rolled in a branch": (
        lambda w, x: lax.cond(x[0, 0] > 9, lambda h: h, lambda h: jnp.roll(h, 1, 0), jnp.tanh(x @ w)),
        "slice",
    ),
    "turned in a loop": (
        lambda w, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.flip(c[1], 0)), (0, x))[1] @ w,
        "rev",
    ),
    "turned by a range": (lambda w, x: jnp.tanh(x @ w)[len(x) - 1 - jnp.arange(len(x)), 1:], "gather"),
    "halves": (lambda w, x: sum(jnp.split(x @ w, 2)).repeat(2, 0), "split"),
}


@pytest.mark.parametrize("name", MOVING)
def test_examples_that_leave_their_places_are_refused(name):
    apply, primitive = MOVING[name]
    (row,) = kj.plan(lambda p, x: apply(p["w"], x), {"w": W}, X).table
    assert row.reason == f"goes into: dense on examples that {primitive} moves along the batch"


ROWS = {
    "in a scan": lambda rows: lax.scan(lambda h, _: (jnp.tanh(h[::-1]), None), rows, None, length=3)[0],
    "by a rule": turned_by_rule,
    "at once": lambda rows: rows[::-1],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_a_leaf_that_leave_their_places_are_refused(name):
    """A vector with a row for each example: the equation that takes these rows elsewhere is the one that they enter."""

    def apply(p, x):
        return x @ p["w"] * ROWS[name](jnp.broadcast_to(p["b"], (len(x), 4)))

    first, _ = kj.plan(apply, {"b": W[0], "w": W}, X).table
    assert first.reason == "goes into: bias on examples that rev moves along the batch"


def test_what_moves_within_an_example_is_followed():
    def apply(w, x):
        x = jax.vmap(lambda one: one[jnp.argsort(one)])(jnp.sort(x, -1)[:, ::-1])
        return jnp.roll(x, 1, 1) @ w

    assert kj.plan(apply, W, X).table[0].covered


OWN = {  # by a range along the batch each example takes, or is written to, its own place
    "taken": lambda h, i: h[jnp.arange(len(h)), -1 - i],
    "constant": lambda h, i: h[np.arange(len(h)), i],
    "several": lambda h, i: h[jnp.arange(len(h))[:, None], i[:, None] + jnp.arange(2)].sum(1),
    "second axis": lambda h, i: h.swapaxes(0, 1)[i, jnp.arange(len(h))],
    "under jit": lambda h, i: jax.jit(lambda h, r, i: h[r, i])(h, jnp.arange(len(h)), i),
    "written": lambda h, i: h.at[jnp.arange(len(h)), i].set(0.0).sum(1),
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_range_takes_is_each_examples_own(name):
    x, i = jax.ShapeDtypeStruct((6, 5, 4), float), jax.ShapeDtypeStruct((6,), int)
    plan = kj.plan(lambda p, x, i: OWN[name](jnp.tanh(x @ p[0]), i) @ p[1], [W, W], x, i, batched=(0, 1), strict=True)
    assert all(layer.own for layer in plan.layers)


def test_complex_predictions_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"jnp.stack\(\[f.real, f.imag\], -1\)"):
        kj.plan(lambda p, x: (x @ p) * jnp.exp(1j * x), W, X)
    assert kj.plan(lambda p, x: jnp.stack([x @ p, x], -1), W, X).table[0].covered


def test_arguments_of_another_dtype_than_the_plan_s_are_named():
    """As images are that come in half precision, and a state that the first step of a loop under x64 widens."""

    def apply(p, x, state):
        return jnp.tanh((x.astype(float) - state["mean"].astype(float)) @ p)

    plan = kj.plan(apply, W, X, {"mean": jnp.zeros(4, jnp.float32)})
    with pytest.raises(ValueError, match=r"argument 0 \(params not counted\) is bfloat16 and was float64: cast it"):
        kj.capture(plan, W, X.astype(jnp.bfloat16), {"mean": jnp.zeros(4, jnp.float32)})
    with pytest.raises(ValueError, match=r"argument 1 \(params not counted\)\['mean'\] is float64 and was float32"):
        jax.jit(lambda x, s: kj.capture(plan, W, x, s).prediction)(X, {"mean": jnp.zeros(4)})


def test_whole_that_a_wrapper_masks_too_is_named():
    plan = kj.plan(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), {"w": W, "b": jnp.ones(4)}, X)
    params = {"w": W, "b": jnp.ones(4)}
    hidden = {"w": True, "b": False}
    tx = optax.masked(kj.kfac(plan, step=kf.SelfTuning()), hidden, mask_compatible_extra_args=True)
    step = kj.step(plan, kf.Gaussian(), optax.chain(tx, optax.scale(-1.0)))
    with pytest.raises(ValueError, match=r"whole without \['b'\]: .*mask_compatible_extra_args=True.* leave that"):
        step(params, step.init(params), (X, jnp.ones((6, 4))), jax.random.key(0))


def test_an_error_of_the_model_itself_is_told_as_it_is():
    late = []

    def apply(p, x):
        if late:
            raise ValueError("of the model")
        return x @ p

    plan = kj.plan(apply, W, X)
    late.append(True)
    with pytest.raises(ValueError) as caught:
        kj.capture(plan, W, X)
    assert str(caught.value) == "of the model"
