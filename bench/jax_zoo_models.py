"""Small forms of public JAX models, for `jax_zoo.py`: name -> function returning (apply, params, x)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ZOO = {}


def model(make):
    """Registers a model by its function's name."""
    ZOO[make.__name__] = make
    return make


def filled(shapes, seed=5):
    """Random parameters for a tree of shapes; nothing is initialised or compiled."""
    rng = np.random.default_rng(seed)

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        scale = np.sqrt(max(np.prod(x.shape[:-1], dtype=int), 1)) if len(x.shape) > 1 else 4.0
        return jnp.asarray(rng.normal(size=x.shape) / scale + (len(x.shape) < 2), jnp.float64)

    return jax.tree.map(fill, shapes)


def linen(net, x, **fixed):
    """(apply, params, x) of a linen module; its other collections keep one value, and moves of them are dropped."""
    variables = dict(filled(jax.eval_shape(lambda: net.init(jax.random.key(0), x))))
    params = variables.pop("params")
    moved = list(variables)

    def apply(p, x):
        found = net.apply({"params": p, **variables}, x, mutable=moved, **fixed)
        return found[0]

    return apply, params, x


def images(n=2, size=32):
    return jnp.asarray(np.random.default_rng(2).normal(size=(n, size, size, 3)))


def words(n=2, length=16, size=96):
    return jnp.asarray(np.random.default_rng(3).integers(0, size, (n, length)))


class ResNet(nn.Module):
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64

    @nn.compact
    def __call__(self, x):
        norm = lambda: nn.BatchNorm(use_running_average=False)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(self.width, (7, 7), 2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                size = self.width * 2**stage
                y = nn.relu(norm()(nn.Conv(size, (3, 3), stride, use_bias=False)(x)))
                y = norm()(nn.Conv(size, (3, 3), use_bias=False)(y))
                if x.shape != y.shape:
                    x = norm()(nn.Conv(size, (1, 1), stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    depths: tuple[int, ...] = (1, 1, 2, 1)
    width: int = 24

    @nn.compact
    def __call__(self, x):
        for stage, depth in enumerate(self.depths):
            size = self.width * 2**stage
            x = nn.Conv(size, (4, 4) if stage == 0 else (2, 2), 4 if stage == 0 else 2, "VALID")(x)
            for _ in range(depth):
                y = nn.LayerNorm()(nn.Conv(size, (7, 7), feature_group_count=size)(x))
                y = nn.Dense(size)(nn.gelu(nn.Dense(4 * size)(y)))
                x = x + self.param(f"scale{stage}{_}", nn.initializers.constant(0.1), (size,)) * y
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Block(nn.Module):
    causal: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(4)(y, y, mask=mask)
        x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
        return x, None


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (8, 8), 8, "VALID")(x)
        x = x.reshape(x.shape[0], -1, 32)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 32))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 32))
        for _ in range(2):
            x, _ = Block()(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class GPT(nn.Module):
    scanned: bool = False
    tied: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(96, 32)
        x = table(ids) + nn.Embed(16, 32)(jnp.arange(ids.shape[1]))
        if self.scanned:
            over = nn.scan(nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = over(causal=True)(x, None)
        else:
            for _ in range(2):
                x, _ = Block(causal=True)(x)
        x = nn.LayerNorm()(x)
        return table.attend(x) if self.tied else nn.Dense(96)(x)


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(96)(nn.RNN(nn.OptimizedLSTMCell(32, param_dtype=jnp.float64))(nn.Embed(96, 32)(ids)))


class Policy(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(x))))
        mean = nn.Dense(6)(h)
        deviation = self.param("log_std", nn.initializers.zeros, (6,))
        return {"policy": jnp.concatenate([mean, jnp.broadcast_to(deviation, mean.shape)], -1), "value": nn.Dense(1)(h)}


