"""A tuple is a record a term of the loss, a list micro-batches of one: who takes which, who refuses by name."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf


def terms():
    rng = np.random.default_rng(0)
    return tuple(kf.Record(rng.normal(size=(b, 3)), rng.normal(size=(b, 2)), float(b)) for b in (8, 2))


GRAD = np.random.default_rng(1).normal(size=(2, 3))


def step(pre, given, **more):
    return pre.step(pre.init({"w": kf.Block(2, 3)}, GRAD), {"w": given}, {"w": GRAD}, **more)[0]["w"]


@pytest.mark.parametrize("method", [kf.Exact(), kf.KFAC(), kf.EKFAC(), kf.Diagonal()])
@pytest.mark.parametrize("rule", [kf.Fixed(), kf.Quadratic(), kf.LineSearch()])
def test_a_method_of_one_term_refuses_a_tuple_and_pools_a_list(method, rule):
    pre = kf.Preconditioner(method, step=rule)
    with pytest.raises(ValueError, match=rf"one record a term.*{type(method).__name__} takes one term: use PINNKFAC"):
        step(pre, terms())
    one, two = terms()
    pooled = kf.concat(one, two)
    assert np.allclose(step(pre, [one, two]), step(pre, pooled), rtol=1e-12, atol=1e-14)


def test_a_network_level_method_refuses_a_tuple():
    with pytest.raises(ValueError, match="TwoLevel takes one term"):
        step(kf.Preconditioner(network=kf.TwoLevel(kf.KFAC())), terms())


def test_direction_and_settle_refuse_a_tuple_that_the_method_does_not_take():
    for call in (lambda: kf.direction(terms(), GRAD), lambda: kf.settle(kf.EKFAC(), terms())):
        with pytest.raises(ValueError, match="a tuple of 2 records came"):
            call()
    assert kf.direction(terms(), GRAD, kf.PINNKFAC()).shape == (2, 3)


def test_a_length_that_models_the_loss_refuses_terms_by_name():
    pre = kf.Preconditioner(kf.PINNKFAC(), step=kf.Fixed(1.0, 0.9, kf.Noise()))
    with pytest.raises(ValueError, match="cannot model several loss terms; use Quadratic"):
        step(pre, terms(), loss=1.0)
    plain = kf.Preconditioner(kf.PINNKFAC(), step=kf.Fixed())
    assert np.isfinite(step(plain, terms())).all()
