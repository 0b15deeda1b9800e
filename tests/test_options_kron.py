"""Wrong options of the methods with factors: an error where the method is made, which says what to give."""

from __future__ import annotations

import timeit

import pytest

import kfaccore as kf
from kfaccore.linalg.inverse import Cholesky
from kfaccore.methods.lowrank.brand_c import Correction

SHARING = [kf.KFAC, kf.EKFAC, kf.TKFAC, kf.TEKFAC, kf.KFACCorrected, kf.PINNKFAC]
BY_MODES = [kf.RandomizedKFAC, kf.BrandKFAC, kf.BrandRKFAC, kf.BrandCKFAC]
SPLIT = [kf.KFAC, kf.TKFAC, kf.KPSVD, kf.Deflation, kf.Lanczos, kf.KFACCorrected, kf.PINNKFAC, *BY_MODES]
INVERSE = [kf.KFAC, kf.TKFAC, kf.KPSVD]
TWO_TERMS = [kf.Deflation, kf.Lanczos, kf.KFACCorrected]


def refused(make, field, *words):
    """The error names the method, the field and what to give instead."""
    with pytest.raises(TypeError) as error:
        make()
    text = str(error.value)
    assert f"({field}=" in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("method", SPLIT)
def test_a_method_is_no_split(method):
    """`kf.Exact()`, the method, where `kf.exact`, the damping form, is meant."""
    refused(lambda: method(split=kf.Exact()), "split", method.__name__, "kf.exact (not the method kf.Exact)", "shifts")
    refused(lambda: method(split="pi"), "split", "kf.pi")


@pytest.mark.parametrize("method", SPLIT)
def test_the_class_of_a_split_is_no_split(method):
    refused(lambda: method(split=kf.Relative), "split", "is the class itself", "Relative()")


@pytest.mark.parametrize("method", INVERSE)
def test_inverse(method):
    refused(lambda: method(inverse=kf.pi), "inverse", "kf.cholesky or kf.eigh")
    refused(lambda: method(inverse=kf.Exact()), "inverse", "kf.cholesky or kf.eigh")
    refused(lambda: method(inverse=Cholesky), "inverse", "is the class itself", "Cholesky()")
    with pytest.raises(ValueError, match=r"does not shift each factor: .*inverse=eigh"):
        method(split=kf.exact)
    method(inverse=kf.eigh, split=kf.exact)


@pytest.mark.parametrize("method", [*SHARING, *BY_MODES])
def test_sharing(method):
    refused(lambda: method(sharing="reduce"), "sharing", "kf.expand, kf.reduce")
    refused(lambda: method(sharing=kf.Record), "sharing", "is the class itself")


@pytest.mark.parametrize("method", [kf.TKFAC, kf.TEKFAC])
def test_damping_in_units(method):
    refused(lambda: method(damping=1e-3), "damping", "kf.as_given", "kf.Adaptive()")
    refused(lambda: method(damping=kf.Adaptive), "damping", "is the class itself", "Adaptive()")


@pytest.mark.parametrize("method", TWO_TERMS)
def test_two_terms(method):
    refused(lambda: method(indefinite="absolute"), "indefinite", "kf.absolute or kf.first_term")
    with pytest.raises(ValueError, match="does not shift each factor"):
        method(split=kf.exact)


@pytest.mark.parametrize("method", BY_MODES)
def test_modes(method):
    refused(lambda: method(rank=64), "rank", "kf.Rank(cap, start, ...)")
    refused(lambda: method(rank=kf.Rank), "rank", "is the class itself", "Rank()")
    refused(lambda: method(outside=0.0), "outside", "kf.even, kf.lowest or kf.nothing")
    with pytest.raises(ValueError, match="does not shift each factor"):
        method(split=kf.exact)


@pytest.mark.parametrize("method", [kf.RandomizedKFAC, kf.BrandRKFAC])
def test_sketch(method):
    refused(lambda: method(sketch="singular"), "sketch", "kf.Symmetric", "kf.Singular")
    refused(lambda: method(sketch=kf.Singular), "sketch", "is the class itself", "Singular()")


def test_correction():
    refused(lambda: kf.BrandCKFAC(correction=0.5), "correction", "Correction(share, seed)")
    refused(lambda: kf.BrandCKFAC(correction=Correction), "correction", "is the class itself", "Correction()")


def test_relative():
    refused(lambda: kf.Relative(kf.Exact()), "split", "kf.exact (not the method kf.Exact)")
    refused(lambda: kf.Relative(kf.pi, to="mean"), "to", "kf.mean_eigenvalue or kf.top_eigenvalue")


def test_checking_costs_nothing_to_speak_of():
    """A method is made a few times, not once a step; still it takes microseconds."""
    assert min(timeit.repeat(kf.KFAC, number=1000, repeat=5)) < 0.2
