"""Arrays are made where the record is: a default device of no numbers stands for every other one."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
from rows import METHODS

torch = pytest.importorskip("torch")


class elsewhere:
    """Tensors made without a device have no numbers, and go with no others."""

    def __enter__(self):
        torch.set_default_device("meta")

    def __exit__(self, *_):
        torch.set_default_device(None)


def normal(*shape):
    return torch.as_tensor(np.random.default_rng(sum(shape)).normal(size=shape), device="cpu")


def ids(draws=1):
    return kf.Record(kf.Ids(torch.arange(8, device="cpu").reshape(4, 2) % 5, 5), normal(draws, 4, 2, 3), 4.0)


def rows(mask=None):
    return kf.Record(normal(4, 2, 5), normal(4, 2, 3), 4.0, mask)


def joint():
    loss = kf.Joint({"a": kf.Gaussian(), "b": kf.SoftmaxCrossEntropy()})
    return kf.type2(loss, {"a": normal(4, 2), "b": normal(4, 3)})


def two_masks():
    return kf.concat(rows(torch.tensor([[True, False]] * 4, device="cpu")), rows()).mask


def self_tuned():
    pre = kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning())
    grad = normal(3, 5)
    return pre.step(pre.init({"a": kf.Block(3, 5, diagonal_in=True)}, grad), {"a": ids()}, {"a": grad}, loss=1.0)[0]


def layers_of_their_own_damping():
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules({"a": 0.1, "b": normal(1)[0].abs()}), stacked=True)
    grads = {name: normal(3, 5) for name in "ab"}
    records = {name: kf.Record(normal(4, 5), normal(4, 3), 4.0) for name in "ab"}
    return pre.step(pre.init({name: kf.Block(3, 5) for name in "ab"}, grads["a"]), records, grads)[0]


def one_hot():
    return ids().rows()


MADE = [one_hot, two_masks, joint, self_tuned, layers_of_their_own_damping]


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_nothing_is_made_on_the_default_device(make):
    want = make()
    with elsewhere():
        found = make()
    for x, y in zip(_tensors(found), _tensors(want), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "row", [row for row in METHODS if "fngd" in row.name or "cgfac" in row.name], ids=lambda row: row.name
)
def test_methods_of_rows_make_nothing_there(row):
    record = kf.Record(normal(4, 1, 4), normal(1, 4, 1, 3), 4.0)
    grad = normal(3, 4)
    want = kf.direction(record, grad, row.method)
    with elsewhere():
        found = kf.direction(record, grad, row.method)
    assert torch.equal(found, want)


def _tensors(x):
    return list(x.values()) if isinstance(x, dict) else [x]
