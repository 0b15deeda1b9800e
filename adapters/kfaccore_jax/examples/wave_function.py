"""Variational Monte Carlo: the energy of a wave function log|psi|, by stochastic reconfiguration a layer.

netket's S = <O O^T> - <O><O>^T with O = d log|psi| / d theta is a quarter of the Fisher information of p = psi^2, whose
score is 2 (O - <O>). K-FAC is its Kronecker approximation; kf.Exact() is S itself, layer by layer, and the gradient of
the energy, 2 <(E_local - E) O>, goes through the same pullback.
"""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def apply(params, r):
    """log|psi| (batch, 1) of a particle at r (batch, 2)."""
    return jnp.tanh(r @ params["w"] + params["b"]) @ params["v"] - 0.3 * (r**2).sum(-1, keepdims=True)


def local_energy(params, r):
    """-1/2 (laplacian log|psi| + |grad log|psi||^2) + |r|^2 / 2: the ground state of the oscillator has energy 1."""
    log = lambda point: apply(params, point[None])[0, 0]  # noqa: E731
    slope = jax.vmap(jax.grad(log))(r)
    bend = jax.vmap(lambda point: jnp.trace(jax.hessian(log)(point)))(r)
    return -0.5 * (bend + (slope**2).sum(-1)) + 0.5 * (r**2).sum(-1)


def main(steps: int = 60, walkers: int = 256, method=kf.KFAC()) -> list[float]:  # noqa: B008 frozen
    """The energy above the ground state's, step by step."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": 0.7 * jax.random.normal(keys[0], (2, 8)), "b": jnp.zeros(8), "v": jax.random.normal(keys[1], (8, 1))}
    r = jax.random.normal(keys[2], (walkers, 2))
    plan = kj.plan(apply, params, r, strict=True)
    tx = optax.chain(kj.kfac(plan, method, schedules=kf.Schedules(damping=0.01)), optax.sgd(0.1))

    @jax.jit
    def step(params, state, r, key):
        for one in jax.random.split(key, 10):  # Metropolis
            move, chance = jax.random.split(one)
            new = r + 0.7 * jax.random.normal(move, r.shape)
            ratio = jnp.exp(2 * (apply(params, new) - apply(params, r)))
            r = jnp.where(jax.random.uniform(chance, ratio.shape) < ratio, new, r)
        captured = kj.capture(plan, params, r)
        energies = local_energy(params, r)
        slope = 2 * (energies - energies.mean())[:, None] / walkers
        records = captured.records(2 * jnp.ones((1, walkers, 1)), walkers)
        updates, state = tx.update(captured.gradients(slope), state, params, records=records)
        return optax.apply_updates(params, updates), state, r, energies.mean()

    state = tx.init(params)
    found = []
    for key in jax.random.split(keys[3], steps):
        params, state, r, energy = step(params, state, r, key)
        found.append(float(energy) - 1.0)
    return found


if __name__ == "__main__":
    print("energy above the ground state", *main()[::20])
