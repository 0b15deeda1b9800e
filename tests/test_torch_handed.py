"""What a forward does to the batch that it is handed: a second look is at the batch as the step was given it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import kfaccore as kf

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = [pytest.mark.usefixtures("torch_double"), pytest.mark.filterwarnings("error")]


def data():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 3, generator=g), torch.arange(32) % 3
    x[:, 0] += y
    return x, y


class Net(nn.Module):
    """Sees 2 x + 1, which `take(batch)` gives."""

    def __init__(self, take):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.take = take

    def forward(self, batch):
        return self.layers(self.take(batch))


def of_object(batch):
    batch.x = batch.x * 2.0
    batch.x.add_(1.0)
    return batch.x


def of_dict(batch):
    batch["x"] = batch["x"] * 2.0 + 1.0
    return batch["x"]


def of_list(batch):
    batch.append(batch[0] * 2.0 + 1.0)
    return sum(batch[1:])


def of_array(batch):
    batch *= 2.0
    batch += 1.0
    return torch.from_numpy(batch.copy())


WAYS = {
    "pure": (lambda x: x, lambda x: x * 2.0 + 1.0),
    "in place": (lambda x: x, lambda x: x.mul_(2.0).add_(1.0)),
    "a view in place": (lambda x: x, lambda x: x.view(-1).mul_(2.0).add_(1.0).view_as(x)),
    "popped": (lambda x: ({"x": x},), lambda batch: batch.pop("x") * 2.0 + 1.0),
    "replaced": (lambda x: ({"x": x},), of_dict),
    "nested": (lambda x: ([{"x": x}],), lambda batch: of_dict(batch[0])),
    "appended": (lambda x: ([x],), of_list),
    "an object": (lambda x: (SimpleNamespace(x=x),), of_object),
    "an array": (lambda x: (x.numpy(),), of_array),
    "keywords": (lambda x: {"batch": {"x": x}}, of_dict),
}


def trained(way, steps=5):
    x, y = data()
    made, take = WAYS[way]
    optimizer = kt.Optimizer(Net(take), CE)
    return [optimizer.step(made(x.clone()), y) for _ in range(steps)], optimizer.info.step["ratio"]


@pytest.mark.parametrize("way", WAYS)
def test_both_looks_are_at_the_batch_that_was_given(way):
    losses, ratio = trained(way)
    right, wanted = trained("pure")
    np.testing.assert_allclose(losses, right, rtol=1e-12)
    np.testing.assert_allclose(ratio, wanted, rtol=1e-9)


@pytest.mark.parametrize("way", ["in place", "appended", "replaced"])
def test_a_batch_is_left_as_one_forward_leaves_it(way):
    (x, y), (made, take) = data(), WAYS[way]
    batch, once = made(x.clone()), made(x.clone())
    kt.Optimizer(Net(take), CE).step(batch, y)
    Net(take)(*(once if isinstance(once, tuple) else (once,)))
    assert str(batch) == str(once)


def test_a_forward_that_writes_for_the_first_time_later_is_named_once():
    x, y = data()
    model = Net(lambda x: x.mul_(2.0).add_(1.0) if model.writes else x * 2.0 + 1.0)
    optimizer = kt.Optimizer(model, CE)
    for model.writes in (False, False):
        optimizer.step(x.clone(), y)
    model.writes = True
    with pytest.warns(UserWarning, match="written to .'inputs'."):
        optimizer.step(x.clone(), y)
    for _ in range(2):
        optimizer.step(x.clone(), y)


def test_what_can_be_read_once_is_named_where_it_is_read_twice():
    x, y = data()
    model = Net(lambda parts: torch.cat(list(parts)))
    with pytest.raises(TypeError, match=r"inputs\[0\] is a generator"):
        kt.Optimizer(model, CE).step(((part for part in x.split(8)),), y)
    fixed = kt.Optimizer(model, CE, kf.Preconditioner(kf.KFAC(), step=kf.Fixed(0.1)))
    fixed.step(((part for part in x.split(8)),), y)


@pytest.mark.parametrize("way", ["in place", "popped", "replaced", "an array"])
def test_streams_and_plans_leave_batches_as_they_are(way):
    (x, y), (made, take) = data(), WAYS[way]
    model, batch = Net(take), made(x.clone())
    kt.plan(model, *(batch if isinstance(batch, tuple) else (batch,)))
    stream = kt.Stream(model, CE, [(batch, y)], fisher=kf.type2)
    wanted = kt.Stream(Net(WAYS["pure"][1]), CE, [(x, y)], fisher=kf.type2)
    for found in (*stream, *stream):
        for name, record in next(iter(wanted)).items():
            np.testing.assert_allclose(kf.dense(found[name]), kf.dense(record), rtol=1e-12)
