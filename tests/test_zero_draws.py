"""Records of zero draws, for which G = I by definition: every function of records takes them or says why not."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import kfaccore.posterior as kp
from kfaccore.step.noise import Noise

B = 4
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1]], bool)
SHARINGS = [kf.expand, kf.reduce, kf.mean_mean, kf.sum_sum, kf.Subsample(2), kf.ReceptiveMean(3)]
INPUTS = ["dense", "masked", "patches"]


def pair(rng, kind):
    """The record of one layer without draws, and with two."""
    a = rng.normal(size=(B, 3, 7))
    if kind == "patches":
        a = kf.Patches(rng.normal(size=(B, 5, 2)), kf.Window((3,)), bias=True)
    mask = MASK if kind == "masked" else None
    g = rng.normal(size=(2, B, 3, 5))
    return kf.Record(a, g[:0], float(B), mask), kf.Record(a, g, float(B), mask)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("sharing", SHARINGS, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_a_choice_of_rows_is_the_same_with_and_without_draws(sharing, kind):
    bare, drawn = (sharing(record) for record in pair(np.random.default_rng(3), kind))
    assert bare.g.shape == (0, *drawn.g.shape[1:])
    np.testing.assert_array_equal(bare.rows(), drawn.rows())
    if drawn.mask is not None:
        np.testing.assert_array_equal(bare.mask, drawn.mask)
    # (G + d I)^-1 V (A + d I)^-1 with G = I
    a = bare.rows()[0].reshape(-1, bare.d_in)
    count = len(a) if bare.mask is None else bare.mask.sum()
    V = np.random.default_rng(4).normal(size=(5, 7))
    want = np.linalg.solve(a.T @ a / count + 0.1 * np.eye(7), V.T).T / 1.1
    found = kf.direction(pair(np.random.default_rng(3), kind)[0], V, kf.KFAC(sharing=sharing, split=kf.per_factor), 0.1)
    np.testing.assert_allclose(found, want, rtol=1e-9)


def test_a_bias_is_set_apart_without_draws(rng):
    bare, drawn = pair(rng, "patches")
    found, want = (kp.apart({"c": record}, ["c"]) for record in (bare, drawn))
    assert list(found) == ["c", "c.bias"]
    for name, record in found.items():
        np.testing.assert_array_equal(record.rows(), want[name].rows())
        assert record.draws == 0


@pytest.mark.parametrize(
    "rule", [kf.SelfTuning(), kf.Quadratic(), kf.Fixed(1.0, 0.9, Noise())], ids=lambda x: type(x).__name__
)
def test_a_rule_that_models_the_loss_refuses_records_without_draws(rng, rule):
    """Whether or not the loop says what it drew: F of none is zero, and the step was |grad| over the damping."""
    bare, drawn = pair(rng, "dense")
    pre = kf.Preconditioner(kf.KFAC(), step=rule)
    V = rng.normal(size=(5, 7))
    state = pre.init({"c": kf.Block(5, 7)}, V)
    own = {"own": {"c": kf.Record(drawn.a, drawn.g[:1], float(B))}} if rule.wants_own else {}
    with pytest.raises(ValueError, match=r"layer 'c' has zero draws: .* use monte_carlo or type2"):
        pre.step(state, {"c": bare}, {"c": V}, loss=1.0, **own)


@pytest.mark.parametrize("space", [kf.network.Nicolaides(), kf.network.Residual()], ids=lambda x: type(x).__name__)
def test_two_levels_refuse_records_without_draws(rng, space):
    bare, _ = pair(rng, "dense")
    pre = kf.Preconditioner(network=kf.TwoLevel(space=space))
    V = rng.normal(size=(5, 7))
    with pytest.raises(ValueError, match="zero draws"):
        pre.step(pre.init({"c": kf.Block(5, 7)}, V), {"c": bare}, {"c": V})
