"""Models of flax (linen and nnx), equinox and haiku, as in `jax_models`: name -> (library, maker)."""

from __future__ import annotations

import importlib

import numpy as np

from jax_models import normal
from jax_needed import jax, jnp

LIBRARIES = {}


def library(name):
    """Registers a model that needs `name`; the module comes in as its argument."""

    def put(make):
        LIBRARIES[make.__name__] = (name, lambda: make(importlib.import_module(name)))
        return make

    return put


def filled(shapes):
    """Random float64 parameters for a tree of shapes, none of them zero; nothing is initialised or compiled."""
    rng = np.random.default_rng(5)

    def fill(x):
        return jnp.asarray(rng.normal(size=x.shape) / np.sqrt(max(x.shape[:-1], default=4)) + (x.ndim < 2))

    return jax.tree.map(lambda x: fill(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, shapes)


def initialised(net, x):
    return net.apply, filled(jax.eval_shape(net.init, jax.random.key(0), x)), x


def tokens(batch=3, time=5):
    return jnp.asarray(np.random.default_rng(3).integers(0, 7, (batch, time)))


@library("flax.linen")
def flax_cnn(nn):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), feature_group_count=2, strides=2, param_dtype=jnp.float64)(x)
            x = nn.gelu(nn.GroupNorm(2, param_dtype=jnp.float64)(x))
            x = nn.avg_pool(nn.Conv(4, (2, 2), param_dtype=jnp.float64)(x), (2, 2))
            return nn.Dense(3, param_dtype=jnp.float64)(x.reshape(x.shape[0], -1))

    return initialised(Net(), normal((3, 8, 8, 2), seed=2))


@library("flax.linen")
def flax_transformer(nn):
    wide = {"param_dtype": jnp.float64, "dtype": jnp.float64}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 4, **wide)(ids) + self.param("pos", nn.initializers.normal(), (5, 4), jnp.float64)
            for _ in range(2):
                y = nn.LayerNorm(**wide)(x)
                x = x + nn.MultiHeadDotProductAttention(2, **wide)(y, y)
                y = nn.gelu(nn.Dense(8, **wide)(nn.LayerNorm(**wide)(x)))
                x = x + nn.Dense(4, **wide)(y)
            return nn.Dense(3, **wide)(x.mean(1))

    return initialised(Net(), tokens())


@library("flax.linen")
def flax_remat_and_lstm(nn):
    wide = {"param_dtype": jnp.float64}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.remat(nn.Dense)(4, **wide)(x))
            return nn.RNN(nn.LSTMCell(3, **wide))(x)[:, -1]

    return initialised(Net(), normal((3, 4, 5), seed=2))


@library("flax.nnx")
def nnx_cnn(nnx):
    class Net(nnx.Module):
        def __init__(self, rngs):
            wide = {"param_dtype": jnp.float64, "rngs": rngs}
            self.conv = nnx.Conv(2, 4, (3, 3), **wide)
            self.norm = nnx.LayerNorm(4, **wide)
            self.out = nnx.Linear(4, 3, **wide)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.conv(x))).mean((1, 2)))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    return lambda s, x: nnx.merge(graph, s)(x), filled(state), normal((3, 5, 5, 2), seed=2)


@library("equinox")
def equinox_vmapped(eqx):
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        attend: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        conv: eqx.nn.Conv1d
        out: eqx.nn.Linear

        def __init__(self, key):
            a, b, c, d = jax.random.split(key, 4)
            self.embed, self.attend = eqx.nn.Embedding(7, 4, key=a), eqx.nn.MultiheadAttention(2, 4, key=b)
            self.norm, self.conv = eqx.nn.LayerNorm(4), eqx.nn.Conv1d(4, 3, 2, key=c)
            self.out = eqx.nn.Linear(3, 2, key=d)

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            x = jax.vmap(self.norm)(x + self.attend(x, x, x))
            return self.out(jnp.tanh(self.conv(x.T)).sum(1))

    net = eqx.filter_eval_shape(Net, jax.random.key(0))
    params, static = eqx.partition(net, lambda x: isinstance(x, jax.ShapeDtypeStruct))
    return lambda p, ids: jax.vmap(eqx.combine(p, static))(ids), filled(params), tokens()


@library("haiku")
def haiku_transformer(hk):
    def net(ids):
        x = hk.Embed(7, 4)(ids)
        x = x + hk.MultiHeadAttention(2, 2, model_size=4, w_init=hk.initializers.VarianceScaling())(x, x, x)
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.nets.MLP([5, 3])(x.mean(1))

    return initialised(hk.without_apply_rng(hk.transform(net)), tokens())


@library("haiku")
def haiku_cnn(hk):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(3)(jnp.tanh(hk.Conv2D(4, 3, 2)(x)).mean((1, 2)))))
    return initialised(net, normal((3, 5, 5, 2), seed=2))
