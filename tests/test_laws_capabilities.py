"""Laws of what a method declares: each capability has its Protocol's signature and means what that says, in numbers.

Rows of METHODS, and options of methods that have no row of their own. NumPy and the standard's strictest.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest

import kfaccore as kf
from conftest import FEW
from kfaccore import method as contract
from kfaccore import tree
from kfaccore.linalg import side
from kfaccore.method import CAPABILITIES, declares
from kfaccore.xp.asking import alone, lockstep
from rows import METHODS, arrays
from test_laws import DAMPING, N, close

OPTIONS = {  # what a row's options leave out
    "tkfac, damping in its own units": kf.TKFAC(damping=kf.Adaptive()),
    "tekfac, damping in its own units": kf.TEKFAC(damping=kf.Adaptive()),
    "kfac-eigh, relative": kf.KFAC(inverse=kf.eigh, split=kf.Relative(kf.exact)),
    "pinn-kfac, two terms": kf.PINNKFAC(),
}
ALL = {**{row.name: row.method for row in METHODS}, **OPTIONS}
DECLARED = [(name, kind) for name, method in ALL.items() for kind in CAPABILITIES if declares(method, kind)]
HYPER = kf.Hyper(0, 0.0, DAMPING)
UNDAMPED = kf.Hyper(0, 0.0, 0.0)


class Case:
    """A method settled on one record, and a gradient."""

    def __init__(self, method, xp, rng):
        a, g = arrays(rng, draws=1 if declares(method, contract.OwnGradients) else 2)
        self.method = method
        self.xp = xp
        self.record = kf.Record(xp.put(a), xp.put(g), N)
        self.block = kf.Block.of(self.record)
        self.given = self.record
        if declares(method, contract.Terms):
            self.given = (self.record, *(self.other(rng) for _ in range(method.terms - 1)))
        self.state = kf.settle(method, self.given, damping=DAMPING)
        self.v = rng.normal(size=(2, 3, 4))

    def other(self, rng):
        """Another record of the same sizes."""
        return kf.Record(*map(self.xp.put, arrays(rng)), N)

    def solve(self, hyper=HYPER, record=None, state=None):
        return self.method.solve(state or self.state, self.xp.put(self.v), hyper, record)

    def direction(self, hyper=HYPER):
        return self.xp.get(self.solve(hyper, self.record).direction)

    def product(self):
        """F~ v."""
        return self.xp.get(self.method.matvec(self.state, self.xp.put(self.v), UNDAMPED))


def full(factor, xp):
    """A factor, or its diagonal, as a matrix."""
    factor = xp.get(factor)
    return factor[:, :, None] * np.eye(factor.shape[-1]) if factor.ndim == 2 else factor


def kronecker_terms_add_to_matvec(case, rng):
    terms = case.method.kronecker_terms(case.state, case.block)
    total = sum(full(G, case.xp) @ case.v @ full(A, case.xp) for A, G in terms)
    assert close(total, case.product())


def inverses_around_v_are_the_solve(case, rng):
    pair = case.method.inverses(case.state, HYPER)
    if pair is None:  # then these options solve otherwise, and say how
        assert case.method.eigensystem(case.state, HYPER) is not None
        return
    A, G = (full(x, case.xp) for x in pair)
    assert close(G @ case.v @ A, case.direction())


def inverse_sides_are_the_inverses(case, rng):
    sides = case.method.inverse_sides(case.state, HYPER)
    for found, wanted in zip(sides, case.method.inverses(case.state, HYPER), strict=True):
        rows = rng.normal(size=(2, 5, wanted.shape[-1]))
        assert close(case.xp.get(side.through(case.xp.put(rows), found)), rows @ full(wanted, case.xp))


def eigensystem_solves_and_multiplies(case, rng):
    """With the damping in its values a solve; without, F~ itself."""
    found = case.method.eigensystem(case.state, HYPER)
    if found is None:
        assert case.method.inverses(case.state, HYPER) is not None
        return
    Qa, Qg = (full(x, case.xp) for x in found[:2])
    inside = Qg.mT @ case.v @ Qa
    assert close(Qg @ (inside / case.xp.get(found[2])) @ Qa.mT, case.direction())
    values = case.xp.get(case.method.eigensystem(case.state, UNDAMPED)[2])
    assert values.shape == (2, 3, 4)
    assert close(Qg @ (inside * values) @ Qa.mT, case.product(), 1e-11)


def matrix_times_vec_is_matvec(case, rng):
    F = case.xp.get(case.method.matrix(case.state, case.block))
    assert close((F @ case.v.reshape(2, -1, 1)).reshape(case.v.shape), case.product())


def unit_times_damping_is_what_a_solve_adds(case, rng):
    """Seen where nothing else is left: at large damping the direction is the gradient over it."""
    large = kf.Hyper(0, 0.0, 1e14)
    state = kf.settle(case.method, case.given, damping=1e14)
    unit = np.broadcast_to(case.xp.get(case.method.unit(state)), (2,))
    direction = case.xp.get(case.solve(large, state=state).direction)
    assert close(direction * 1e14 * unit[:, None, None], case.v, 1e-5)


def unmeasured_states_do_not_move(case, rng):
    start = case.method.init(case.block, case.record.g)
    for x, y in zip(tree.leaves(start), tree.leaves(case.state), strict=True):
        assert np.array_equal(case.xp.get(x), case.xp.get(y))


def terms_are_records_in_a_tuple(case, rng):
    """Each term counts, and another number of them is refused."""
    given = (*case.given[:-1], case.other(rng))
    moved = case.method.solve(kf.settle(case.method, given, damping=DAMPING), case.xp.put(case.v), HYPER).direction
    assert not close(case.xp.get(moved), case.direction(), 1e-3)
    with pytest.raises(ValueError, match=f"{case.method.terms}"):
        case.method.measure(case.state, (case.record,) * (case.method.terms + 1), HYPER)


def rows_at_solve_are_used_there(case, rng):
    other = case.solve(record=case.other(rng)).direction
    assert not close(case.xp.get(other), case.direction(), 1e-3)


def own_gradients_of_the_batch_invert_its_own_fisher(case, rng):
    """What needs them is exact for the gradient of the same batch, g^T a / n, with F from the same g."""
    a, g = (case.xp.get(x) for x in (case.record.a, case.record.g))
    grad = np.einsum("bnso,bnsi->boi", g[0], a) / N
    own = kf.Factored(case.record.a, case.record.g[0, ...], N)
    got = case.xp.get(case.method.solve(case.state, own, HYPER, case.record).direction)
    F = case.xp.get(kf.dense(case.record))
    want = np.linalg.solve(F + DAMPING * np.eye(12), grad.reshape(2, 12, 1)).reshape(grad.shape)
    assert close(got, want, 1e-10)


def resting_steps_take_weighted_gradients(case, rng):
    """`weighted` leaves g alone in a step that computes; in one that rests it makes the weight gradient a direction
    that needs no solve: that of the step which computed, for the same batch."""
    xp = case.xp
    method = replace(case.method, steps=1)  # an epoch is one step: the second step shares the first's coefficients
    second = replace(HYPER, step=1)
    g = case.record.g[0, ...]
    computed = method.solve(case.state, kf.Factored(case.record.a, g, N), HYPER, case.record)
    assert not method.rests(HYPER)
    assert method.rests(second)
    for step in (0, xp.put(np.array(0))):  # a number, and an array as traced callers have it
        assert np.array_equal(xp.get(method.weighted(computed.state, g, replace(HYPER, step=step))), xp.get(g))
    weighted = xp.get(method.weighted(computed.state, g, second))
    grad = np.einsum("bnso,bnsi->boi", weighted, xp.get(case.record.a)) / N
    assert close(grad, xp.get(computed.direction), 1e-10)
    rested = method.solve(computed.state, xp.put(grad), second)
    assert np.array_equal(xp.get(rested.direction), grad)
    assert (xp.get(rested.code) == kf.Code.OK).all()


def linear_sides_grow_with_the_width(case, rng):
    """A state of twice the width takes twice the memory, not four times."""
    narrow, wide = (case.method.init(kf.Block(2, d, rows=16), np.zeros(1)) for d in (2000, 4000))
    bytes_of = lambda state: sum(np.asarray(x).nbytes for x in tree.leaves(state))  # noqa: E731
    assert bytes_of(wide) <= 2.1 * bytes_of(narrow)


def moments_follow_the_basis(case, rng):
    """Seen once more, the same data move what a refresh left: until then it holds a guess in the new basis."""
    stats = case.method.measure(case.state, case.record, HYPER)
    guessed = case.method.refresh(case.method.update(case.state, stats, HYPER), HYPER)
    seen = case.method.update(guessed, case.method.measure(guessed, case.record, HYPER), HYPER)
    solve = case.method.solve
    first, second = (case.xp.get(solve(x, case.xp.put(case.v), HYPER).direction) for x in (guessed, seen))
    assert not close(first, second, 1e-6)
    again = case.method.update(seen, case.method.measure(seen, case.record, HYPER), HYPER)
    assert close(case.xp.get(solve(again, case.xp.put(case.v), HYPER).direction), second)


def halves_are_the_whole(case, rng):
    """A refresh after one half is that after all, and then the other half does what all does and moves nothing else."""
    method = case.method
    other = case.other(rng)
    whole, half = (method.update(case.state, of(case.state, other, HYPER), HYPER) for of in halves(method, 0))
    whole, half = (method.refresh(state, HYPER) for state in (whole, half))
    directions = [case.xp.get(method.solve(x, case.xp.put(case.v), HYPER).direction) for x in (whole, half)]
    assert close(*directions)
    full, told = (of(half, other, HYPER) for of in halves(method, 1))
    seen, moved = (method.update(half, stats, HYPER) for stats in (full, method.combine(told, told)))
    for x, y in zip(tree.leaves(seen), tree.leaves(moved), strict=True):
        np.testing.assert_allclose(case.xp.get(x), case.xp.get(y), rtol=1e-12, atol=1e-12)


def halves(method, turn):
    """(all of it, the half of this turn)."""
    return method.measure, (method.basis_stats, method.moment_stats)[turn]


def one_more_update_moves_it(case, rng):
    leaves = [[case.xp.get(x) for x in tree.leaves(state) if 0 not in x.shape] for state in updated_again(case)]
    assert any(abs(x - y).max() > 1e-6 * abs(x).max() for x, y in zip(*leaves, strict=True))


def updated_again(case):
    """One cycle's state, and that after one more update on the same record."""
    once = case.method.init(case.block, case.record.g)
    once = case.method.refresh(case.method.update(once, case.method.measure(once, case.given, HYPER), HYPER), HYPER)
    return once, case.method.update(once, case.method.measure(once, case.given, HYPER), HYPER)


