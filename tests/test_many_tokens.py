"""Embeddings of long sequences: what pairs up positions of one id holds memory linear in the positions, or a bound."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.methods.rows import units
from kfaccore.record.squares import squares


def close(x, y, tolerance):
    x, y = np.asarray(x), np.asarray(y)
    return np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def peak_of(run: Callable) -> tuple:
    """What `run` gives, and the bytes that it held at most."""
    tracemalloc.start()
    found = run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found, peak


def tokens(rng, batch, positions, size, d_out=2):
    words = rng.integers(0, size, (batch, positions))
    return kf.Record(kf.Ids(words, size), rng.normal(size=(batch, positions, d_out)), float(batch))


def tables(record):
    """Per-example gradients (batch, size, d_out), added up id by id."""
    found = np.zeros((record.batch, record.a.size, record.d_out))
    for n in range(record.batch):
        np.add.at(found[n], record.a.index[n], record.g[0, 0, n])
    return found


@pytest.mark.parametrize("size", [3, 10**6])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("held", [1, 100, 10**5])
def test_gram_of_an_embedding_is_summed_by_id(size, draws, held, xp, rng, monkeypatch):
    """FNGD-1: K_nm = sum_st [id_ns = id_mt] <g_ns, g_mt>, also of tables too long for a one-hot row; masked."""
    B, T, d = 5, 4, 3
    words = rng.integers(0, 3, (B, T)) * (size // 3)
    mask = rng.random((B, T)) < 0.8
    g = rng.normal(size=(draws, B, T, d))
    record = kf.Record(kf.Ids(xp.put(words), size), xp.put(g), 5.0, xp.put(mask))
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", held)
    monkeypatch.setattr("kfaccore.xp.chunks.CACHED", held)
    same = (words[:, None, :, None] == words[None, :, None, :]) & mask[:, None, :, None] & mask[None, :, None, :]
    K = np.einsum("nmst,vnso,wmto->vnwm", same, g, g).reshape(draws * B, -1)
    assert close(xp.get(units.gram(record))[0], K, 1e-14)


def test_gram_of_an_embedding_is_linear_in_the_positions(rng):
    """A pair of all positions would hold (8 x 400)^2 numbers."""
    record = tokens(rng, 8, 400, 5000)
    K, peak = peak_of(lambda: units.gram(record)[0])
    assert peak < 8 * (8 * 400) ** 2 / 10
    table = tables(record).reshape(8, -1)
    assert close(K, table @ table.T, 1e-14)


@pytest.mark.parametrize("net", [False, True])
def test_natural_gradient_of_long_sequences(net, rng, monkeypatch):
    """(F + damping I)^-1 V of one embedding, from the layer's own and from the network's coefficients."""
    monkeypatch.setattr("kfaccore.xp.chunks.CACHED", 100)  # as longer sequences have it
    record = tokens(rng, 6, 8, 7)
    J = np.moveaxis(tables(record), 2, 1).reshape(6, -1)
    V = J.sum(axis=0) / 6
    given = {"network": kf.GlobalFNGD(steps=0)} if net else {"methods": kf.FNGD(steps=0)}
    pre = kf.Preconditioner(**given, schedules=kf.Schedules(damping=0.1))
    state = pre.init({"fc": kf.Block.of(record)}, record.g)
    found = pre.step(state, {"fc": record}, {"fc": V.reshape(2, 7)}, fisher=kf.empirical)[0]["fc"]
    want = np.linalg.solve(J.T @ J / 6 + 0.1 * np.eye(14), V).reshape(2, 7)
    assert close(found, want, 1e-11)


def test_squares_of_an_embedding_are_held_some_examples_at_a_time(rng, monkeypatch):
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", 1 << 20)
    record = tokens(rng, 8, 1000, 50)
    found, peak = peak_of(lambda: squares(record)[0])
    assert peak < 8 * 8 * 1000**2 / 2  # bytes of half of all pairs
    assert close(found, (tables(record) ** 2).sum(axis=0).T, 1e-14)


def test_gram_of_pairs_is_held_some_examples_at_a_time(rng, monkeypatch):
    record = kf.Record(rng.normal(size=(64, 32, 8)), rng.normal(size=(64, 32, 8)), 64.0)
    J = record.examples()[0, 0].reshape(64, -1)
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", 1 << 18)
    K, peak = peak_of(lambda: units.gram(record, True)[0])
    assert peak < 8 * (64 * 32) ** 2 / 2  # bytes of half of all pairs
    assert close(K, J @ J.T, 1e-13)


@pytest.mark.parametrize("held", [100, 300])
def test_gram_of_an_embedding_under_jit(held, rng, monkeypatch):
    """In one loop, with units left over."""
    jax = pytest.importorskip("jax")
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", held)
    words, g = rng.integers(0, 9, (5, 4)), rng.normal(size=(2, 5, 4, 3))
    with jax.enable_x64(True):
        found = jax.jit(lambda i, g: units.gram(kf.Record(kf.Ids(i, 9), g, 5.0)))(words, g)
    assert close(found, units.gram(kf.Record(kf.Ids(words, 9), g, 5.0)), 1e-14)
