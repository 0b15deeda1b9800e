"""Half precision at every door: what is computed and kept is float32, what is handed back is as it came."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import tree
from rows import METHODS

BLOCKS = {n: kf.Block(3, 4, rows=32, samples=32) for n in "ab"}


def half(kind, x):
    """x in the half precision of a framework."""
    if kind == "numpy":
        return x.astype(np.float16)
    if kind == "jax":
        return pytest.importorskip("jax.numpy").asarray(x, "bfloat16")
    torch = pytest.importorskip("torch")
    return torch.asarray(x).to(torch.bfloat16 if kind == "torch" else torch.float16)


kinds = pytest.mark.parametrize("kind", ["numpy", "torch", "torch16", "jax"])


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
@kinds
def test_every_init_keeps_float32(row, kind):
    like = half(kind, np.zeros(1))
    for x, y in zip(
        tree.leaves(row.method.init(BLOCKS["a"], like)),
        tree.leaves(row.method.init(BLOCKS["a"], np.zeros(1, np.float32))),
        strict=True,
    ):
        assert str(x.dtype).rpartition(".")[2] == str(y.dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"methods": {"a": kf.KFAC(), "b": kf.EKFAC()}},
        {"methods": {"a": kf.SINGD(), "b": kf.Identity()}},
        {"methods": kf.Diagonal(), "step": kf.Fixed(0.5, 0.9)},
        {"methods": kf.KFAC(), "step": kf.SelfTuning()},
        {"network": kf.TwoLevel()},
        {"network": kf.Tridiagonal(("a", "b")), "methods": None},
        {"network": kf.GlobalFNGD()},
    ],
    ids=lambda g: str(g)[:40],
)
@kinds
def test_a_step_of_halves_is_one_of_float32(given, kind, rng):
    pre = kf.Preconditioner(schedules=kf.Schedules(1e-7), **given)
    sizes = BLOCKS | {"b": kf.Block(4, 3, rows=32, samples=32)}
    a = {n: half(kind, rng.normal(size=(8, block.d_in))) for n, block in sizes.items()}
    g = {n: half(kind, 1e-4 * rng.normal(size=(8, block.d_out))) for n, block in sizes.items()}  # squares underflow
    v = {n: half(kind, 1e-4 * rng.normal(size=(block.d_out, block.d_in))) for n, block in sizes.items()}
    wide = {n: kf.xp.widen(x, "grad") for n, x in v.items()}
    found = []
    for like, grads in ((a["a"], v), (wide["a"], wide)):
        state = pre.init(sizes, like)
        records = {n: kf.Record(a[n], g[n], 8.0) for n in sizes}
        own = records if pre.rule.wants_own else None
        updates, state, info = pre.step(state, records, grads, loss=1.0, own=own)
        found.append((updates, state, info))
    assert found[0][2].counts() == found[1][2].counts()
    for n in sizes:
        assert found[0][0][n].dtype == v[n].dtype
        want = half(kind, kf.xp.to_host(found[1][0][n]))
        assert np.array_equal(kf.xp.to_host(found[0][0][n]), kf.xp.to_host(want))
    for x, y in zip(tree.leaves(found[0][1]), tree.leaves(found[1][1]), strict=True):
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


@kinds
def test_bytes_of_a_half_state_are_those_of_float32(kind):
    for given in ({"methods": kf.KFAC()}, {"network": kf.TwoLevel()}):
        pre = kf.Preconditioner(**given)
        assert pre.footprint(BLOCKS, half(kind, np.zeros(1))) == pre.footprint(BLOCKS)


@kinds
def test_a_posterior_of_halves_is_one_of_float32(kind, rng):
    a, g = (half(kind, rng.normal(size=shape)) for shape in ((8, 4), (8, 3)))
    mean = half(kind, rng.normal(size=(3, 4)))
    theta = half(kind, rng.normal(size=(3, 4)))
    curvature = kf.fit(kf.KFAC(), [{"a": kf.Record(a, g, 8.0)}])
    found = kf.Posterior({"a": mean}, curvature, 0.5)
    wide = kf.Posterior({"a": kf.xp.widen(mean, "mean")}, curvature, 0.5)
    w = kf.xp.widen(theta, "theta")
    assert float(found.energy({"a": theta})) == float(wide.energy({"a": w}))
    for name in ("matvec", "solve", "root", "sample"):
        x, y = (getattr(p, name)({"a": t[None, ...]})["a"] for p, t in ((found, theta), (wide, w)))
        assert np.array_equal(kf.xp.to_host(x), kf.xp.to_host(y))


def test_integers_are_refused():
    for method in (kf.KFAC(), kf.Diagonal(), kf.Exact()):
        with pytest.raises(TypeError, match="like has dtype int64"):
            method.init(BLOCKS["a"], np.zeros(1, np.int64))
    with pytest.raises(TypeError, match="like has dtype int64"):
        kf.Preconditioner(kf.Identity()).init(BLOCKS, np.zeros(1, np.int64))


@pytest.mark.parametrize("row", METHODS, ids=lambda r: r.name)
def test_a_wide_state_keeps_its_dtypes(row, rng):
    pre = kf.Preconditioner(row.method)
    state = pre.init(BLOCKS, np.zeros(1))
    records, grads = {}, {}
    for n in BLOCKS:
        a, g, v = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), (8, 3), (3, 4)))
        records[n] = kf.Record(a, g, 8.0, ids=np.arange(8))
        grads[n] = v
    updates, after, _ = pre.step(state, records, grads)
    assert [x.dtype for x in tree.leaves(after.layers)] == [x.dtype for x in tree.leaves(state.layers)]
    assert {x.dtype for x in updates.values()} == {np.dtype(np.float32)}
