"""Masks of sequences that are turned round before a layer, where padding stands before them."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj, lax

N, TIME = 3, 4
X = normal((N, TIME, 2), seed=2)
MASK = jnp.arange(TIME) < jnp.asarray([2, 3, 4])[:, None]
PARAMS = dict(zip("wvu", normal((2, 3), (2, 3), (3, 3)), strict=True))


def steps(w, u, x, mask, reverse=False):
    """(batch, time, 3) of a recurrence that stands still at padding."""

    def turn(h, given):
        x, m = given
        h = jnp.where(m[:, None] > 0, jnp.tanh(x @ w + h @ u), h)
        return h, h

    start = jnp.zeros((len(x), 3))
    return lax.scan(turn, start, (x.swapaxes(0, 1), mask.T), reverse=reverse)[1].swapaxes(0, 1)


def flipped(p, x, m):
    return jnp.flip(steps(p["v"], p["u"], jnp.flip(x, 1), jnp.flip(m, 1)), 1)


BACKWARDS = {
    "a product": lambda p, x, m: jnp.flip(jnp.flip(x, 1) @ p["v"], 1),
    "a recurrence": flipped,
    "under jit": jax.jit(flipped),
    "under vmap": lambda p, x, m: jax.vmap(lambda x: (x[::-1] @ p["v"])[::-1])(x),
    "positions joined": lambda p, x, m: (x[:, ::-1].reshape(-1, 2) @ p["v"]).reshape(*x.shape[:2], 3)[:, ::-1],
}
FORWARDS = {
    "turned back before it": lambda p, x, m: jnp.flip(jnp.tanh(jnp.flip(x, 1)), 1) @ p["v"],
    "a scan in reverse": lambda p, x, m: steps(p["v"], p["u"], x, m, reverse=True),
    "beside numbers that run backwards": lambda p, x, m: (x + jnp.arange(x.shape[1])[::-1, None]) @ p["v"],
    "columns turned": lambda p, x, m: x[..., ::-1] @ p["v"],
    "after both ways": lambda p, x, m: jnp.tanh(x @ p["w"] + flipped(p, x, m))[..., :2] @ p["v"],
}


def masks(apply):
    def pooled(p, x, m):
        return ((x @ p["w"] + apply(p, x, m)) * m[..., None]).sum(1)

    plan = kj.plan(pooled, PARAMS, X, MASK * 1.0, batched=(0, 1))

    @jax.jit
    def records(p):
        return kj.capture(plan, p, X, MASK * 1.0).records(jnp.ones((1, N, 3)), N, fisher=kf.monte_carlo, mask=MASK)

    found = records(PARAMS)
    return found["w"], found["v"]


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_mask_is_turned_round_with_its_sequence(name):
    one, two = masks(BACKWARDS[name])
    np.testing.assert_array_equal(one.mask, MASK)
    np.testing.assert_array_equal(two.mask[:, :TIME], MASK[:, ::-1])
    valid = jnp.sum(MASK)
    for record in (one, two):  # the same words, whichever way they are read
        rows = record.a[0, :, :TIME] * record.mask[:, :TIME, None]
        want = jnp.einsum("bti,btj,bt->ij", X, X, 1.0 * MASK) / valid
        np.testing.assert_allclose(jnp.einsum("bti,btj->ij", rows, rows) / valid, want, rtol=1e-12)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_mask_stays_as_it_is_where_positions_do(name):
    for record in masks(FORWARDS[name]):
        np.testing.assert_array_equal(record.mask[:, -TIME:], MASK)  # of the last call


MIXED = {"both ways at once": lambda x: x + x[:, ::-1], "sorted": lambda x: jnp.sort(x, 1)}


@pytest.mark.parametrize("name", MIXED)
def test_rows_in_another_order_are_asked_for(name):
    with pytest.raises(ValueError, match=r"layer 'v' has rows of shape .* or has them in another order: give mask="):
        masks(lambda p, x, m: MIXED[name](x) @ p["v"])
