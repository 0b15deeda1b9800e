"""States that are damaged: ValueError, whatever is wrong with them, and nothing has changed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
kt = pytest.importorskip("kfaccore_torch")

nn = torch.nn
THINGS: list[Any] = [
    None, 1, -5, 10**30, True, float("nan"), "x", b"x", [], {}, {"a": 1}, [1, [2]], object(), torch.tensor(3),
    torch.zeros(0), torch.ones(3, 3, dtype=torch.int64), torch.ones(2, 2).to_sparse(), np.ones(3),
]  # fmt: skip


class Net(nn.Module):
    """Two layers, and a parameter that no layer covers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layers(x) * self.scale.cos()


def data(seed: int):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=rng), torch.randint(0, 3, (16,), generator=rng)


def optimizer(net, seed: int = 0):
    """After two steps."""
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), step=kf.SelfTuning())
    found = kt.Optimizer(net, nn.CrossEntropyLoss(), core, rest=lambda p: torch.optim.Adam(p, 0.01))
    for _ in range(2):
        found.step(*data(seed))
    return found


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything in nested dicts and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def damaged(state: dict, path: tuple, thing: Any, gone: bool) -> dict:
    state = copy.deepcopy(state)
    node = state
    for key in path[:-1]:
        node = node[key]
    if gone:
        del node[path[-1]]
    else:
        node[path[-1]] = thing
    return state


def seen(thing) -> str:
    return pickle.dumps(kf.flatten(thing.engine.state)).hex() + str(thing.rest.state_dict() if thing.rest else "")


def test_what_is_no_state_is_a_value_error_and_changes_nothing():
    ours = optimizer(Net())
    good = ours.state_dict()
    assert "rest" in good
    rng = np.random.default_rng(0)
    known = [path for path in places(good) if path[0] != "rest"]
    cases = [(known[i], THINGS[rng.integers(len(THINGS))], rng.random() < 0.15) for i in rng.permutation(len(known))]
    cases += [(("rest",), thing, False) for thing in THINGS]
    before = seen(ours)
    refused = 0
    for path, thing, gone in cases:
        try:
            ours.load_state_dict(damaged(good, path, thing, gone))
        except ValueError:
            refused += 1
            assert seen(ours) == before, path
        else:
            ours.load_state_dict(good)
    assert refused > 0.9 * len(cases)
    for thing in THINGS:
        with pytest.raises(ValueError, match="state"):
            ours.load_state_dict(thing)
    assert seen(ours) == before


def test_a_damaged_rest_changes_no_optimizer():
    """Loading leaves more parameters to the rest than a new optimizer knows of: if it fails, so it stays."""

    class Odd(Net):
        def forward(self, x):
            weight = self.layers[2].weight.cos()  # seen at the first step: it is no linear layer's
            return nn.functional.linear(self.layers[1](self.layers[0](x)), weight) * self.scale.cos()

    good = optimizer(Odd()).state_dict()
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), step=kf.SelfTuning())
    ours = kt.Optimizer(Odd(), nn.CrossEntropyLoss(), core, rest=torch.optim.Adam)
    rest, plan = ours.rest, ours.engine.plan
    known = len(rest.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"rest|parameter group|state"):
        ours.load_state_dict({**good, "rest": {"state": {}, "param_groups": []}})
    assert ours.rest is rest
    assert len(rest.param_groups[0]["params"]) == known
    assert ours.engine.plan is plan
    ours.load_state_dict(good)
    assert ours.rest is rest  # one for the whole run, which a schedule may hold
    assert len(rest.param_groups[0]["params"]) > known


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied):
    """As loops of others make them: for averages of parameters, for processes of their own."""
    net = Net()
    core = kf.Preconditioner(kf.EKFAC(), step=kf.SelfTuning())
    ours = kt.Optimizer(net, nn.CrossEntropyLoss(), core, rest=torch.optim.Adam)
    ours.step(*data(0))
    other_net, other = copied((net, ours))
    for seed in (1, 2):
        for thing in (ours, other):
            thing.step(*data(seed))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other_net.parameters(), strict=True))


def test_two_models_in_two_threads_are_one_after_the_other():
    def trained(net, seed):
        ours = optimizer(net, seed)
        file = io.BytesIO()
        for _ in range(6):
            ours.step(*data(seed))
            torch.save(ours.state_dict(), file)
        return [p.detach().clone() for p in net.parameters()]

    nets = [Net(1), Net(2)]  # made before: torch has one generator for all threads
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(trained, nets, (1, 2)))
    for seed, found in zip((1, 2), together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(found, trained(Net(seed), seed), strict=True))
