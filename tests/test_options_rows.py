"""Options of the methods that work in rows, and of SINGD: what does not fit is refused where the method is made."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.damping import exact
from kfaccore.linalg.cg import CG
from kfaccore.methods.rows.cgfac import Empirical, InRows, Kron, KronFactored
from kfaccore.methods.rows.factors import always
from kfaccore.methods.rows.fngd import mean_vector, position, sample, scalar_rate
from kfaccore.methods.rows.shares import Position
from kfaccore.methods.singd import blocks, recursion, singd, toeplitz, triangular
from kfaccore.record.sharing import Subsample

REFUSED = [  # method, option, what does not fit, a word of what the message offers instead
    (kf.SKFAC, "sharing", kf.Identity(), "expand"),
    (kf.SKFAC, "sharing", Subsample, "Subsample"),
    (kf.SKFAC, "split", kf.Exact(), "pi"),
    (kf.SKFAC, "branch", True, "fewer_rows"),
    (kf.SKFAC, "explicit", "never", "cheaper_dense"),
    (kf.CGFAC, "operator", kf.KFAC(), "KronFactored"),
    (kf.CGFAC, "operator", Kron, r"Kron\(\)"),
    (kf.CGFAC, "solver", kf.SKFAC(), "InRows"),
    (Kron, "branch", True, "fewer_rows"),
    (KronFactored, "sharing", kf.Identity(), "expand"),
    (KronFactored, "split", kf.Exact(), "pi"),
    (Empirical, "sharing", Subsample, "Subsample"),
    (kf.CGFAC, "solver", CG, r"CG\(\)"),
    (kf.FNGD, "share", kf.FNGD(), "mean_vector"),
    (kf.FNGD, "share", Position, r"Position\(\)"),
    (kf.FNGD, "sharing", "whole", "whole"),
    (kf.GlobalFNGD, "share", kf.FNGD(), "mean_vector"),
    (kf.GlobalFNGD, "sharing", 1, "reduce"),
    (kf.SINGD, "inputs", kf.Diagonal(), "kfaccore.methods.singd.blocks"),
    (kf.SINGD, "outputs", kf.Identity(), "kfaccore.methods.singd.blocks"),
    (kf.SINGD, "inputs", blocks.Diagonal, r"Diagonal\(\)"),
    (kf.SINGD, "coupling", 1.0, "rooted"),
    (kf.SINGD, "rule", kf.Fixed(), "Rule"),
    (kf.SINGD, "rule", recursion.Rule, r"Rule\(\)"),
    (kf.IKFAC, "sharing", None, "expand"),
    (kf.IKFAC, "outputs", kf.Diagonal(), "kfaccore.methods.singd.blocks"),
    (recursion.Rule, "limit", recursion.full, "by_radius"),
    (recursion.Rule, "storage", recursion.by_norm, "bfloat16"),
]


@pytest.mark.parametrize(
    ("method", "option", "value", "offered"),
    REFUSED,
    ids=[f"{m.__name__}-{o}-{i}" for i, (m, o, *_) in enumerate(REFUSED)],
)
def test_what_does_not_fit_is_refused_by_name_with_what_does(method, option, value, offered):
    with pytest.raises(TypeError, match=rf"{method.__name__}\({option}=.*{offered}"):
        method(**{option: value})


FITTING = [
    *(kf.CGFAC(operator, solver) for operator in (Kron(), KronFactored(), Empirical()) for solver in (CG(), InRows())),
    *(kf.FNGD(share) for share in (mean_vector, position, sample, scalar_rate)),
    kf.GlobalFNGD(sharing=kf.reduce),
    kf.SKFAC(Subsample(2), branch=always),
    kf.IKFAC(coupling=recursion.independent),
    kf.SINGD(rule=recursion.Rule(limit=recursion.unlimited, storage=recursion.master)),
]


@pytest.mark.parametrize("method", FITTING, ids=lambda method: type(method).__name__)
def test_what_fits_is_hashable_and_equal_to_its_copy(method):
    assert hash(replace(method)) == hash(method)
    assert replace(method) == method


STRUCTURES = [
    *(blocks.Dense(), blocks.Diagonal(), blocks.BlockDiagonal(3)),
    *(triangular.Hierarchical(2, 1), triangular.upper(), triangular.lower(), triangular.upper_last()),
    *(triangular.lower_last(2), toeplitz.UpperToeplitz(), toeplitz.LowerToeplitz()),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_every_structure_fits_either_side_of_singd(structure):
    assert hash(kf.SINGD(inputs=structure, outputs=structure)) == hash(kf.SINGD(inputs=structure, outputs=structure))


def test_the_structures_that_singd_suggests_are_where_its_page_says(rng):
    said = re.findall(r"from (kfaccore\S+) import (.+)", singd.__doc__)
    found = {
        name: getattr(importlib.import_module(module), name) for module, names in said for name in names.split(", ")
    }
    inputs = found["Diagonal"]()
    outputs = found["Hierarchical"]()
    record = kf.Record(rng.standard_normal((5, 4)), rng.standard_normal((5, 3)), 5.0)
    x = kf.direction(record, np.ones((3, 4)), kf.SINGD(inputs=inputs, outputs=outputs))
    assert np.isfinite(x).all()


def test_damping_that_shifts_no_factor_is_refused_where_factors_are_shifted():
    for method in (kf.SKFAC, KronFactored):
        with pytest.raises(ValueError, match="does not shift each factor"):
            method(split=exact)


def test_an_operator_of_ones_own_needs_what_the_protocol_names():
    class Half:
        def product(self, parts, v):
            return v

    with pytest.raises(TypeError, match="in_rows"):
        kf.CGFAC(Half())
