"""What TwoLevel leaves out without changing its step: gradients not multiplied out, products kept as products, M's own
coordinates, images that are known. Dense float64 oracles and problem as in test_two_level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import kfaccore as kf
from kfaccore import network as net
from kfaccore.linalg.inverse import floored
from kfaccore.network.two_level.vectors import Outer
from kfaccore.xp.arrays import kept
from kfaccore.xp.memory import plus, same
from test_two_level import (
    DAMPING,
    SHAPES,
    SPACES,
    block_solutions,
    blocks,
    curvature,
    energy,
    fitted,
    flat,
    problem,
    solved,
)

ALL = SPACES | {"directions": net.Directions()}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@dataclass(frozen=True)
class Still(net.Residual):
    """The residual in the layer's own coordinates."""

    turns: ClassVar[bool] = False


def factored(rng, records, own=False):
    """Gradients of rows, those of the record's own inputs or of copies; the convolution's multiplied out."""
    found = {}
    for name, record in records.items():
        g = rng.normal(size=record.g.shape[1:])
        grad = kf.Factored(record.rows() if own else record.rows().copy(), g, 7.0)
        found[name] = grad.dense() if name == "conv" else grad
    return found


def dense(grads):
    return {n: g.dense() if isinstance(g, kf.Factored) else g for n, g in grads.items()}


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()])
@pytest.mark.parametrize("space", ALL)
def test_gradients_not_multiplied_out_give_the_same_step(rng, space, method):
    records, _ = problem(rng)
    two = kf.TwoLevel(method, ALL[space])
    for own in (True, False):
        grads = factored(np.random.default_rng(3), records, own)
        want = solved(two, records, dense(grads))
        found = solved(two, records, grads)
        np.testing.assert_allclose(flat(found.direction), flat(want.direction), **CLOSE)
        assert float(found.info["gain"]) == pytest.approx(float(want.info["gain"]), rel=1e-9)


@pytest.mark.parametrize("space", [name for name in ALL if name != "enriched"])
def test_a_gradient_of_the_records_own_inputs_is_never_multiplied_out(rng, space, monkeypatch):
    records, _ = problem(rng)
    grads = factored(rng, records, own=True)
    methods = [kf.KFAC(), kf.EKFAC()]
    wants = [solved(kf.TwoLevel(m, ALL[space]), records, dense(grads)) for m in methods]

    def refused(self):
        raise AssertionError("multiplied out")

    monkeypatch.setattr(kf.Factored, "dense", refused)
    for method, want in zip(methods, wants, strict=True):
        found = solved(kf.TwoLevel(method, ALL[space]), records, grads)
        np.testing.assert_allclose(flat(found.direction), flat(want.direction), **CLOSE)


def test_one_dense_gradient_multiplies_no_other_out(rng, monkeypatch):
    """Nicolaides with gradients of other inputs: only vectors that are no products need a gradient."""
    records, _ = problem(rng)
    grads = factored(rng, records)
    want = solved(kf.TwoLevel(), records, dense(grads))
    monkeypatch.setattr(kf.Factored, "dense", None)
    np.testing.assert_allclose(flat(solved(kf.TwoLevel(), records, grads).direction), flat(want.direction), **CLOSE)


def shapes(tree):
    return [np.shape(leaf) for leaf in kf.tree.leaves(tree)]


@pytest.mark.parametrize("method", [kf.KFAC(), kf.KFAC(inverse=kf.eigh), kf.EKFAC(), kf.Exact()])
def test_powers_are_products_where_the_inverse_is_one(rng, method):
    records, grads = problem(rng)
    two = kf.TwoLevel(method, net.Krylov(order=3))
    empty, (state, hypers) = two.init(blocks(records), grads["first"]), fitted(two, records)
    assert shapes(state) == shapes(empty)
    product = isinstance(method, kf.KFAC) and method.inverse is kf.cholesky
    for name, (_, powers) in state.kept.items():
        v = np.ones((1, *SHAPES[name]))
        for before, power in zip(empty.kept[name][1], powers, strict=True):
            assert isinstance(power, Outer) == isinstance(before, Outer) == product
            v = method.solve(state.layers[name], v, hypers[name]).direction
            found = power.dense() if product else power
            np.testing.assert_allclose(found / np.abs(found).max(), v / np.abs(v).max(), **CLOSE)
            assert not np.any(before.dense() if product else before)


@pytest.mark.parametrize("space", ALL)
def test_cholesky_and_eigenvectors_give_the_same_step(rng, space):
    records, grads = problem(rng)
    found = [solved(kf.TwoLevel(kf.KFAC(inverse=i), ALL[space]), records, grads) for i in (kf.cholesky, kf.eigh)]
    np.testing.assert_allclose(flat(found[1].direction), flat(found[0].direction), rtol=1e-9, atol=1e-10)
    assert float(found[1].info["gain"]) == pytest.approx(float(found[0].info["gain"]), rel=1e-8)


