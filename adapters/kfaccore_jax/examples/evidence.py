"""The evidence of a trained function and its precisions, inside jit, with the gradient that says they are tuned."""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def apply(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def main(steps: int = 300) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w1": jax.random.normal(keys[0], (1, 8)), "b1": jnp.zeros(8), "w2": jnp.zeros((8, 1))}
    x = jax.random.uniform(keys[1], (64, 1), minval=-2, maxval=2)
    y = jnp.sin(2 * x) + 0.1 * jax.random.normal(keys[2], x.shape)
    loss, sigma2 = kf.Gaussian(), 0.01
    value = jax.jit(lambda p: loss.value(apply(p, x), y) / sigma2)
    tx = optax.adam(0.03)

    @jax.jit
    def trained(params):
        def step(_, carry):
            updates, state = tx.update(jax.grad(value)(carry[0]), carry[1])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, steps, step, (params, tx.init(params)))[0]

    params = trained(params)
    plan = kj.plan(apply, params, x)
    curvature = kf.fit(kf.KFAC(), kj.stream(plan, params, loss, [(x, y)], kf.type2))
    mean = plan.matrices(params)
    constant = 32 * jnp.log(2 * jnp.pi * sigma2)

    @jax.jit
    def evidence(log_precision):
        P = kf.Posterior(mean, curvature, jnp.exp(log_precision), len(x) / sigma2)
        return kf.evidence(P, value(params) + constant)

    tuned, _ = kf.tuned(kf.Posterior(mean, curvature, 1.0, len(x) / sigma2), together=(tuple(mean),))
    best = jnp.log(next(iter(tuned.precision.values())))
    print(f"log evidence {float(evidence(0.0)):.1f} at precision 1, {float(evidence(best)):.1f} tuned")
    return float(evidence(best) - evidence(0.0)), float(jax.grad(evidence)(best))


if __name__ == "__main__":
    main()