def refreshes_in_step_are_refreshes_alone(case, rng):
    """Three layers, the second of which is beyond repair: each has the state and the codes of its refresh alone."""
    another = (case.other(rng), *case.given[1:]) if declares(case.method, contract.Terms) else case.other(rng)
    broken = tree.map(lambda x: x * float("nan") if "float" in str(x.dtype) else x, case.state)
    states = [case.state, broken, kf.settle(case.method, another, damping=DAMPING)]
    apart = [case.method.refresh(state, HYPER) for state in states]
    in_step = alone(lockstep([case.method.refreshing(state, HYPER) for state in states]))
    for found, wanted in zip(in_step, apart, strict=True):
        for x, y in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(case.xp.get(x), case.xp.get(y), rtol=1e-12, atol=1e-12)


LAWS = {
    contract.Refreshing: refreshes_in_step_are_refreshes_alone,
    contract.Restless: one_more_update_moves_it,
    contract.MovesWithBasis: moments_follow_the_basis,
    contract.Halves: halves_are_the_whole,
    contract.LinearSides: linear_sides_grow_with_the_width,
    contract.RowsAtSolve: rows_at_solve_are_used_there,
    contract.OwnGradients: own_gradients_of_the_batch_invert_its_own_fisher,
    contract.Unmeasured: unmeasured_states_do_not_move,
    contract.Resting: resting_steps_take_weighted_gradients,
    contract.Terms: terms_are_records_in_a_tuple,
    contract.KroneckerTerms: kronecker_terms_add_to_matvec,
    contract.Inverses: inverses_around_v_are_the_solve,
    contract.InverseSides: inverse_sides_are_the_inverses,
    contract.Eigensystem: eigensystem_solves_and_multiplies,
    contract.Matrix: matrix_times_vec_is_matvec,
    contract.Unit: unit_times_damping_is_what_a_solve_adds,
}


