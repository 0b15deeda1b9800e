"""Directions of all stacks of a GPU are checked together: codes and directions are those of one check a stack."""

from __future__ import annotations

import pytest
import torch

import kfaccore as kf
from kfaccore import solution
from kfaccore.xp import Code, gpu, tables

SIZES = {"a": (3, 5), "b": (4, 9), "c": (4, 9), "d": (2, 5), "broken": (4, 9), "endless": (3, 7)}


class Twice(kf.KFAC):
    """A method of one's own that goes on from what another's solve gives."""

    def solve(self, state, grad, hyper, record=None):
        found = super().solve(state, grad, hyper, record)
        return kf.Solution(2 * found.direction, found.code, found.state)


METHODS = {
    "kfac": kf.KFAC(),
    "eigenvalues": kf.KFAC(inverse=kf.eigh),
    "ekfac": kf.EKFAC(),
    "skfac": kf.SKFAC(),
    "singd": kf.SINGD(),
    "randomised": kf.RandomizedKFAC(),
    "diagonal": kf.Diagonal(),
    "cgfac": kf.CGFAC(),  # which goes on from its last direction
    "lanczos": kf.KFACCorrected(),  # which adds to that of another
    "own": Twice(),
}
NETWORKS = {"alone": None, "two levels": kf.TwoLevel()}  # which reads the directions of its layers


@pytest.fixture
def far(monkeypatch):
    """Tensors are as if on a device."""
    monkeypatch.setattr(solution, "on_gpu", torch.is_tensor)
    monkeypatch.setattr(tables, "on_gpu", torch.is_tensor)


def stepped(method: kf.Method, network: object, apart: bool = False):
    """Directions and codes of two steps; of one layer the gradient is NaN at the second, of one it is infinite."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    blocks = {name: kf.Block(*size) for name, size in SIZES.items()}
    pre = kf.Preconditioner(method, kf.Clocks(1, 1), kf.Schedules(0.1), network=network, step=kf.Fixed())
    state = pre.init(blocks, drawn(1))
    found = []
    for turn in range(2):
        records = {name: kf.Record(drawn(6, i), drawn(6, o), 6) for name, (o, i) in SIZES.items()}
        grads = {name: drawn(*size) for name, size in SIZES.items()}
        if turn:
            grads["broken"][1, 2] = torch.nan
            grads["endless"][0, 0] = torch.inf
        if apart:  # one stack, gradients of two kinds
            grads["c"] = grads["c"][None]
        directions, state, info = pre.step(state, records, grads)
        found.append((directions, {name: info.codes[name].tolist() for name in SIZES}, info.squares))
    return found


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("name", METHODS)
def test_directions_and_codes_are_those_of_a_check_each(name, network, request):
    want = stepped(METHODS[name], network)
    request.getfixturevalue("far")
    for (directions, codes, squares), (ours, our_codes, our_squares) in zip(
        want, stepped(METHODS[name], network), strict=True
    ):
        assert codes == our_codes
        for layer, direction in directions.items():
            torch.testing.assert_close(ours[layer], direction, rtol=0, atol=0)
            torch.testing.assert_close(our_squares[layer], squares[layer], rtol=1e-14, atol=0)
    assert {layer for layer, code in codes.items() if code == [Code.NONFINITE]} == {"broken", "endless"}
    assert not ours["broken"].any()


def test_of_gradients_of_two_kinds(request):
    want = stepped(kf.KFAC(), None, apart=True)
    request.getfixturevalue("far")
    for (directions, codes, _), (ours, our_codes, _) in zip(want, stepped(kf.KFAC(), None, apart=True), strict=True):
        assert codes == our_codes
        assert all(torch.equal(ours[layer], direction) for layer, direction in directions.items())


def test_one_operation_tells_of_all_stacks(far, monkeypatch):
    def each(x):
        raise AssertionError(f"a stack of {tuple(x.shape)} was checked by itself")

    monkeypatch.setattr(solution, "all_finite", each)
    stepped(kf.KFAC(), None)


def test_tables_with_zeros_behind_them(far, monkeypatch):
    """They are read with the zeros that products want, where their own rows lie apart."""
    zeros = gpu.zeros(torch.empty(2, 0), 3, 5)
    zeros[:, :3, :5] = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    cut = gpu.cut(zeros, 3, 5)
    cut[1, 2, 4] = -torch.inf
    apart = torch.ones(2, 4, 4)[:, :3, :3]  # neither dense nor known to have zeros behind it
    whole = torch.full((1, 2, 2), torch.nan)
    alone = []
    all_finite = tables.all_finite
    monkeypatch.setattr(tables, "all_finite", lambda x: alone.append(x) or all_finite(x))
    assert [x.tolist() for x in tables.finite_of([cut, apart, whole])] == [[True, False], [True, True], [False]]
    assert [x is apart for x in alone] == [True]
    first, second, _ = tables.squares_of([cut, apart, torch.ones(3, 4)])
    torch.testing.assert_close(first, (cut**2).sum((1, 2)))
    assert second.tolist() == [9.0, 9.0]
