"""What a change of the model takes out of the layers is said, once and by name."""

from __future__ import annotations

import warnings

import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error")]
BATCH = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(8) % 3


class Half(nn.Module):
    def forward(self, w):
        return w / 2


class Squared(nn.Module):
    """Of a weight of its own that goes into no layer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x @ self.w.square().t()


def normed_as_of_old(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


CHANGES = {
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 0.4), ["0.weight_orig"]),
    "weight norm": (
        lambda m: parametrizations.weight_norm(m[0]),
        ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
    ),
    "weight norm of old": (lambda m: normed_as_of_old(m[0]), ["0.weight_g", "0.weight_v"]),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[0]), ["0.parametrizations.weight.original"]),
    "another module": (lambda m: m.__setitem__(0, Squared()), ["0.w"]),
}


def loop(model):
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))

    def step():
        model.zero_grad()
        with pre.capture():
            f = model(BATCH[0])
        pre.loss(f, BATCH[1]).backward()
        pre.step()

    return step, pre


def whole(model):
    optimizer = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    return lambda: optimizer.step(*BATCH), optimizer


@pytest.mark.parametrize("shell", [loop, whole])
@pytest.mark.parametrize("way", CHANGES)
def test_weights_that_are_remade_are_named_once(way, shell):
    change, names = CHANGES[way]
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    step, shell = shell(model)
    for _ in range(2):
        step()
    change(model)
    with pytest.warns(UserWarning, match="in the place of ones that were preconditioned") as told:
        step()
    assert len(told) == 1
    assert all(repr(name) in str(told[0].message) for name in names)
    assert shell.engine.plan.uncovered.keys() == {*names}
    model[2].bias.requires_grad_(False)
    for _ in range(2):
        step()


def test_a_model_that_is_one_layer():
    model = nn.Linear(3, 3)
    step, _ = loop(model)
    step()
    prune.l1_unstructured(model, "weight", 0.4)
    with pytest.warns(UserWarning, match="'weight_orig'"):
        step()


@pytest.mark.parametrize("shell", [loop, whole])
def test_changes_that_leave_all_covered_are_no_news(shell):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model.gain = nn.Parameter(torch.ones(2, 2))  # of no layer, and of no use
    step, _ = shell(model)
    step()
    model[2] = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    step()
    model[0].weight.requires_grad_(False)
    step()
    model[0] = nn.Linear(3, 5)
    step()
    parametrize.register_parametrization(model[0], "weight", Half(), unsafe=True)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=True)
    step()
