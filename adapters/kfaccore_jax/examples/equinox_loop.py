"""K-FAC on an equinox model written for one example: the plan sees through vmap; the clock runs inside jit."""

import equinox as eqx
import jax

import kfaccore as kf
import kfaccore_jax as kj


def main(steps: int = 100, batch: int = 64) -> list[float]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, 8))
    y = jax.numpy.sin(x @ jax.random.normal(keys[1], (8, 3)))
    loss, net = kf.Gaussian(), eqx.nn.MLP(8, 3, 32, 2, jax.nn.tanh, key=keys[2])
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    plan = kj.plan(apply, params, x, strict=True)
    tx = kj.kfac(plan, kf.EKFAC(), kf.Clocks(update=1, refresh=10), kf.Schedules(damping=0.1))

    @jax.jit
    def step(params, state, x, y):
        captured = kj.capture(plan, params, x)
        f = captured.prediction
        grads = captured.gradients(loss.gradient(f, y) / batch)
        directions, state = tx.update(grads, state, records=captured.records(kf.type2(loss, f), batch))
        return jax.tree.map(lambda w, d: w - 0.2 * d, params, directions), state, loss.value(f, y) / batch

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, x, y)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    print("loss", *main()[::20])
