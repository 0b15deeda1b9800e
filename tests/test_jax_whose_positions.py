"""Masks: whose positions they mean is seen from which arrays go together, never from sizes; entries are flags."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from jax_models import normal
from jax_needed import jax, jnp, kj

THERE = jnp.arange(5)[None] < jnp.array([5, 3, 2, 4])[:, None]
P = dict(zip("edqvo", normal((3, 4), (3, 4), (4, 4), (4, 4), (4, 2)), strict=True))
SOURCE, TARGET = normal((4, 5, 3), (4, 5, 3), seed=2)
TABLE = {**P, "p": normal((5, 4), seed=3), "s": normal((5, 4), seed=4)}


def translated(p, source, target, there):
    e = jnp.tanh(source @ p["e"])
    d = jnp.tanh(target @ p["d"])
    a = jnp.einsum("btd,bsd->bts", d @ p["q"], e) + jnp.where(there, 0, -1e9)[:, None]
    return ((d + jax.nn.softmax(a) @ (e @ p["v"])) @ p["o"]).sum(1)


def records(apply, params, args, mask):
    plan = kj.plan(apply, params, *args, batched=tuple(range(len(args))))
    captured = kj.capture(plan, params, *args)
    draws = kf.type2(kf.Gaussian(), captured.prediction)
    return captured.records(draws, 4, fisher=kf.type2, mask=mask)


def kept(found):
    return {name: None if x.mask is None else np.asarray(x.mask).sum() for name, x in found.items()}


def test_positions_of_two_arguments_of_one_length_are_told_apart():
    args = SOURCE, TARGET, THERE
    with pytest.raises(ValueError, match=r"layers \['d', 'q', 'o'\] and \['e', 'v'\] have rows of one each"):
        records(translated, P, args, THERE)
    given = kept(records(translated, P, args, {"e": THERE, "v": THERE}))
    assert given == {"e": 14, "v": 14, "d": None, "q": None, "o": None}

    def joined(p, source, target, there):  # positions joined with the batch
        h = target.reshape(-1, 3) @ p["d"]
        return translated(p, source, target, there) + (jnp.tanh(h) @ p["o"]).reshape(len(target), -1, 2).sum(1)

    with pytest.raises(ValueError, match="which of them the mask means cannot be seen"):
        records(joined, P, args, THERE)

    def edges(p, nodes, edges, nodes_there, edges_there):  # two sets, of two arrays each
        h = jnp.tanh(nodes @ p["e"]) * nodes_there[..., None]
        return (h.sum(1) + (jnp.tanh(edges @ p["d"]) * edges_there[..., None]).sum(1)) @ p["o"]

    with pytest.raises(ValueError, match=r"layers \['e'\] and \['d'\]"):
        records(edges, {n: P[n] for n in "edo"}, (SOURCE, TARGET, THERE, THERE), THERE)


def test_arrays_that_go_together_are_one_set():
    """Tokens, their types and a mask; a mask of pairs of positions; an argument that nothing reads."""

    def apply(p, source, target, there, pairs, unread):
        x = jnp.tanh(source @ p["e"]) + jnp.tanh(target @ p["d"])
        a = jnp.where(pairs, x @ p["q"] @ x.mT, -1e9)
        return ((jax.nn.softmax(a) @ (x @ p["v"])) * there[..., None]).sum(1) @ p["o"]

    pairs = THERE[:, None] & THERE[:, :, None]
    found = kept(records(apply, P, (SOURCE, TARGET, THERE, pairs, SOURCE), THERE))
    assert found == {**dict.fromkeys("edqv", 14), "o": None}


def test_tables_of_positions_get_longer_too():
    def apply(p, source, there):
        assert source.shape[1] <= 5, "longer than the table"
        h = jnp.tanh(source @ p["e"] + p["p"][: source.shape[1]])
        a = jnp.where(there[:, None], h @ p["q"] @ h.mT, -1e9)
        return (jax.nn.softmax(a) @ h @ p["v"]).sum(1) @ p["o"]

    params = {name: TABLE[name] for name in "epqvo"}
    even = {**params, "p": normal((4, 4), seed=3)}
    with pytest.raises(ValueError, match=r"layer 'e' has rows of shape \(1, 5\) an example, layer 'p' .* layer 'v'"):
        records(apply, params, (SOURCE, THERE), THERE)
    found = kept(records(apply, even, (SOURCE[:, :4], THERE[:, :4]), THERE[:, :4]))  # runs at half the length
    assert found == {**dict.fromkeys("epqv", 13), "o": None}


@pytest.mark.parametrize("slots", [5, 6])
def test_as_many_queries_as_positions_are_none(slots):
    """Rows of a table that has the positions' number and is not theirs."""

    def apply(p, source, there):
        h = jnp.tanh(source @ p["e"] + p["p"])
        q = jnp.broadcast_to(p["s"], (len(source), *p["s"].shape))
        a = jax.nn.softmax(q @ h.mT + jnp.where(there, 0, -1e9)[:, None])
        return jnp.tanh(a @ h @ p["o"]).sum(1)

    params = {**{name: TABLE[name] for name in "epo"}, "s": normal((slots, 4), seed=4)}
    with pytest.raises(ValueError, match=rf"^layer 'o' has rows of shape \(1, {slots}\) an example, and which of them"):
        records(apply, params, (SOURCE, THERE), THERE)
    found = kept(records(apply, params, (SOURCE, THERE), {"e": THERE, "p": THERE}))
    assert found == {"e": 14, "p": 14, "s": None, "o": None}


def pooled(p, source, there):
    return (jnp.tanh(source @ p["e"]) * (there > 0)[..., None]).sum(1) @ p["o"]


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_mask_is_of_flags(by_layer):
    """0 and 1 in any dtype; an additive one is refused; under jit the code of its step is NONFINITE."""
    params = {"e": P["e"], "o": P["o"]}
    plan = kj.plan(pooled, params, SOURCE, THERE, batched=(0, 1))
    tx = kj.kfac(plan)

    def step(mask):
        captured = kj.capture(plan, params, SOURCE, THERE)
        draws = kf.type2(kf.Gaussian(), captured.prediction)
        given = captured.records(draws, 4, fisher=kf.type2, mask={"e": mask} if by_layer else mask)
        return tx.update(captured.gradients(captured.prediction / 4), tx.init(params), params, records=given)

    want = step(THERE)[0]
    jitted = jax.jit(step)
    for mask in (THERE.astype(float), THERE.astype(int), np.asarray(THERE)):
        for run in (step, jitted):
            for a, b in zip(jax.tree.leaves(run(mask)[0]), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    for wrong in (jnp.where(THERE, 0.0, -1e9), jnp.where(THERE, 0.0, -jnp.inf), jnp.where(THERE, 0.5, 0.0)):
        with pytest.raises(ValueError, match=r"mask.* has entries such as .* of an additive mask.* give mask == 0"):
            step(wrong)
        assert int(jitted(wrong)[1].codes["e"][0]) == kf.Code.NONFINITE
