"""Models that the JAX capture must follow: name -> function returning (apply, params, x), float64."""

from __future__ import annotations

import numpy as np

from jax_needed import jax, jnp, lax

EXACT = []
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def exact(make):
    """Registers a model by its function's name."""
    EXACT.append(make)
    return make


def normal(*shapes, seed=1):
    rng = np.random.default_rng(seed)
    found = tuple(jnp.asarray(rng.normal(size=s) / np.sqrt(max(s[:-1], default=4))) for s in shapes)
    return found if len(found) > 1 else found[0]


def mlp(p, x):
    (w, b), (v, c) = p
    return jnp.tanh(x @ w + b) @ v + c


def mlp_params():
    w, b, v, c = normal((5, 4), (4,), (4, 3), (3,))
    return [(w, b), (v, c)]


@exact
def raw():
    return mlp, mlp_params(), normal((6, 5), seed=2)


@exact
def wrapped():
    return jax.jit(jax.checkpoint(jax.vmap(jax.jit(mlp), (None, 0)))), mlp_params(), normal((6, 5), seed=2)


@exact
def weight_first():
    return lambda p, x: (p[1] @ jnp.tanh(p[0] @ x.T)).T, normal((4, 5), (3, 4)), normal((6, 5), seed=2)


@exact
def fused_qkv_split():
    def apply(p, x):  # (batch, time, 4)
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        q, k, v = x @ q, x @ k, x @ v + p["b"][8:]
        return (jax.nn.softmax(q @ k.mT) @ v).sum(1)

    w, b = normal((4, 12), (12,))
    return apply, {"qkv": w, "b": b}, normal((6, 3, 4), seed=2)


@exact
def fused_qkv_data():
    def apply(p, x):
        q, k, v = jnp.split(x @ p["qkv"] + p["b"], 3, axis=-1)
        return (jax.nn.softmax(q @ k.mT) @ v).sum(1)

    w, b = normal((4, 12), (12,))
    return apply, {"qkv": w, "b": b}, normal((6, 3, 4), seed=2)


@exact
def matrix_with_bias_column():
    def apply(p, x):
        return jnp.tanh(x @ p["a"][:, :-1].T + p["a"][:, -1]) @ p["b"][:, :4].T + p["b"][:, 4]

    a, b = normal((4, 6), (3, 5))
    return apply, {"a": a, "b": b}, normal((6, 5), seed=2)