@pytest.mark.parametrize("correction", [net.deflate_last, net.deflate_first, net.balance, net.add])
@pytest.mark.parametrize("method", [kf.EKFAC(), kf.KFAC(inverse=kf.eigh)])
def test_the_coordinates_change_nothing(rng, method, correction):
    """Turned or not, one vector or its powers; gain and codes too. The convolution stays as it is either way."""
    records, _ = problem(rng)
    for grads in (problem(rng)[1], factored(rng, records, own=True), factored(rng, records)):
        for turned, still in ((net.Residual(), Still()), (net.Krylov(net.Residual(), 3), net.Krylov(Still(), 3))):
            want = solved(kf.TwoLevel(method, still, correction), records, grads)
            two = kf.TwoLevel(method, turned, correction)
            found = solved(two, records, grads)
            state, hypers = fitted(two, records)
            assert set(two._turned(state, hypers, records)) == {"first", "third", "head"}
            scale = {"rtol": 1e-7, "atol": 1e-7 * np.abs(flat(want.direction)).max()}
            np.testing.assert_allclose(flat(found.direction), flat(want.direction), **scale)
            assert float(found.info["gain"]) == pytest.approx(float(want.info["gain"]), rel=1e-7, abs=1e-9)
            assert found.code == want.code


def test_coordinates_of_blocks_tables_and_flat_gradients(rng):
    """An embedding stays, a stack of blocks turns, and a gradient without its blocks axis comes back without."""
    records = {
        "table": kf.Record(kf.Ids(rng.integers(0, 6, (5, 3)), 6), rng.normal(size=(2, 5, 3, 2)), 5.0),
        "heads": kf.Record(rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(2, 2, 5, 3, 3)), 5.0),
        "plain": kf.Record(rng.normal(size=(5, 3)), rng.normal(size=(2, 5, 2)), 5.0),
    }
    grads = {n: rng.normal(size=(r.blocks, r.d_out, r.d_in)) for n, r in records.items()}
    grads["plain"] = grads["plain"][0]
    found, want = (solved(kf.TwoLevel(kf.EKFAC(), s), records, grads) for s in (net.Residual(), Still()))
    for name, g in grads.items():
        assert found.direction[name].shape == g.shape
        np.testing.assert_allclose(found.direction[name], want.direction[name], rtol=1e-9, atol=1e-10)


def test_what_is_not_finite_in_other_coordinates_is_a_code(rng):
    records, grads = problem(rng)
    bad = {**grads, "third": np.full_like(grads["third"], np.nan)}
    two = kf.TwoLevel(kf.EKFAC(), net.Krylov(net.Residual()))
    state, hypers = fitted(two, records)
    found = two.solve(state, bad, hypers, records)
    assert np.isfinite(flat(found.direction)).all()
    assert not found.direction["third"].any()
    assert found.code["third"][0] == kf.Code.NONFINITE
    alone = kf.EKFAC().solve(state.layers["first"], grads["first"], hypers["first"]).direction
    np.testing.assert_allclose(found.direction["first"], alone, **CLOSE)


@pytest.mark.parametrize("own", [True, False])
def test_directions_are_the_best_lengths_of_the_layers(rng, own):
    """TWOLEVEL-1: z_l = (1 + beta_l) z0_l with R_l = z0_l: the dense minimiser, its gain, and R (g - F_d z) = 0."""
    records, _ = problem(rng)
    grads = factored(rng, records, own)
    F, g, z0 = curvature(records), flat(dense(grads)), flat(block_solutions(records, grads))
    R, at = np.zeros((4, len(z0))), 0
    for i, (d_out, d_in) in enumerate(SHAPES.values()):
        part = slice(at, at + d_out * d_in)
        R[i, part], at = z0[part], part.stop
    beta = np.linalg.solve(R @ F @ R.T, R @ (g - F @ z0))
    found = solved(kf.TwoLevel(space=net.Directions()), records, grads)
    z = flat(found.direction)
    np.testing.assert_allclose(z, z0 + R.T @ beta, **CLOSE)
    gain = float(found.info["gain"])
    assert gain == pytest.approx(energy(F, z, g) - energy(F, z0, g), rel=1e-10, abs=1e-11)
    assert gain < 0
    assert np.linalg.norm(R @ (g - F @ z)) <= 1e-10 * np.linalg.norm(g)