@pytest.mark.parametrize(("name", "kind"), DECLARED, ids=[f"{kind.__name__}-{name}" for name, kind in DECLARED])
@pytest.mark.parametrize("xp", FEW, ids=lambda n: n.name)
def test_what_a_method_declares_it_does(name, kind, xp, rng):
    LAWS[kind](Case(ALL[name], xp, rng), rng)


@pytest.mark.parametrize(("name", "kind"), DECLARED, ids=[f"{kind.__name__}-{name}" for name, kind in DECLARED])
def test_declared_signatures_are_the_protocols(name, kind):
    """Callers give arguments by place: the same names in the same order, and plain data for plain data."""
    for attribute in contract.names(kind):
        promised = vars(kind).get(attribute)
        found = getattr(ALL[name], attribute)
        if callable(promised):
            assert list(inspect.signature(found).parameters) == list(inspect.signature(promised).parameters)[1:]
        else:
            assert isinstance(found, bool | int)


@pytest.mark.parametrize("name", ALL)
def test_every_method_has_the_contracts_signatures(name):
    for attribute in ("init", "measure", "combine", "update", "refresh", "solve", "matvec"):
        promised = list(inspect.signature(getattr(contract.Method, attribute)).parameters)[1:]
        assert list(inspect.signature(getattr(ALL[name], attribute)).parameters) == promised


