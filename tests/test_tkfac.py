"""TKFAC and TEKFAC against partial traces of the dense block: TKFAC-1 to TKFAC-11."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.methods.kronecker import traces
from kfaccore.settle import cycle
from oracle import matrix
from rows import arrays

HYPER = kf.Hyper(0, 0.0, 0.0)
D_OUT, D_IN = 5, 7


def record_of(rng, batch=64, blocks=1, draws=2):
    """One position an example, a and g strongly dependent."""
    a, g = arrays(rng, blocks, batch, 1, D_IN, D_OUT, draws)
    return kf.Record(a, g * (0.2 + a[..., :1] ** 2), float(batch))


def partial_traces(F):
    """Over the output index (d_in, d_in), and over the input index (d_out, d_out)."""
    whole = F.reshape(D_OUT, D_IN, D_OUT, D_IN)
    return np.einsum("oioj->ij", whole), np.einsum("oipi->op", whole)


def fitted(method, record):
    """F~ of a method that was settled on the record, first block."""
    state = kf.settle(method, record)
    return matrix(method, state, HYPER, (record.blocks, record.d_out, record.d_in))[0]


def apart(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def test_trace_and_partial_traces_are_those_of_the_block(rng):
    """TKFAC-1: tr(delta Psi (x) Phi) = tr F, and both partial traces are F's; K-FAC's trace is not."""
    record = record_of(rng)
    F, K = kf.dense(record)[0], fitted(kf.TKFAC(), record)
    assert np.trace(K) == pytest.approx(np.trace(F), rel=1e-13)
    for mine, true in zip(partial_traces(K), partial_traces(F), strict=True):
        assert apart(mine, true) < 1e-13
    assert apart(np.trace(fitted(kf.KFAC(), record)), np.trace(F)) > 0.1


def test_not_kfac_rescaled_to_the_trace(rng):
    """TKFAC-2: delta A (x) G with K-FAC's own factors keeps the trace too; its partial traces are wrong."""
    record = record_of(rng)
    F, K = kf.dense(record)[0], fitted(kf.KFAC(), record)
    rescaled = K * np.trace(F) / np.trace(K)
    assert np.trace(rescaled) == pytest.approx(np.trace(F), rel=1e-13)
    for mine, true in zip(partial_traces(rescaled), partial_traces(F), strict=True):
        assert apart(mine, true) > 0.05


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_both_damping_forms_are_one(rng, damping):
    """TKFAC-3: (s Psi + r I)^-1 V (s Phi + r I)^-1 = (Psi + r/s I)^-1 V (Phi + r/s I)^-1 / delta, s^2 = delta, r^2 =
    c."""
    record, v = record_of(rng), rng.normal(size=(D_OUT, D_IN))
    Phi, Psi = partial_traces(kf.dense(record)[0])
    delta = np.trace(Phi)
    got = kf.direction(record, v, kf.TKFAC(), damping)
    eye_a, eye_g, root = np.eye(D_IN), np.eye(D_OUT), damping**0.5
    sides = Psi / delta**0.5 + root * eye_g, Phi / delta**0.5 + root * eye_a
    assert apart(got, np.linalg.solve(sides[0], v) @ np.linalg.inv(sides[1])) < 1e-12
    root = (damping / delta) ** 0.5
    sides = Psi / delta + root * eye_g, Phi / delta + root * eye_a
    assert apart(got, np.linalg.solve(sides[0], v) @ np.linalg.inv(sides[1]) / delta) < 1e-12


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC()])
def test_exact_on_a_kronecker_product(rng, method):
    """TKFAC-4: both are F where F is a Kronecker product, that of all pairs of a few a and a few g."""
    a, g = rng.normal(size=(9, D_IN)), rng.normal(size=(6, D_OUT))
    g *= np.linalg.norm(g, axis=1, keepdims=True) ** 2
    record = kf.Record(np.repeat(a, 6, 0), np.tile(g, (9, 1)), 54.0)
    assert apart(fitted(method, record), kf.dense(record)[0]) < 1e-13


def test_the_average_is_of_the_numerators(rng):
    """TKFAC-5: partial traces of the averaged F, not averages of what one batch each would make of them."""
    method, hyper, records = kf.TKFAC(), kf.Hyper(0, 0.6, 0.1), [record_of(rng) for _ in range(3)]
    records[1] = replace(records[1], g=30 * records[1].g)
    state = method.init(kf.Block.of(records[0]), records[0].g)
    for record in records:
        state = cycle(method, state, record, hyper)
    shares = np.array([0.36 * 0.4, 0.6 * 0.4, 0.4]) / (1 - 0.6**3)
    F = sum(s * kf.dense(r)[0] for s, r in zip(shares, records, strict=True))
    K = matrix(method, state, hyper, (1, D_OUT, D_IN))[0]
    for mine, true in zip(partial_traces(K), partial_traces(F), strict=True):
        assert apart(mine, true) < 1e-13
    normalised = sum(s * fitted(method, r) for s, r in zip(shares, records, strict=True))
    assert apart(normalised, K) > 1e-3


