"""TwoLevel on every block method that can serve, against z0 + R^T F_c^-1 R (g - F_d z0) from dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag

import kfaccore as kf
from kfaccore import network as net
from kfaccore.linalg.cg import CG, Residual
from kfaccore.method import Inverses, RowsAtSolve, Terms, declares

DAMPING = 0.05
SHAPES = {"first": (3, 4), "head": (2, 3)}
SPACES = {"nicolaides": net.Nicolaides(), "krylov": net.Krylov(net.Nicolaides())}
CUT = kf.Rank(cap=2, start=2, floor=1)  # fewer modes than either side has
CATALOGUE = {name: method() for name, method in kf.methods.CATALOGUE.items()}
SERVE = {name: m for name, m in CATALOGUE.items() if not (declares(m, RowsAtSolve) or declares(m, Terms))} | {
    "kfac-eigh": kf.KFAC(inverse=kf.eigh),
    "kfac-exact": kf.KFAC(inverse=kf.eigh, split=kf.exact),
    "tkfac-eigh": kf.TKFAC(inverse=kf.eigh),
    "kpsvd-eigh": kf.KPSVD(inverse=kf.eigh),
    "skfac": kf.SKFAC(),
    "cgfac": kf.CGFAC(solver=CG(stop=Residual(1e-14), limit=200)),
    "randomized-cut": kf.RandomizedKFAC(rank=CUT, sketch=kf.Symmetric(oversample=1), outside=kf.lowest, start=1.0),
    "brand-cut": kf.BrandKFAC(rank=CUT, outside=kf.nothing),
    "brand-r-cut": kf.BrandRKFAC(rank=CUT, sketch=kf.Singular(oversample=1)),
    "brand-c-cut": kf.BrandCKFAC(rank=CUT),
}
CASES = [(name, space) for name in SERVE for space in SPACES if name != "identity" or space != "krylov"]  # 1 = M^-1 1
BY_MODES = {name: m for name, m in SERVE.items() if name.startswith(("randomized", "brand"))}


def problem(rng, draws=2, batch=9):
    """Records of one batch that share a cause, so that F has strong blocks between layers, and gradients."""
    cause = rng.normal(size=(batch, 1, 1))
    records = {}
    for name, (d_out, d_in) in SHAPES.items():
        a = rng.normal(size=(batch, 1, d_in)) + cause
        g = rng.normal(size=(draws, batch, 1, d_out)) * (0.5 + cause) + 0.4 * cause
        records[name] = kf.Record(a, g, float(batch))
    return records, {name: rng.normal(size=(1, *shape)) for name, shape in SHAPES.items()}


def fitted(method, records):
    """States at a refresh, and after one more update: EKFAC's moments are in the basis of that refresh."""
    hypers = {name: kf.Hyper(0, 0.5, DAMPING) for name in records}
    blocks = {name: kf.Block.of(record) for name, record in records.items()}
    state = method.init(blocks, records["first"].g)
    state = method.update(state, method.measure(state, records, hypers), hypers)
    refreshed = method.refresh(state, hypers)
    return refreshed, method.update(refreshed, method.measure(refreshed, records, hypers), hypers), hypers


def flat(tree):
    return np.concatenate([np.ravel(tree[name]) for name in SHAPES])


def units(name):
    """The standard basis of a layer, each (1, d_out, d_in)."""
    size = SHAPES[name][0] * SHAPES[name][1]
    return np.eye(size).reshape(size, 1, *SHAPES[name])


def inverse_of_blocks(method, state, hypers):
    """M^-1 of the whole network, column by column, from the block method's own solve."""
    found = []
    for name in SHAPES:
        layer = state.layers[name]
        columns = [np.ravel(method.solve(layer, e, hypers[name]).direction) for e in units(name)]
        found.append(np.stack(columns, axis=1))
    return block_diag(*found)


def curvature(records):
    layers = [records[name] for name in SHAPES]
    J = np.concatenate([np.reshape(r.examples(), (r.draws * r.batch, -1)) for r in layers], axis=1)
    return J.T @ J / records["first"].n + DAMPING * np.eye(J.shape[1])


def coarse(space, M_inverse):
    """R: ones on a layer and zero elsewhere; for Krylov their images under the last refresh's M^-1 as well."""
    found = []
    for name in SHAPES:
        ones = flat({n: np.full((1, *SHAPES[n]), float(n == name)) for n in SHAPES})
        found += [ones, M_inverse @ ones] if space == "krylov" else [ones]
    return np.stack([v / np.abs(v).max() for v in found])


@pytest.mark.parametrize(("name", "space"), CASES)
def test_the_step_is_its_formula(rng, name, space):
    method = SERVE[name]
    records, grads = problem(rng)
    two_level = kf.TwoLevel(method, SPACES[space])
    refreshed, state, hypers = fitted(two_level, records)
    found = two_level.solve(state, grads, hypers, records)
    M_inverse = inverse_of_blocks(method, state, hypers)
    F = curvature(records)
    R = coarse(space, inverse_of_blocks(method, refreshed, hypers))
    g = flat(grads)
    z0 = M_inverse @ g
    beta = np.linalg.solve(R @ F @ R.T, R @ (g - F @ z0))
    np.testing.assert_allclose(flat(found.direction), z0 + R.T @ beta, rtol=1e-9, atol=1e-9)
    assert float(found.info["gain"]) < 0


@pytest.mark.parametrize("name", [name for name, method in SERVE.items() if declares(method, Inverses)])
def test_inverses_are_those_of_a_solve(rng, name):
    """((A + d_a I)^-1, (G + d_g I)^-1) in that order: G^-1 V A^-1 is what `solve` gives."""
    method = SERVE[name]
    records, grads = problem(rng)
    record = records["first"]
    hyper = kf.Hyper(0, 0.0, DAMPING)
    state = kf.settle(method, record, damping=DAMPING)
    found = method.inverses(state, hyper)
    if found is None:
        assert name in ("kfac-eigh", "kfac-exact", "tkfac-eigh")
        return
    A, G = found
    want = G @ grads["first"] @ A
    np.testing.assert_allclose(method.solve(state, grads["first"], hyper).direction, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", BY_MODES)
def test_a_preconditioner_takes_them(rng, name, space):
    """Low-rank methods below a coarse level, through the door everyone uses."""
    records, grads = problem(rng)
    blocks = {layer: kf.Block.of(record) for layer, record in records.items()}
    pre = kf.Preconditioner(network=kf.TwoLevel(BY_MODES[name], SPACES[space]))
    state = pre.init(blocks, records["first"].g)
    for _ in range(2):
        directions, state, info = pre.step(state, records, grads)
    assert all(np.all(np.isfinite(x)) for x in directions.values())
    assert flat(directions) @ flat(grads) > 0
    assert info.layers["network"]["gain"] < 0
