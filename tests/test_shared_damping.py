"""SharedDamping against single layers whose damping was worked out by hand from dense blocks."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from test_two_level import SHAPES, blocks, fitted, problem

DAMPING = 0.3
CONVOLUTIONS = ("conv", "third")


def methods(kind, floor):
    return {name: kind(damping=kf.Adaptive(floor)) if name in CONVOLUTIONS else kind() for name in SHAPES}


def scales(records, floor):
    """max(tr F, floor) / size of the convolutions."""
    sides = {name: (records[name].rows(), records[name].g) for name in CONVOLUTIONS}
    found = {name: np.sum(np.sum(a**2, -1) * np.sum(g**2, -1)) / records[name].n for name, (a, g) in sides.items()}
    return {name: max(trace, floor) / np.prod(SHAPES[name]) for name, trace in found.items()}


def wanted(kind, records, grads, floor):
    """Directions layer by layer, and beta."""
    units = scales(records, floor)
    beta = max(units.values())
    dampings = {name: DAMPING * units.get(name, beta) for name in SHAPES}
    return {name: kf.direction(records[name], grads[name], kind(), dampings[name]) for name in SHAPES}, beta


@pytest.mark.parametrize("kind", [kf.TKFAC, kf.TEKFAC])
@pytest.mark.parametrize("floor", [1e-3, 1e6])
def test_dense_layers_are_damped_by_the_largest_convolution(rng, kind, floor):
    records, grads = problem(rng)
    if kind is kf.TEKFAC:  # whose moments are of whole examples: rows make them the traces of TKFAC
        rows = {name: (record.rows(), record.g) for name, record in records.items()}
        sizes = {name: (g.shape[0], g.shape[-2] * g.shape[-3], g.shape[-1]) for name, (_, g) in rows.items()}
        rows = {name: (a.reshape(1, -1, a.shape[-1]), g.reshape(sizes[name])) for name, (a, g) in rows.items()}
        records = {name: kf.Record(a[0], g, 9.0) for name, (a, g) in rows.items()}
    method = kf.SharedDamping(methods(kind, floor))
    state, hypers = fitted(method, records, DAMPING)
    state = method.update(state, method.measure(state, records, hypers), hypers)  # TEKFAC's moments in the new basis
    found = method.solve(state, grads, hypers)
    want, beta = wanted(kind, records, grads, floor)
    np.testing.assert_allclose(found.info["beta"], beta, rtol=1e-12)
    for name in SHAPES:
        np.testing.assert_allclose(found.direction[name], want[name], rtol=1e-9, atol=1e-12)
        assert int(found.code[name][0]) == kf.Code.OK


def test_through_a_preconditioner_and_a_file(rng, tmp_path):
    records, grads = problem(rng)
    pre = kf.Preconditioner(network=kf.SharedDamping(methods(kf.TKFAC, 1e-3)), schedules=kf.Schedules(DAMPING))
    fresh = pre.init(blocks(records), grads["first"])
    updates, state, info = pre.step(fresh, records, grads)
    want, beta = wanted(kf.TKFAC, records, grads, 1e-3)
    for name in SHAPES:
        np.testing.assert_allclose(updates[name], want[name], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(info.layers["network"]["beta"], beta, rtol=1e-12)
    kf.save(tmp_path / "x", state)
    again = pre.step(kf.load(tmp_path / "x", fresh), records, grads)[0]
    for name, x in pre.step(state, records, grads)[0].items():
        assert np.array_equal(x, again[name])


def test_every_namespace_agrees(xp):
    method = kf.SharedDamping(methods(kf.TKFAC, 1e-3))
    found = []
    for put in (np.array, xp.put):
        records, grads = problem(np.random.default_rng(5), put)
        state, hypers = fitted(method, records, DAMPING)
        found.append(method.solve(state, grads, hypers).direction)
    for name in SHAPES:
        np.testing.assert_allclose(xp.get(found[1][name]), found[0][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (kf.KFAC(), r"layer 'first': KFAC has no damping of its own: use TKFAC or TEKFAC"),
        (kf.TKFAC(), r"no layer of \['first', .*\] has damping=Adaptive\(\); need it on the convolutions"),
        ({"first": kf.TKFAC()}, r"SharedDamping.method has no entry for layer 'conv'; it has \['first'\]"),
    ],
)
def test_what_cannot_be_damped(rng, given, why):
    records, grads = problem(rng)
    with pytest.raises(ValueError, match=why):
        kf.SharedDamping(given).init(blocks(records), grads["first"])