@pytest.mark.parametrize("name", [name for name in ALL if not declares(ALL[name], contract.RowsAtSolve)])
def test_undeclared_a_solve_does_not_see_the_record(name, rng):
    case = Case(ALL[name], FEW[0], rng)
    assert np.array_equal(case.solve(record=case.other(rng)).direction, case.solve().direction)


def stands(method):
    """Whether it says that one cycle on a record is all there is to learn of it."""
    moving = declares(method, contract.Restless) or declares(method, contract.MovesWithBasis)
    return method.cycles == 1 and not moving


@pytest.mark.parametrize("name", [name for name in ALL if stands(ALL[name])])
def test_undeclared_one_more_update_changes_no_direction(name, rng):
    case = Case(ALL[name], FEW[0], rng)
    once, again = (case.solve(record=case.record, state=state).direction for state in updated_again(case))
    assert close(once, again)


def test_every_capability_has_a_law_and_a_method():
    missing = [
        f"{kind.__name__}: add its law to LAWS in tests/test_laws_capabilities.py"
        for kind in CAPABILITIES.keys() - LAWS.keys()
    ]
    unused = CAPABILITIES.keys() - {kind for _, kind in DECLARED}
    missing += [f"{kind.__name__}: no row of METHODS declares it, so its law never runs" for kind in unused]
    assert not missing, missing
