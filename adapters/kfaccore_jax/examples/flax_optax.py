"""K-FAC in an optax loop with a flax model: one jitted step, compiled with and without a refresh."""

from functools import partial

import flax.linen as nn
import jax
import optax

import kfaccore as kf
import kfaccore_jax as kj


def main(steps: int = 100, batch: int = 64) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 4)
    x, labels = jax.random.normal(keys[0], (batch, 20)), jax.random.randint(keys[1], (batch,), 0, 10)
    net, loss = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)]), kf.SoftmaxCrossEntropy()
    params = net.init(keys[2], x)
    plan = kj.plan(net.apply, params, x)
    print(plan)
    tx = optax.chain(kj.kfac(plan, schedules=kf.Schedules(damping=0.03)), optax.sgd(0.3, momentum=0.9))

    @partial(jax.jit, static_argnames="fresh", donate_argnames=("params", "state"))
    def step(params, state, x, labels, key, fresh):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        records = captured.records(kf.monte_carlo(loss, f, jax.random.uniform(key, (1, batch))), batch)
        grads = captured.gradients(loss.gradient(f, labels) / batch)
        updates, state = tx.update(grads, state, params, records=records, fresh=fresh)
        return optax.apply_updates(params, updates), state, loss.value(f, labels) / batch

    state, losses = tx.init(params), []
    for i in range(steps):
        params, state, value = step(params, state, x, labels, jax.random.fold_in(keys[3], i), fresh=i % 5 == 0)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    print("loss", *main()[::20])
