"""One file, every framework, for a convolution: NumPy and torch go on from each other's files."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

import kfaccore as kf
import kfaccore_numpy as kn

torch = pytest.importorskip("torch")

import kfaccore_torch as kt  # noqa: E402

nn = torch.nn
LOSS = kf.SoftmaxCrossEntropy()
WINDOW = kf.Window((3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1))
NET = kn.Sequential((5, 4, 2), (kn.Conv2d(3, WINDOW), kn.Tanh(), kn.Flatten(), kn.Dense(3)))


def batch(i):
    rng = np.random.default_rng([1, i])
    return rng.normal(size=(8, 5, 4, 2)), rng.integers(0, 3, 8)


def core():
    return kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 2), kf.Schedules(0.1, 0.9), step=kf.Fixed(0.05, 0.9))


def numpy_steps(params, state, steps):
    for i in steps:
        rng = np.random.default_rng(i)
        _, state, _ = kn.step(NET, params, batch(i), LOSS, core(), state, i, rng, kn.true_labels)
    return state


class Last(nn.Module):
    """Channels last, as NumPy has them behind a convolution."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def in_torch():
    layers = OrderedDict(conv2d0=nn.Conv2d(2, 3, (3, 2)), tanh1=nn.Tanh(), flatten2=Last(), dense3=nn.Linear(27, 3))
    return kt.Optimizer(nn.Sequential(layers).double(), LOSS, core(), fisher=kf.empirical)


def torch_steps(optimizer, steps):
    for i in steps:
        x, y = batch(i)
        optimizer.step(torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.from_numpy(y))


def test_numpy_torch_numpy(tmp_path):
    """3 steps in each, of one function, are 9 in NumPy."""
    start = NET.init(np.random.default_rng(2), np.asarray)
    first = core().init(NET.blocks(), np.zeros(1))
    whole, params, path = dict(start), dict(start), tmp_path / "x"
    numpy_steps(whole, first, range(9))
    kf.save(path, {"params": params, "state": numpy_steps(params, first, range(3))})
    ours = in_torch()
    ours.load(path)
    torch_steps(ours, range(3, 6))
    ours.save(path)
    assert kf.load(path)["params"]["conv2d0"].shape == (1, 3, 13)  # as before
    found = kf.load(path, like={"params": dict(start), "state": first})
    numpy_steps(found["params"], found["state"], range(6, 9))
    for name, W in whole.items():
        np.testing.assert_allclose(found["params"][name], W, rtol=1e-10, atol=1e-12)


def test_the_kernel_of_a_transposed_one_runs_the_other_way_elsewhere(tmp_path):
    """Its own file loads; one without the axis of one block is another adapter's."""
    path = tmp_path / "x"
    x, y = torch.randn(4, 2, 3).double(), torch.arange(4) % 3

    def made():
        layers = OrderedDict(c=nn.ConvTranspose1d(2, 2, 3, 2), f=nn.Flatten(), b=nn.Linear(14, 3))
        return kt.Optimizer(nn.Sequential(layers).double(), nn.CrossEntropyLoss())

    first, second = made(), made()
    first.step(x, y)
    first.save(path)
    second.load(path)
    torch.testing.assert_close(second.model.c.weight, first.model.c.weight, rtol=0.0, atol=0.0)
    tree = kf.load(path)
    tree["params"]["c"] = tree["params"]["c"][0]
    kf.save(path, tree, **kf.metadata(path))
    with pytest.raises(ValueError, match=r"written by another adapter.*transposed convolutions.*\['c'\]"):
        second.load(path)
