"""A PINN: -u'' = f on [0, 1], u = 0 at both ends. Residuals are predictions, derivatives are more uses of a layer.

`apply` returns what the loss squares; the plan sees the weights in the value and in both derivatives of it, all of them
one layer, whose rows share its matrix.
"""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def u(params, x):
    """(batch, 1) -> (batch, 1)."""
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def apply(params, x, edge):
    """Residuals (batch, 1) of the equation at x and of the boundary at edge."""
    slope = lambda x: jax.jvp(lambda x: u(params, x), (x,), (jnp.ones_like(x),))[1]  # noqa: E731
    bend = jax.jvp(slope, (x,), (jnp.ones_like(x),))[1]
    return {"inside": -bend - jnp.pi**2 * jnp.sin(jnp.pi * x), "edge": u(params, edge)}


def main(steps: int = 100, batch: int = 64) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": 3 * jax.random.normal(keys[0], (1, 16)), "b": jax.random.normal(keys[1], (16,))}
    params |= {"v": jnp.zeros((16, 1)), "c": jnp.zeros(1)}
    x = jax.random.uniform(keys[2], (batch, 1))
    edge = jnp.tile(jnp.array([[0.0], [1.0]]), (batch // 2, 1))  # one batch of both
    loss = kf.Joint({"inside": kf.Gaussian(), "edge": kf.Gaussian()}, {"inside": 1.0, "edge": 100.0})
    plan = kj.plan(apply, params, x, edge, batched=(0, 1), strict=True)
    tx = optax.chain(kj.kfac(plan, step=kf.SelfTuning()), optax.scale(-1.0))
    step = kj.step(plan, loss, tx)
    state = tx.init(params)
    losses = []
    target = {"inside": jnp.zeros_like(x), "edge": jnp.zeros_like(x)}
    for i in range(steps):
        params, state, metrics = step(params, state, (x, edge, target), jax.random.key(i))
        losses.append(float(metrics["loss"]))
    return losses


if __name__ == "__main__":
    print("loss", *main()[::20])
