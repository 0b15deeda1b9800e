"""Two encoders trained by the logits (batch, batch) of each image with each text; `apply` gives embeddings alone."""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def apply(params, x, y):
    return {"image": jnp.tanh(x @ params["w1"]) @ params["w2"], "text": y @ params["v"]}


def compare(f):
    """{head: (batch, 4)} -> (batch, batch)."""
    u, v = (e / jnp.linalg.norm(e, axis=1, keepdims=True) for e in (f["image"], f["text"]))
    return 5.0 * u @ v.T


def main(steps: int = 30, batch: int = 32) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"w1": (8, 16), "w2": (16, 4), "v": (6, 4)}
    params = {name: jax.random.normal(key, shapes[name]) / 3 for key, name in zip(keys, shapes, strict=False)}
    x = jax.random.normal(keys[3], (batch, 8))
    y = x[:, :6] ** 2
    loss = kf.SoftmaxCrossEntropy()
    plan = kj.plan(apply, params, x, y, batched=(0, 1), strict=True)
    tx = optax.chain(kj.kfac(plan, schedules=kf.Schedules(damping=0.01)), optax.sgd(0.1))

    @jax.jit
    def step(params, state, key):
        captured = kj.capture(plan, params, x, y)
        logits, pull = jax.vjp(compare, captured.prediction)
        draws = kf.monte_carlo(loss, logits, jax.random.uniform(key, (1, batch)))
        draws = jax.vmap(lambda draw: pull(draw)[0])(draws)  # a label of one row reaches all embeddings
        records = captured.records(draws, batch, fisher=kf.monte_carlo)
        slope = kf.empirical(loss, logits, jnp.arange(batch))[0] / batch
        updates, state = tx.update(captured.gradients(pull(slope)[0]), state, params, records=records)
        return optax.apply_updates(params, updates), state, loss.value(logits, jnp.arange(batch)) / batch

    state = tx.init(params)
    losses = []
    for key in jax.random.split(keys[4], steps):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    print("loss", *main()[::6])
