"""K-FAC on a Keras model on its JAX backend: one jitted step; at the end the model takes what was learnt."""

import os
import random

os.environ.setdefault("KERAS_BACKEND", "jax")  # before keras is imported
import jax
import keras

import kfaccore as kf
import kfaccore_jax as kj


def main(steps: int = 100, n: int = 64) -> list[float]:
    random.seed(0)  # Keras's initialisers; keras.utils.set_random_seed would load TensorFlow where there is one
    x, labels = jax.random.normal(jax.random.key(0), (n, 20)), jax.random.randint(jax.random.key(1), (n,), 0, 10)
    net = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32, "tanh"), keras.layers.Dense(10)])
    apply, params = kj.keras_apply(net)
    loss, plan = kf.SoftmaxCrossEntropy(), kj.plan(apply, params, x)
    tx = kj.kfac(plan, kf.KFAC(), kf.Clocks(update=1, refresh=5), kf.Schedules(damping=0.1))

    @jax.jit
    def step(params, state, x, labels):
        f = (captured := kj.capture(plan, params, x)).prediction
        g = captured.gradients(loss.gradient(f, labels) / n)
        directions, state = tx.update(g, state, records=captured.records(kf.type2(loss, f), n))
        return jax.tree.map(lambda w, d: w - 0.5 * d, params, directions), state, loss.value(f, labels) / n

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, x, labels)
        losses.append(float(value))
    kj.keras_assign(net, params)
    print(f"right: {float((net(x).argmax(-1) == labels).mean())}")
    return losses


if __name__ == "__main__":
    print("loss", *main()[::20])
