"""Every example's own share of a direction against brute force, one example at a time, for all that offer it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.linalg.shares import shares
from kfaccore.network.two_level.local import inverse_product
from kfaccore.network.two_level.vectors import Outer
from kfaccore.step.own import Own, solve_of
from rows import METHODS

HYPER = kf.Hyper(0, 0.9, 0.03)
B = 5


def patches(rng, groups=1):
    shape = (B, 4, 4, 2) if groups == 1 else (groups, B, 4, 4, 2)
    return kf.Patches(rng.normal(size=shape), kf.Window((2, 2)), bias=True)


KINDS = {  # a, blocks, positions, d_out, mask
    "dense": lambda rng: (rng.normal(size=(B, 4)), 1, 1, 3, None),
    "dense, stacked": lambda rng: (rng.normal(size=(2, B, 1, 4)), 2, 1, 3, None),
    "positions": lambda rng: (rng.normal(size=(B, 3, 4)), 1, 3, 6, None),
    "many positions": lambda rng: (rng.normal(size=(B, 9, 2)), 1, 9, 3, None),  # also a tied layer: more positions
    "masked": lambda rng: (rng.normal(size=(B, 3, 4)), 1, 3, 3, rng.random((B, 3)) < 0.6),
    "convolution": lambda rng: (patches(rng), 1, 9, 3, None),
    "convolution, groups": lambda rng: (patches(rng, 2), 2, 9, 3, None),
    "embedding": lambda rng: (kf.Ids(rng.integers(0, 4, (B, 6)), 4), 1, 6, 3, None),
    "one id": lambda rng: (kf.Ids(rng.integers(0, 4, (B, 1)), 4), 1, 1, 3, None),
    "gain": lambda rng: (np.ones((B, 5, 1)), 1, 5, 3, None),
    "norm's bias": lambda rng: (np.ones((B, 1, 1)), 1, 1, 3, None),
}
EXTRA = {
    "kfac, eigh": kf.KFAC(inverse=kf.eigh, split=kf.exact),
    "kfac, reduce": kf.KFAC(kf.reduce),
    "kfac, eigh, relative": kf.KFAC(inverse=kf.eigh, split=kf.Relative(kf.exact)),
    "tkfac, eigh, its own units": kf.TKFAC(inverse=kf.eigh, damping=kf.Adaptive()),
    "ekfac, reduce": kf.EKFAC(kf.reduce),
    "brand, cut": kf.BrandKFAC(rank=kf.Rank(2, 2)),
    "randomized, cut": kf.RandomizedKFAC(rank=kf.Rank(2, 2), sketch=kf.Symmetric(oversample=1)),
}
ALL = {row.name: row.method for row in METHODS if not row.no_matrix} | EXTRA
OFFERED = {
    name: method for name, method in ALL.items() if hasattr(method, "inverses") or hasattr(method, "eigensystem")
}


def layer(kind, method, rng, draws=2):
    """(drawn record, own record, settled state); SkipTest where the method refuses the layer."""
    a, blocks, positions, d_out, mask = KINDS[kind](rng)
    shape = (blocks, B, positions, d_out)
    drawn, own = (kf.Record(a, rng.normal(size=(v, *shape)), 7.0, mask) for v in (draws, 1))
    try:
        return drawn, own, kf.settle(method, drawn, damping=HYPER.damping)
    except TypeError:
        pytest.skip("refused by this method")


def brute(method, state, drawn, own):
    """(s, q) with one solve an example."""
    J, H = drawn.examples(), own.examples()[0]
    x = [method.solve(state, H[:, b], HYPER).direction for b in range(B)]
    s = np.array([[np.sum(J[v, :, b] * x[b]) for b in range(B)] for v in range(drawn.draws)])
    return s, sum(np.sum(H[:, b] * x[b]) for b in range(B))


@pytest.mark.parametrize("name", OFFERED)
def test_shares_are_one_solve_an_example(name, rng):
    method, tried = OFFERED[name], 0
    for kind in KINDS:
        try:
            drawn, own, state = layer(kind, method, rng)
        except pytest.skip.Exception:
            continue
        tried += 1
        s, q = shares(drawn, own, solve_of(method, state, HYPER))
        want, total = brute(method, state, drawn, own)
        np.testing.assert_allclose(s, want, rtol=1e-12, atol=1e-12 * np.abs(want).max(), err_msg=kind)
        assert q == pytest.approx(total, rel=1e-12), kind
    assert tried >= len(KINDS) - 2  # only an embedding may be refused


def test_the_loss_s_own_gradients_count_over_their_own_n(rng):
    """g / n is what they are, whatever the n of the draws."""
    method = kf.KFAC()
    drawn, own, state = layer("positions", method, rng)
    solving = {"x": (method, state, HYPER)}
    found = Own({"x": own}, solving).shares({"x": drawn}, {"x": 0.2})
    halved = Own({"x": kf.Record(own.a, own.g / 4, own.n / 4)}, solving).shares({"x": drawn}, {"x": 0.2})
    np.testing.assert_allclose(found.s, halved.s, rtol=1e-14)
    assert found.q == pytest.approx(halved.q, rel=1e-14)


@pytest.mark.parametrize("solve", ["inverses", "eigensystem"])
def test_rows_or_examples_whichever_is_smaller(rng, solve, monkeypatch):
    """Both ways are one number."""
    method = kf.KFAC() if solve == "inverses" else kf.EKFAC()
    drawn, own, state = layer("many positions", method, rng)
    given = solve_of(method, state, HYPER)
    assert not given.by_rows(own.shared, own.d_in, own.d_out)
    by_examples = shares(drawn, own, given)
    monkeypatch.setattr(type(given), "by_rows", lambda *_: True)
    by_rows = shares(drawn, own, given)
    np.testing.assert_allclose(by_examples[0], by_rows[0], rtol=1e-12)
    assert by_examples[1] == pytest.approx(by_rows[1], rel=1e-12)


LOW_RANK = {
    "brand": kf.BrandKFAC(rank=kf.Rank(4, 4)),
    "randomized": kf.RandomizedKFAC(rank=kf.Rank(4, 4)),
}


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize(("d_out", "d_in"), [(3, 1500), (1500, 3)])
def test_shares_by_modes_make_no_matrix_of_a_wide_side(name, d_out, d_in, rng):
    """Linear in the width, for a step's own shares and for the M^-1 of a coarse space."""
    method = LOW_RANK[name]
    a = rng.normal(size=(B, d_in))
    drawn, own = (kf.Record(a, rng.normal(size=(v, 1, B, 1, d_out)), 7.0) for v in (2, 1))
    state = kf.settle(method, drawn, damping=HYPER.damping)
    v = Outer(rng.normal(size=(1, d_out)), rng.normal(size=(1, d_in)))
    tracemalloc.start()
    s, q = shares(drawn, own, solve_of(method, state, HYPER))
    product = inverse_product(method, state, HYPER, v)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1500 * 1500  # bytes: an eighth of one such matrix
    want, total = brute(method, state, drawn, own)
    np.testing.assert_allclose(s, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
    assert q == pytest.approx(total, rel=1e-12)
    solved = method.solve(state, v.dense(), HYPER).direction
    np.testing.assert_allclose(product.dense(), solved, rtol=1e-12, atol=1e-12 * np.abs(solved).max())


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rule", [kf.SelfTuning(), kf.Fixed(rescale=kf.Noise())], ids=lambda rule: type(rule).__name__)
def test_a_step_of_a_wide_layer_is_linear_in_its_width(rule, own, rng):
    a, g, h = rng.normal(size=(B, 1500)), rng.normal(size=(1, B, 3)), rng.normal(size=(1, B, 3))
    pre = kf.Preconditioner({"fc": LOW_RANK["brand"]}, clocks=kf.Clocks(1, 1), step=rule)
    state = pre.init({"fc": kf.Block(3, 1500)}, a)
    given = {"own": {"fc": kf.Record(a, h, 5.0)}} if own else {}
    tracemalloc.start()
    pre.step(state, {"fc": kf.Record(a, g, 5.0)}, {"fc": h[0].T @ a / 5}, loss=1.0, **given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1500 * 1500
