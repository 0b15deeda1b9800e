"""Models with rows that all examples share, coupled examples, tied and concatenated leaves: name -> maker, float64."""

from __future__ import annotations

import importlib
from inspect import signature

from jax_libraries import filled, tokens
from jax_models import normal
from jax_needed import jax, jnp, lax

MODELS = {}
WIDE = {"param_dtype": jnp.float64, "dtype": jnp.float64}


def model(*needs):
    """Registers a model by its function's name; modules it needs come in as arguments."""

    def put(make):
        MODELS[make.__name__] = (needs, lambda: make(*(importlib.import_module(name) for name in needs)))
        return make

    return put


def some(names, *shapes):
    return dict(zip(names, normal(*shapes), strict=True))


@model()
def class_token_tiled():
    def apply(p, x):  # (batch, 3, 4)
        x = jnp.concatenate([jnp.tile(p["c"], (x.shape[0], 1, 1)), jnp.tanh(x @ p["w"])], 1) + p["q"]
        return jnp.tanh(x[:, 0] + x.mean(1)) @ p["v"]

    return apply, some("cwqv", (1, 1, 4), (4, 4), (1, 4, 4), (4, 2)), normal((6, 3, 4), seed=2)


@model()
def mask_token_and_first_state():
    def apply(p, x):
        x = jnp.where(x[..., :1] > 0, x, p["m"])

        def cell(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            return h, None

        start = jnp.broadcast_to(p["h"], (x.shape[0], 4))
        return lax.scan(cell, start, x.swapaxes(0, 1))[0]

    return apply, some("mwuh", (3,), (3, 4), (4, 4), (4,)), normal((6, 5, 3), seed=2)


@model()
def deviation_of_a_policy():
    def apply(p, x):
        mean = x @ p["w"]
        return jnp.concatenate([mean, jnp.broadcast_to(p["s"], mean.shape)], -1)

    return apply, some("ws", (4, 2), (2,)), normal((6, 4), seed=2)


@model()
def positions_by_a_range():
    def apply(p, ids):
        x = p["t"][ids] + p["q"][jnp.arange(ids.shape[1])]
        return jnp.tanh(x @ p["w"]).sum(1)

    return apply, some("tqw", (7, 4), (5, 4), (4, 3)), tokens(6)


@model()
def masked_kernel():
    def apply(p, x):
        return jnp.tanh(x @ (p["w"] * jnp.tri(4))) @ p["v"]

    return apply, some("wv", (4, 4), (4, 2)), normal((6, 4), seed=2)


@model()
def gates_concatenated():
    def apply(p, x):
        w = jnp.concatenate([p["a"], p["b"]], 1)
        c = jnp.concatenate([p["c"], p["d"]])
        one, two = jnp.split(x @ w + c, 2, -1)
        return (jax.nn.sigmoid(one) * jnp.tanh(two)) @ jnp.concatenate([p["e"], p["f"]], 0)

    shapes = ((4, 3), (4, 3), (3,), (3,), (1, 2), (2, 2))
    return apply, some("abcdef", *shapes), normal((6, 4), seed=2)


@model()
def tied_embedding():
    def apply(p, ids):
        x = jnp.tanh(p["e"][ids] @ p["w"])
        return x @ p["e"].T + p["b"]

    return apply, some("ewb", (7, 4), (4, 4), (7,)), tokens(6, 3)


@model()
def tied_autoencoder():
    def apply(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T

    return apply, some("wb", (4, 3), (3,)), normal((6, 4), seed=2)


@model("flax.linen")
def linen_batch_norm_and_class_token(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2), **WIDE)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, **WIDE)(x))
            x = x.reshape(x.shape[0], -1, 4)
            token = self.param("cls", nn.initializers.normal(), (1, 1, 4), jnp.float64)
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
            return nn.Dense(3, **WIDE)(nn.BatchNorm(use_running_average=False, **WIDE)(x))[:, 0]

    x = normal((6, 3, 3, 2), seed=2)
    variables = filled(jax.eval_shape(Net().init, jax.random.key(0), x))

    def apply(p, x):
        return Net().apply({"params": p, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"])[0]

    return apply, variables["params"], x


@model("flax.linen")
def linen_batch_norm_in_evaluation(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, **WIDE)(nn.BatchNorm(use_running_average=True, **WIDE)(x))

    x = normal((6, 4), seed=2)
    variables = filled(jax.eval_shape(Net().init, jax.random.key(0), x))
    return lambda p, x: Net().apply({**variables, "params": p}, x), variables["params"], x


@model("flax.linen")
def linen_optimized_lstm_and_attend(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 3, **WIDE)
            x = nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=jnp.float64))(embed(ids))
            return embed.attend(x + embed(ids))[:, -1]

    ids = tokens(4, 3)
    return lambda p, x: Net().apply(p, x), filled(jax.eval_shape(Net().init, jax.random.key(0), ids)), ids


@model("flax.nnx")
def nnx_batch_norm(nnx):
    net = nnx.eval_shape(lambda: nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    rest = filled(rest)
    copied = {"copy": True} if "copy" in signature(nnx.merge).parameters else {}  # flax before 0.11 always copies
    return lambda p, x: nnx.merge(graph, p, rest, **copied)(x) ** 2, filled(params), normal((6, 4), seed=2)


@model("haiku")
def haiku_batch_norm(hk):
    def net(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=True)
        return hk.Linear(3)(jnp.tanh(x))

    transformed = hk.without_apply_rng(hk.transform_with_state(net))
    x = normal((6, 4), seed=2)
    params, state = transformed.init(jax.random.key(0), x)
    params = filled(params)
    return lambda p, x: transformed.apply(p, state, x)[0], params, x


@model("equinox")
def equinox_batch_norm(eqx):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    params, static = eqx.partition(norm, eqx.is_inexact_array)

    def apply(p, x):
        one = eqx.combine(p, static)
        kept = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
        return jax.vmap(lambda x: one(x, kept)[0], axis_name="batch")(x) ** 2

    return apply, filled(jax.eval_shape(lambda: params)), normal((6, 4), seed=2)


COUPLED = {name for name in MODELS if "batch_norm" in name and "evaluation" not in name}
__all__ = ["COUPLED", "MODELS"]
