"""PPO on a contextual bandit: the Fisher of policy and value as one loss of two heads, the gradient of the clip."""

import jax
import jax.numpy as jnp
import optax

import kfaccore as kf
import kfaccore_jax as kj


def apply(params, x):
    h = jnp.tanh(x @ params["trunk"])
    return {"policy": h @ params["policy"], "value": h @ params["value"]}


def main(steps: int = 60, batch: int = 128, clip: float = 0.2) -> list[float]:
    """One minus the mean reward of each batch, which is at most 1."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"trunk": (6, 16), "policy": (16, 4), "value": (16, 1)}
    params = {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    right = jax.random.normal(keys[3], (6, 4))
    loss = kf.Joint({"policy": kf.SoftmaxCrossEntropy(), "value": kf.Gaussian()})
    plan = kj.plan(apply, params, jnp.zeros((batch, 6)), strict=True)
    tx = optax.chain(kj.kfac(plan, clocks=kf.Clocks(1, 2), schedules=kf.Schedules(damping=0.05)), optax.sgd(0.3))

    def surrogate(f, old, action, reward):
        log = lambda f: jax.nn.log_softmax(f["policy"])[jnp.arange(batch), action]  # noqa: E731
        ratio = jnp.exp(log(f) - log(old))
        gain = reward - old["value"][:, 0]
        policy = -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
        return jnp.mean(policy + (f["value"][:, 0] - reward) ** 2 / 2)

    @jax.jit
    def iteration(params, state, key):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (batch, 6))
        old = apply(params, x)
        action = jax.random.categorical(keys[1], old["policy"])
        reward = (action == jnp.argmax(x @ right, 1)).astype(jnp.float32)
        for key in jax.random.split(keys[2], 2):  # two epochs on the same rollout
            captured = kj.capture(plan, params, x)
            slope = jax.grad(surrogate)(captured.prediction, old, action, reward)
            other = jax.random.fold_in(key, 1)
            noise = {"policy": jax.random.uniform(key, (1, batch)), "value": jax.random.normal(other, (1, batch, 1))}
            records = captured.records(kf.monte_carlo(loss, captured.prediction, noise), batch, fisher=kf.monte_carlo)
            updates, state = tx.update(captured.gradients(slope), state, params, records=records)
            params = optax.apply_updates(params, updates)
        return params, state, 1 - reward.mean()

    state = tx.init(params)
    missed = []
    for key in jax.random.split(keys[4], steps):
        params, state, value = iteration(params, state, key)
        missed.append(float(value))
    return missed


if __name__ == "__main__":
    print("reward missed", *main()[::10])