def test_directions_need_one_product_in_all(rng, monkeypatch):
    records, _ = problem(rng)
    grads, calls = factored(rng, records, own=True), []
    state, hypers = fitted(two := kf.TwoLevel(space=net.Directions()), records)
    for room in (net.two_level.two_level, net.two_level.products):
        inner = room.outputs
        monkeypatch.setattr(room, "outputs", lambda r, *v, inner=inner: calls.append(len(v)) or inner(r, *v))
    two.solve(state, grads, hypers, records)
    assert calls == [1] * 4


@pytest.mark.parametrize("method", [kf.KFAC(), kf.EKFAC()])
def test_every_namespace_takes_the_shortcuts(xp, method):
    if xp.name == "jax":
        pytest.skip("as in test_two_level")
    for space in (net.Directions(), net.Krylov(), net.Krylov(net.Residual())):
        answers = []
        for put in (np.array, xp.put):
            records, _ = problem(np.random.default_rng(5), put)
            names = ("first", "third", "head")
            records, rng = {n: records[n] for n in names}, np.random.default_rng(6)
            grads = {n: kf.Factored(r.a, put(rng.normal(size=(1, 9, 1, r.d_out))), 9.0) for n, r in records.items()}
            answers.append(solved(kf.TwoLevel(method, space), records, grads).direction)
        for name, want in answers[0].items():
            np.testing.assert_allclose(xp.get(answers[1][name]), want, rtol=1e-9, atol=1e-10)


def test_inputs_and_states_are_left_alone(rng):
    """Also where a direction is the gradient itself, and sums are written in place."""
    records, grads = problem(rng)
    before = {n: g.copy() for n, g in grads.items()}
    for method in (kf.Identity(), kf.KFAC(), kf.EKFAC()):
        for space in (net.Nicolaides(), net.Krylov(), net.Residual(), net.Krylov(net.Residual()), net.Directions()):
            two = kf.TwoLevel(method, space)
            state, hypers = fitted(two, records)
            kept = [np.array(leaf) for leaf in kf.tree.leaves(state)]
            first, again = (flat(two.solve(state, grads, hypers, records).direction) for _ in range(2))
            assert np.array_equal(first, again)
            assert all(np.array_equal(a, b) for a, b in zip(kept, kf.tree.leaves(state), strict=True))
    assert all(np.array_equal(grads[n], before[n]) for n in grads)


def test_a_checkpoint_with_products_continues_bit_for_bit(rng, tmp_path):
    records, grads = problem(rng)
    pre = kf.Preconditioner(network=kf.TwoLevel(space=net.Krylov(order=3)), schedules=kf.Schedules(DAMPING))
    _, state, _ = pre.step(pre.init(blocks(records), grads["first"]), records, grads)
    kf.save(tmp_path / "state", state)
    again = kf.load(tmp_path / "state", pre.init(blocks(records), grads["first"]))
    one, two = (flat(pre.step(s, records, grads)[0]) for s in (state, again))
    assert np.array_equal(one, two)


def test_the_same_memory_is_the_same_array(rng):
    x = rng.normal(size=(3, 4))
    assert same(x, x)
    assert same(x[None], x[None])
    assert not same(x, x.copy())
    assert not same(x, x.T)
    assert not same(x[1:], x[:2])
    assert not same(x, x.view(np.int64))


def test_sums_in_place_and_blanks(rng):
    x, y = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    want = x - 0.3 * y
    np.testing.assert_allclose(plus(x.copy(), -0.3, y), want, rtol=1e-14)
    np.testing.assert_allclose(plus(x.copy(), -0.3, np.asfortranarray(y)), want, rtol=1e-14)
    np.testing.assert_allclose(plus(np.asfortranarray(x), -0.3, y), want, rtol=1e-14)
    np.testing.assert_allclose(plus(x.astype(np.float32), -0.3, y), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(kept(x, np.array([True, False]), 0.0), np.stack([x[0], 0 * x[1]]))
    assert kept(x, np.array([True, True]), 0.0) is x


def test_floors_of_denominators(rng):
    """A block in order, one before its first refresh, one with an eigenvalue under eps of the largest."""
    below = rng.uniform(1.0, 2.0, size=(3, 2, 4))
    below[2, 1, 1], below[1, 0, 0] = 1e-30, 0.0
    code = np.array([kf.Code.OK, kf.Code.IDENTITY, kf.Code.OK])
    found, codes = floored(below, code)
    assert codes.tolist() == [kf.Code.OK, kf.Code.IDENTITY, kf.Code.JITTERED]
    np.testing.assert_array_equal(found[0], below[0])
    np.testing.assert_array_equal(found[1], np.ones((2, 4)))
    want = below[2].copy()
    want[1, 1] = np.finfo(float).eps * want.max()
    np.testing.assert_array_equal(found[2], want)