def test_tekfac_is_never_further_than_tkfac(rng):
    """TKFAC-6: |TEKFAC - F| <= |TKFAC - F| and tr TEKFAC = tr F."""
    for _ in range(20):
        record = record_of(rng, batch=20)
        F = kf.dense(record)[0]
        errors = [apart(fitted(m, record), F) for m in (kf.TKFAC(), kf.TEKFAC())]
        assert errors[1] <= errors[0] * (1 + 1e-10)
        assert np.trace(fitted(kf.TEKFAC(), record)) == pytest.approx(np.trace(F), rel=1e-12)


def test_equal_norms_make_it_kfac_and_ekfac(rng):
    """TKFAC-7: |a| and |g| the same in all rows: Phi and Psi are multiples of A and G."""
    a, g = arrays(rng, 1, 30, 1, D_IN, D_OUT, 1)
    a, g = (x / np.linalg.norm(x, axis=-1, keepdims=True) * norm for x, norm in ((a, 2.0), (g, 3.0)))
    record, v = kf.Record(a, g, 30.0), rng.normal(size=(D_OUT, D_IN))
    for mine, plain in ((kf.TKFAC(), kf.KFAC()), (kf.TEKFAC(), kf.EKFAC())):
        assert apart(fitted(mine, record), fitted(plain, record)) < 1e-13
    assert apart(kf.direction(record, v, kf.TEKFAC(), 0.1), kf.direction(record, v, kf.EKFAC(), 0.1)) < 1e-12


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC()])
def test_shared_positions_are_rows(rng, method):
    """TKFAC-8: the traces kept are those of the expanded record, never products of sums over positions."""
    a, g = arrays(rng, 1, 8, 4, D_IN, D_OUT, 2)
    record = kf.Record(a, g, 8.0)
    sums = traces.partial_traces(record, kf.expand)
    Phi, Psi = (x[0] / 8.0 for x in (sums.A, sums.G))
    for mine, true in zip((Phi, Psi), partial_traces(kf.dense(kf.expand(record))[0]), strict=True):
        assert apart(mine, true) < 1e-13
    if isinstance(method, kf.TEKFAC):  # its moments are of whole examples all the same
        assert np.trace(fitted(method, record)) == pytest.approx(np.trace(kf.dense(record)[0]), rel=1e-12)


def test_convolution_in_chunks_is_unfolded_rows(rng, monkeypatch):
    """TKFAC-9: folded patches, in chunks, have the direction of unfolded rows."""
    image = rng.normal(size=(6, 5, 5, 3))
    patches = kf.Patches(image, kf.Window((2, 2), padding=1), bias=True)
    g = rng.normal(size=(2, 1, 6, 36, 4))
    folded, plain = kf.Record(patches, g, 6.0), kf.Record(patches.unfold(), g, 6.0)
    monkeypatch.setattr("kfaccore.xp.chunks.HELD", 36 * 13 * 2)
    v = rng.normal(size=(1, 4, 13))
    for method in (kf.TKFAC(), kf.TEKFAC()):
        assert apart(kf.direction(folded, v, method, 0.1), kf.direction(plain, v, method, 0.1)) < 1e-12


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC()])
def test_embedding_is_a_diagonal(rng, method):
    """TKFAC-9: the input side of one-hot rows stays a diagonal; K-FAC's other shapes are in the laws."""
    index, g = rng.integers(0, 6, (8, 3)), rng.normal(size=(8, 3, 4))
    ids = kf.Record(kf.Ids(index, 6), g, 8.0)
    plain = kf.Record(np.eye(6)[index], g, 8.0)
    v = rng.normal(size=(4, 6))
    assert kf.settle(method, ids).A.shape == (1, 6)
    assert apart(kf.direction(ids, v, method, 0.1), kf.direction(plain, v, method, 0.1)) < 1e-12


@pytest.mark.parametrize("method", [kf.TKFAC, kf.TEKFAC])
@pytest.mark.parametrize("floor", [1e-3, 1e6])
def test_adaptive_damping_follows_the_trace_down_to_the_floor(rng, method, floor):
    """TKFAC-10: damping max(tr F, floor) / D: the trace decides until the floor does."""
    record, v = record_of(rng), rng.normal(size=(D_OUT, D_IN))
    absolute = 0.7 * max(np.trace(kf.dense(record)[0]), floor) / (D_OUT * D_IN)
    got = kf.direction(record, v, method(damping=kf.Adaptive(floor)), 0.7)
    assert apart(got, kf.direction(record, v, method(), absolute)) < 1e-12


@pytest.mark.parametrize("method", [kf.TKFAC(), kf.TEKFAC(), kf.TKFAC(damping=kf.Adaptive())])
def test_a_block_without_gradients_is_damping_alone(rng, method):
    """TKFAC-11: delta = 0 divides nothing: what is left is the damping."""
    a = rng.normal(size=(6, D_IN))
    direction = kf.direction(kf.Record(a, np.zeros((6, D_OUT)), 6.0), np.ones((D_OUT, D_IN)), method, 0.5)
    share = 1e-3 / (D_OUT * D_IN) if method == kf.TKFAC(damping=kf.Adaptive()) else 1.0
    np.testing.assert_allclose(direction, 1 / (0.5 * share), rtol=1e-12)


def test_zero_draws_are_refused(rng):
    record = kf.Record(rng.normal(size=(4, 3)), np.zeros((0, 4, 2)), 4.0)
    for method in (kf.TKFAC(), kf.TEKFAC()):
        with pytest.raises(ValueError, match="zero draws"):
            kf.settle(method, record)
