"""The evidence of a trained function and its precisions, inside jit, with the gradient that says they are tuned."""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def apply(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def main(steps: int = 300, sigma2: float = 0.01) -> tuple[float, float]:
    keys, loss, tx = jax.random.split(jax.random.key(0), 3), kf.Gaussian(), optax.adam(0.03)
    params = {"w1": jax.random.normal(keys[0], (1, 8)), "b1": jnp.zeros(8), "w2": jnp.zeros((8, 1))}
    x = jax.random.uniform(keys[1], (64, 1), minval=-2, maxval=2)
    y = jnp.sin(2 * x) + 0.1 * jax.random.normal(keys[2], x.shape)
    value = lambda p: loss.value(apply(p, x), y) / sigma2 + 32 * jnp.log(2 * jnp.pi * sigma2)  # noqa: E731

    def step(_, carry):
        updates, state = tx.update(jax.grad(value)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    params, _ = jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, (p, tx.init(p))))(params)
    plan = kj.plan(apply, params, x)
    mean = plan.matrices(params)
    P = kf.Posterior(mean, kf.fit(kf.KFAC(), kj.stream(plan, params, loss, [(x, y)], kf.type2)), 1.0, 64 / sigma2)
    evidence = jax.jit(lambda u: kf.evidence(kf.Posterior(mean, P.curvature, jnp.exp(u), P.scale), value(params)))
    tuned, _ = kf.tuned(P, together=(tuple(mean),))
    best = jnp.log(tuned.prior(next(iter(mean))))
    print(f"log evidence {float(evidence(0.0)):.1f} at precision 1, {float(evidence(best)):.1f} tuned")
    return float(evidence(best) - evidence(0.0)), float(jax.grad(evidence)(best))


if __name__ == "__main__":
    main()
