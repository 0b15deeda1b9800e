"""Numbers of rules, schedules, clocks and methods are looked at where they are given: NaN, infinity, signs and None."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.linalg.cg import CG, Iterations, Progress, Residual
from kfaccore.methods.singd.blocks import BlockDiagonal
from kfaccore.methods.singd.recursion import Rule
from kfaccore.methods.singd.triangular import Hierarchical
from kfaccore.precondition import schedule

OWNERS = {  # what a number is given to, and the fields that must be finite and not negative
    kf.Fixed: ("lr", "momentum"),
    kf.KLClip: ("kappa",),
    kf.NormConstraint: ("limit",),
    kf.LineSearch: ("cap", "grow", "shrink", "least"),
    kf.GridSearch: ("momentum", "points"),
    kf.Quadratic: ("damping", "first", "points"),
    kf.SelfTuning: ("first", "drop", "every", "grow", "floor", "memory"),
    kf.Noise: ("average", "every", "promise"),
    kf.IterateAverage: ("decay",),
    kf.Clocks: ("update", "refresh"),
    kf.Schedules: ("damping", "decay", "l2", "weight_decay"),
    kf.GaussNewton: ("damping", "drop", "grow", "points", "least"),
    kf.Adaptive: ("floor",),
    CG: ("limit", "warm", "jacobi"),
    Iterations: ("count",),
    Residual: ("tolerance",),
    Progress: ("tolerance", "least", "share"),
    Rule: ("momentum", "rate", "warm"),
    BlockDiagonal: ("k",),
    Hierarchical: ("k1", "k2"),
    kf.SKFAC: ("rows", "rank"),
    kf.CGFAC: ("rows",),
    kf.FNGD: ("steps", "every", "slots"),
    kf.Lanczos: ("krylov", "restarts", "tolerance"),
    kf.PINNKFAC: ("terms", "start", "tolerance", "iterations"),
    kf.BrandKFAC: ("start",),
}
CASES = [(owner, field) for owner, fields in OWNERS.items() for field in fields]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, None, "0.1", np.float32("nan")], ids=repr)
@pytest.mark.parametrize(("owner", "field"), CASES, ids=[f"{owner.__name__}.{field}" for owner, field in CASES])
def test_a_number_that_is_none_is_refused_by_name(owner, field, wrong):
    with pytest.raises((ValueError, TypeError), match=rf"{owner.__name__}\.{field} is "):
        owner(**{field: wrong})


@pytest.mark.parametrize("owner", OWNERS)
def test_what_a_class_has_by_default_it_takes(owner):
    owner(**{field: vars(owner())[field] for field in OWNERS[owner]})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: kf.LineSearch(shrink=1.0), r"LineSearch.shrink is 1.0; need a number in \(0, 1\)"),
        (lambda: kf.Fixed(momentum=1.0), r"Fixed.momentum is 1.0; need a number in \[0, 1\)"),
        (lambda: kf.Clocks(refresh=2.5), "Clocks.refresh is 2.5; need a whole number of at least 1"),
        (lambda: kf.Schedules(damping={"a": None}), r"Schedules.damping\['a'\] is None; need a finite number >= 0"),
        (lambda: kf.Schedules(lambda step: None).hyper("a", 0), "damping is None; need a finite number >= 0"),
        (lambda: kf.Preconditioner(widest=float("nan")), "Preconditioner.widest is nan"),
        (lambda: kf.TwoLevel(coefficient=float("inf")), "TwoLevel.coefficient is inf; need a finite number"),
        (lambda: schedule.cosine(1.0, 0.0, 0), r"cosine\(steps\) is 0; need a whole number"),
        (lambda: schedule.linear(1.0, float("nan"), 5), r"linear\(end\) is nan; need a finite number"),
        (lambda: schedule.exponential(1.0, None), r"exponential\(rate\) is None; need a finite number"),
        (lambda: schedule.piecewise((1.0, None), (3,)), r"piecewise\(values\[1\]\) is None; need a finite number"),
        (lambda: schedule.constant(float("inf")), r"constant\(value\) is inf; need a finite number"),
    ],
)
def test_what_came_and_what_is_needed(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


def test_no_bound_is_infinity():
    kf.SelfTuning(cap=np.inf, tolerance=np.inf, noise=kf.Noise(reach=np.inf))
    kf.Quadratic(tolerance=np.inf)


def test_arrays_are_believed(xp):
    """A number of a device is not read."""
    kf.Hyper(0, xp.put(np.float64(0.5)), xp.put(np.float64(0.1)))