class Fermions(nn.Module):
    """log |psi| of electrons (batch, 4, 3): streams of one and two electrons, orbitals, determinants."""

    @nn.compact
    def __call__(self, r):
        apart = r[:, :, None] - r[:, None]
        length = jnp.sqrt((apart**2).sum(-1, keepdims=True) + 1e-6)
        one = jnp.concatenate([r, jnp.sqrt((r**2).sum(-1, keepdims=True) + 1e-6)], -1)
        two = nn.tanh(nn.Dense(8)(jnp.concatenate([apart, length], -1)))
        for _ in range(2):
            both = jnp.concatenate([one, jnp.broadcast_to(one.mean(1, keepdims=True), one.shape), two.mean(2)], -1)
            one = nn.tanh(nn.Dense(16)(both))
        orbitals = nn.DenseGeneral((2, 4))(one).transpose(0, 2, 1, 3)
        decay = self.param("decay", nn.initializers.ones, (2, 4))
        orbitals = orbitals * jnp.exp(-length.sum((2, 3)))[:, None, :, None] + decay[:, None] * 0.1
        sign, log = jnp.linalg.slogdet(orbitals)
        top = jax.lax.stop_gradient(log.max(-1, keepdims=True))
        return jnp.log(jnp.abs((sign * jnp.exp(log - top)).sum(-1, keepdims=True))) + top


def spread(whole, x):
    """One row a graph, (graphs, width), repeated for each row of x (graphs, rows, ...)."""
    return jnp.broadcast_to(whole[:, None], (*x.shape[:2], whole.shape[-1]))


class GraphNet(nn.Module):
    """Two rounds of a full graph network: edges, nodes and a global state see each other; graphs padded to a batch."""

    width: int = 32

    @nn.compact
    def __call__(self, graph):
        mlp = lambda x: nn.Dense(self.width)(nn.LayerNorm()(nn.relu(nn.Dense(self.width)(x))))  # noqa: E731
        of = jax.vmap(lambda nodes, ends: nodes[ends])
        summed = jax.vmap(lambda edges, ends: jax.ops.segment_sum(edges, ends, graph["nodes"].shape[1]))
        edges = nn.Dense(self.width)(graph["edges"])
        nodes = nn.Dense(self.width)(graph["nodes"])
        whole = self.param("whole", nn.initializers.zeros, (self.width,))
        whole = jnp.broadcast_to(whole, (len(nodes), self.width))
        for _ in range(2):
            ends = of(nodes, graph["senders"]), of(nodes, graph["receivers"])
            edges = edges + mlp(jnp.concatenate([edges, *ends, spread(whole, edges)], -1))
            nodes = nodes + mlp(jnp.concatenate([nodes, summed(edges, graph["receivers"]), spread(whole, nodes)], -1))
            whole = whole + mlp(jnp.concatenate([nodes.mean(1), edges.mean(1), whole], -1))
        return nn.Dense(3)(whole)


@model
def graph_net():
    rng = np.random.default_rng(2)
    graph = {"nodes": rng.normal(size=(4, 6, 5)), "edges": rng.normal(size=(4, 9, 2))}
    graph |= {name: rng.integers(0, 6, (4, 9)) for name in ("senders", "receivers")}
    return linen(GraphNet(), {name: jnp.asarray(x) for name, x in graph.items()})


@model
def flax_resnet18():
    return linen(ResNet(), images())


@model
def convnext():
    return linen(ConvNeXt(), images())


@model
def vit_with_class_token():
    return linen(ViT(), images())


@model
def gpt():
    return linen(GPT(), words())


@model
def gpt_scanned():
    return linen(GPT(scanned=True), words())


@model
def gpt_tied():
    return linen(GPT(tied=True), words())


@model
def lstm():
    return linen(LSTM(), words())


@model
def ppo_two_heads():
    return linen(Policy(), jnp.asarray(np.random.default_rng(2).normal(size=(4, 8))))


@model
def ferminet_like():
    return linen(Fermions(), jnp.asarray(np.random.default_rng(2).normal(size=(4, 4, 3))))