@exact
def stacked_python_loop():
    def apply(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x + p["s"][1]

    w, s = normal((3, 4, 4), (2, 4))
    return apply, {"w": w, "s": s}, normal((6, 4), seed=2)


@exact
def constants():
    def apply(p, x):
        y = jnp.tanh(x @ (p["w"] / jnp.sqrt(5.0)) - p["b"])
        y = jnp.tanh((0.1 * y) @ (2 * -p["v"]) + 0.05 * p["c"])
        return 0.5 * (p["d"] - y)

    w, b, v, c, d = normal((5, 4), (4,), (4, 3), (3,), (3,))
    return apply, {"w": w, "b": b, "v": v, "c": c, "d": d}, normal((6, 5), seed=2)


@exact
def weight_times_a_traced_number():
    return lambda p, x: x @ (p["w"] * jnp.cos(1.0 * x.shape[1])), {"w": normal((5, 3))}, normal((6, 5), seed=2)


@exact
def used_three_times():
    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"]) @ p["w"]

    w, b = normal((4, 4), (4,))
    return apply, {"w": w, "b": b}, normal((6, 4), seed=2)


@exact
def scan_over_stacked_layers_with_remat():
    def apply(p, x):
        @jax.checkpoint
        def layer(x, wb):
            return jnp.tanh(x @ wb[0] + wb[1]), None

        return lax.scan(layer, x, (p["w"], p["b"]))[0] @ p["out"]

    w, b, out = normal((3, 4, 4), (3, 4), (4, 2))
    return apply, {"w": w, "b": b, "out": out}, normal((6, 4), seed=2)


@exact
def remat_borders_between_a_leaf_and_its_use():
    def apply(p, x):
        act = jax.checkpoint(lambda y, b: jnp.tanh(y + b))
        shrunk = jax.checkpoint(lambda w, s: w * s)(p["w"], jnp.cos(1.0 * x.shape[1]))
        both = jax.checkpoint(lambda *parts: jnp.concatenate(parts, 1))(p["u"], p["v"])
        return act(x @ shrunk, p["b"]) @ both

    w, b, u, v = normal((5, 4), (4,), (4, 2), (4, 1))
    return apply, {"w": w, "b": b, "u": u, "v": v}, normal((6, 5), seed=2)


@exact
def rnn_by_scan():
    def apply(p, x):
        def cell(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
            return h, h @ p["o"]

        last, ys = lax.scan(cell, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
        return last + ys.sum(0)

    w, u, b, o = normal((3, 4), (4, 4), (4,), (4, 4))
    return apply, {"w": w, "u": u, "b": b, "o": o}, normal((6, 5, 3), seed=2)


@exact
def fori_loop():
    def apply(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"] + p["b"]), x)

    w, b = normal((4, 4), (4,))
    return apply, {"w": w, "b": b}, normal((6, 4), seed=2)


@exact
def heads():
    def apply(p, x):
        return jnp.einsum("bthd,hde->bthe", x, p["w"]) + p["b"]

    w, b = normal((2, 3, 4), (2, 4))
    return apply, {"w": w, "b": b}, normal((6, 5, 2, 3), seed=2)


@exact
def ensemble():
    def apply(p, x):
        return jax.vmap(mlp, (0, None), 1)(p, x)

    p = jax.tree.map(lambda v: jnp.stack([v, 0.5 * v, -v]), mlp_params())
    return apply, p, normal((6, 5), seed=2)


@exact
def batch_times_time():
    def apply(p, x):
        return mlp(p, x.reshape(-1, 5)).reshape(*x.shape[:2], 3)

    return apply, mlp_params(), normal((6, 4, 5), seed=2)


@exact
def lora():
    w, a, b = normal((5, 4), (5, 2), (2, 4))
    return lambda p, x: x @ p["w"] + 0.7 * (x @ p["a"]) @ p["b"], {"w": w, "a": a, "b": b}, normal((6, 5), seed=2)


def _conv(x, w, spec=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lax.conv_general_dilated(x, w, dimension_numbers=spec, **options)


@exact
def convolutions():
    def apply(p, x):
        x = jnp.tanh(_conv(x, p["w"], window_strides=(2, 1), feature_group_count=2) + p["b"])
        x = jnp.tanh(_conv(x, p["d"], feature_group_count=6, rhs_dilation=(2, 1)))
        x = x / (1e-3 + jnp.std(x, (1, 2), keepdims=True)) * p["g"] + p["h"]
        x = lax.conv_transpose(x, p["t"], (2, 2), "SAME") + p["c"]
        return x.mean((1, 2))

    names = "wbdghtc"
    shapes = ((3, 2, 1, 6), (6,), (2, 2, 1, 6), (6,), (6,), (3, 3, 6, 2), (2,))
    return apply, dict(zip(names, normal(*shapes), strict=True)), normal((3, 5, 4, 2), seed=2)


@exact
def convolutions_channels_first():
    def apply(p, x):
        y = _conv(x, p["w"], ("NCHW", "OIHW", "NCHW"), padding=((1, 0), (0, 2)), feature_group_count=2)
        return (y + p["b"][:, None, None]).sum((2, 3))

    w, b = normal((4, 1, 2, 3), (4,))
    return apply, {"w": w, "b": b}, normal((3, 2, 4, 5), seed=2)


@exact
def biases_of_other_signs_and_kinds():
    def apply(p, ids):
        x = jnp.tanh(p["table"][ids] + p["a"])  # (batch, 5, 4)
        x = _conv(x, p["w"], ("NWC", "WIO", "NWC"), window_strides=(1,)) - p["b"]
        return x.sum(1) @ p["v"] + 0.5 * p["c"]

    p = dict(zip(("table", "a", "w", "b", "v", "c"), normal((7, 4), (4,), (2, 4, 3), (3,), (3, 2), (2,)), strict=True))
    return apply, p, jnp.asarray(np.random.default_rng(3).integers(0, 7, (6, 5)))


@exact
def convolution_1d_and_3d():
    def apply(p, x):  # (batch, 4, 3, 3, 2)
        x = jnp.tanh(_conv(x, p["w"], ("NDHWC", "DHWIO", "NDHWC"), window_strides=(1, 1, 2)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return _conv(x, p["v"], ("NWC", "WIO", "NWC"), window_strides=(2,)).sum(1) + p["b"]

    w, v, b = normal((2, 2, 2, 2, 3), (3, 3, 2), (2,))
    return apply, {"w": w, "v": v, "b": b}, normal((3, 4, 3, 3, 2), seed=2)


@exact
def embedding_and_position():
    def apply(p, ids):
        x = p["table"][ids] + p["pos"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * p["gain"] + p["shift"]
        return jnp.tanh(x @ p["w"] + p["b"]).sum(1)

    table, pos, gain, shift, w, b = normal((7, 4), (5, 4), (4,), (4,), (4, 3), (3,))
    p = {"table": table, "pos": pos, "gain": gain, "shift": shift, "w": w, "b": b}
    return apply, p, jnp.asarray(np.random.default_rng(3).integers(0, 7, (6, 5)))


@exact
def embedding_by_two_indices():
    """As jax.vmap of a look-up writes it; jax 0.6 promises that the indices are inside."""

    def apply(p, ids):
        at = jnp.stack([ids, jnp.zeros_like(ids)], -1)
        rows = lax.GatherDimensionNumbers((2,), (0,), (0, 1))
        return lax.gather(p, at, rows, (1, 4), mode="promise_in_bounds").sum(1)

    return apply, normal((7, 4)), jnp.asarray(np.random.default_rng(3).integers(0, 7, (6, 5)))


@exact
def rows_from_a_computed_place():
    """As jax 0.6 writes w[-2:]."""

    def apply(p, x):
        start, zero = np.int32(-2), np.int32(0)
        start = lax.select_n(lax.lt(start, zero), start, lax.add(start, np.int32(4)))
        return x @ lax.dynamic_slice(p, (start, zero), (2, 4))

    return apply, normal((4, 4)), normal((6, 2), seed=2)


@exact
def stopped():
    def apply(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"] + lax.stop_gradient(p["v"]).sum()

    w, v = normal((5, 4), (4, 3))
    return apply, {"w": w, "v": v}, normal((6, 5), seed=2)


@exact
def own_activation_rule():
    @jax.custom_jvp
    def act(x):
        return jnp.tanh(x)

    act.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 2.0 * tangents[0]))
    return lambda p, x: act(x @ p["w"]) @ p["v"], dict(zip("wv", normal((5, 4), (4, 3)), strict=True)), normal((6, 5))


@exact
def rule_that_walks_over_a_constant():
    """As that of jax.experimental.ode does over its times."""

    @jax.custom_vjp
    def summed(x, times):
        return x * times.sum()

    def back(times, g):
        return lax.fori_loop(0, 2, lambda i, total: total + g * times[i], jnp.zeros_like(g)), jnp.zeros_like(times)

    summed.defvjp(lambda x, times: (x * times.sum(), times), back)
    times = np.array([0.5, 1.0])
    params = dict(zip("wv", normal((5, 4), (4, 3)), strict=True))
    return lambda p, x: summed(jnp.tanh(x @ p["w"]), jnp.asarray(times)) @ p["v"], params, normal((6, 5))
