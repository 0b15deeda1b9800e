"""Heads of one loss with different numbers of rows: each row an example, or examples that explain the calls better."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf
import torch_oracle as oracle

torch = pytest.importorskip("torch")
nn = torch.nn

import kfaccore_torch as kt  # noqa: E402

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")


class Semi(nn.Module):
    """One net on two batches."""

    losses = kf.Joint({"labelled": CE, "unlabelled": CE}, {"unlabelled": 0.3})

    def __init__(self):
        super().__init__()
        self.n = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x, u):
        return {"labelled": self.n(x), "unlabelled": self.n(u)}

    @classmethod
    def batch(cls, first, second):
        y = {"labelled": torch.arange(first) % 3, "unlabelled": torch.arange(second) % 3}
        return (torch.randn(first, 3), torch.randn(second, 3)), y


class Detector(nn.Module):
    """Classes of all anchors, boxes of some."""

    losses = kf.Joint({"cls": CE, "box": nn.MSELoss()})

    def __init__(self):
        super().__init__()
        self.b, self.c, self.r = nn.Conv2d(1, 2, 2, padding=1), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x, there):
        h = torch.tanh(self.b(x))
        classes, boxes = (head(h).permute(0, 2, 3, 1).reshape(-1, d) for head, d in ((self.c, 3), (self.r, 2)))
        return {"cls": classes, "box": boxes[there]}

    @classmethod
    def batch(cls, images, there):
        anchors = images * 9
        y = {"cls": torch.arange(anchors) % 3, "box": torch.randn(there, 2)}
        return (torch.randn(images, 1, 2, 2), torch.randperm(anchors)[:there]), y


class Words(nn.Module):
    """A class of each word, words of all sentences one after the other, and a number of each sentence."""

    losses = kf.Joint({"word": CE, "mark": nn.MSELoss()}, {"mark": 2.0})

    def __init__(self):
        super().__init__()
        self.b, self.c, self.r = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.b(x))
        return {"word": self.c(h).flatten(0, 1), "mark": self.r(h.mean(1))}

    @classmethod
    def batch(cls, sentences, words):
        y = {"word": torch.arange(sentences * words) % 3, "mark": torch.randn(sentences, 1)}
        return (torch.randn(sentences, words, 3),), y


CASES = {
    "two batches": (Semi, (4, 6), set()),
    "two batches, one twice as large": (Semi, (3, 6), set()),
    "boxes of some anchors": (Detector, (2, 5), {"b"}),
    "boxes of half of them": (Detector, (2, 9), {"b"}),
    "words and sentences": (Words, (3, 4), set()),
}


def columns(model, f, target):
    """A draw for every number of the prediction: for all examples together, as where rows mix them, it is exact."""
    roots = []
    for at, (head, loss) in enumerate(model.losses.losses):
        x = f[head].detach()
        weight = dict(model.losses.weights)[head]
        value = lambda z, loss=loss, head=head: loss(z, target[head])  # noqa: E731
        H = torch.autograd.functional.hessian(value, x).reshape(x.numel(), x.numel())
        values, vectors = torch.linalg.eigh(H * weight)
        root = (vectors * values.clamp(min=0).sqrt()).T.reshape(-1, *x.shape)
        roots.append((at, root))
    total = sum(len(root) for _, root in roots)
    draws = [torch.zeros(total, *x.shape) for x in f.values()]
    start = 0
    for at, root in roots:
        draws[at][start : start + len(root)] = root
        start += len(root)
    return draws


def ggn(model, head, inputs, target, layer):
    """Of one head's weighted loss."""
    loss = dict(model.losses.losses)[head]
    weight = dict(model.losses.weights)[head]
    return weight * oracle.ggn(lambda *x: model(*x)[head], lambda z: loss(z, target[head]), inputs, layer)


@pytest.mark.parametrize("name", CASES)
def test_records_are_of_the_network_function(name):
    kind, sizes, mixing = CASES[name]
    torch.manual_seed(0)
    model = kind()
    inputs, target = kind.batch(*sizes)
    f = model(*inputs)
    n = min(len(x) for x in f.values())
    own = [v * n**0.5 for v in columns(model, f, target)]
    found, _ = kt.records(model, kind.losses, inputs, target, draws=own)
    typed, _ = kt.records(model, kind.losses, inputs, target, fisher=kf.type2)
    for key, layer in kt.plan(model, *inputs).layers.items():
        wanted = sum(ggn(model, head, inputs, target, layer) for head, _ in kind.losses.losses)
        oracle.close(kf.dense(found[key]), wanted)
        if key not in mixing:  # random signs of examples make it right in the mean only
            oracle.close(kf.dense(typed[key]), wanted)


@pytest.mark.parametrize("name", CASES)
def test_both_shells_take_steps(name):
    kind, sizes, mixing = CASES[name]
    torch.manual_seed(0)
    model = kind()
    pre = kt.Preconditioner(model, kind.losses)
    inputs, target = kind.batch(*sizes)
    for _ in range(3):
        model.zero_grad()
        with pre.capture():
            f = model(*inputs)
        pre.loss(f, target).backward()
        pre.step()
    assert pre.engine.mixing == mixing
    optimizer = kt.Optimizer(model, kind.losses)
    losses = [optimizer.step(inputs, target) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_examples_of_signs_are_apart():
    heads = [torch.zeros(4, 2), torch.zeros(6, 3), torch.zeros(4)]
    from kfaccore_torch.split import Split

    split = Split.rows_of(heads)
    assert split.examples == 14
    assert np.concatenate([split.owner(len(f), i) for i, f in enumerate(heads)]).tolist() == list(range(14))
    assert [split.of(i).examples for i in range(3)] == [4, 6, 4]
    assert Split.rows_of(heads[::2]) == Split(4)


def test_a_head_without_rows_is_named():
    torch.manual_seed(0)
    inputs, target = Detector.batch(2, 0)
    with pytest.raises(ValueError, match=r"empty: head 'box' has shape \(0, 2\)"):
        kt.Optimizer(Detector(), Detector.losses).step(inputs, target)
