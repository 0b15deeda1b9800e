"""Data decide whose row it is, by any operation, and the next batch has other data of the same shapes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

CE = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("torch_double")
SIZES = [[3, 2, 4], [3, 2, 4], [2, 4, 3], [3, 2, 4], [1, 5, 3], [4, 4, 1], [5, 2, 2]]
FAR = -99.0


def added(w):
    """A mask that is added."""
    return torch.where(w > 0, 0.0, FAR)


def nested(h, w):
    return torch.nested.as_nested_tensor(list(h.split(w.sum(1).int().tolist())))


def summing(w):
    """A matrix of all nodes whose first rows sum the graphs."""
    first = w.argmax(1)
    matrix = torch.eye(9)
    matrix[first] = w
    return matrix[torch.cat([first, torch.tensor([i for i in range(9) if i not in first])])]


# h (9 nodes, 4), w (3 graphs, 9 nodes) of zeros and ones, q (3 graphs, 4)
POOLS = {
    "products in a loop": lambda h, w, q: torch.stack([(h * row[:, None]).sum(0) for row in w]),
    "where in a loop": lambda h, w, q: torch.stack([torch.where(row[:, None] > 0, h, 0.0).sum(0) for row in w]),
    "vectors in a loop": lambda h, w, q: torch.stack([h.T @ row for row in w]),
    "stacked": lambda h, w, q: (torch.stack([h, h, h]) * w[..., None]).sum(1),
    "joined": lambda h, w, q: (torch.cat([h, h, h]).view(3, 9, 4) * w[..., None]).sum(1),
    "addcmul": lambda h, w, q: torch.addcmul(torch.zeros(3, 9, 4), h[None], w[..., None]).sum(1),
    "lerp": lambda h, w, q: torch.lerp(torch.zeros(3, 9, 4), h.expand(3, 9, 4), w[..., None].expand(3, 9, 4)).sum(1),
    "logsumexp": lambda h, w, q: (h + added(w)[..., None]).logsumexp(1),
    "amax": lambda h, w, q: (h + added(w)[..., None]).amax(1),
    "max": lambda h, w, q: h[None].masked_fill(w[..., None] == 0, FAR).max(1).values,
    "minimum": lambda h, w, q: torch.minimum(h.expand(3, 9, 4), (20 * w - 10)[..., None].expand(3, 9, 4)).amax(1),
    "relu": lambda h, w, q: (h + 2 - 99 * (1 - w[..., None])).relu().sum(1),
    "exponents": lambda h, w, q: ((h + 2).log() + added(w)[..., None]).exp().sum(1),
    "attention": lambda h, w, q: (q @ h.T + added(w)).softmax(1) @ h,
    "attention, filled": lambda h, w, q: (q @ h.T).masked_fill(w == 0, -torch.inf).softmax(1) @ h,
    "attention, fused": lambda h, w, q: F.scaled_dot_product_attention(q[None], h[None], h[None], w.bool()[None])[0],
    "solve": lambda h, w, q: torch.linalg.solve(summing(w).inverse(), h)[:3],
    "convolution": lambda h, w, q: F.conv1d(h.T[:, None], w[:, None])[..., 0].T,
    "linear": lambda h, w, q: F.linear(h.T, w).T,
    "nested": lambda h, w, q: nested(h, w).to_padded_tensor(0.0).sum(1),
}


class Net(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.a, self.q, self.o, self.pool = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3), pool

    def forward(self, x, w, q):
        return self.o(self.pool(torch.tanh(self.a(x)), w, self.q(q)))


class Packed(nn.Module):
    """Documents in one row, that see themselves alone; a class token of each is predicted."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)
        self.t = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x, w, q):
        of = torch.cat([torch.arange(3), w.argmax(0)])
        z = torch.cat([torch.zeros(3, 3), x])[None]
        return self.o(self.t(self.a(z), src_mask=of[:, None] != of)[0, :3])


NETS = {**{name: lambda pool=pool: Net(pool) for name, pool in POOLS.items()}, "packed documents": Packed}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", NETS)
def test_a_record_is_that_of_its_own_batch(name):
    model, y = NETS[name](), torch.tensor([0, 2, 1])
    members = [torch.repeat_interleave(torch.eye(3), torch.tensor(sizes), 1) for sizes in SIZES]
    data = [((torch.randn(9, 3), w, torch.randn(3, 2)), y) for w in members]
    for (inputs, target), records in zip(data, kt.Stream(model, CE, data, kf.type2), strict=True):
        fresh, _ = kt.records(model, CE, inputs, target, fisher=kf.type2)
        for layer, record in fresh.items():
            assert records[layer].batch == record.batch
            for of in (kf.expand, kf.reduce):
                seen, want = of(records[layer]), of(record)
                np.testing.assert_allclose(kf.dense(seen), kf.dense(want), rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(kf.dense(records[layer]), kf.dense(record), rtol=1e-12, atol=1e-15)


class Masked(nn.Module):
    """Words with a mask of padding, positions, several heads, dropout and a norm: what shapes say is enough."""

    def __init__(self):
        super().__init__()
        self.e, self.p, self.o = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, 3)
        self.t = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x):
        z = self.t(self.e(x) + self.p(torch.arange(6)), src_key_padding_mask=x == 0)
        return self.o(z.masked_fill((x == 0)[..., None], 0.0).sum(1) / (x != 0).sum(1, keepdim=True))


class Images(nn.Module):
    """Convolutions in groups, norms, poolings, a gate of channels, patches turned and rolled, sides padded."""

    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2)
        self.n, self.g, self.l = nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.s, self.f, self.o = nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.gelu(self.n(self.c(x)))
        h = h * torch.sigmoid(self.s(h.mean((2, 3))))[..., None, None]
        h = F.max_pool2d(F.silu(self.g(self.d(F.pad(h, (1, 1, 1, 1))))), 2)
        h = self.l(h.permute(0, 2, 3, 1)).roll((1, 1), (1, 2))
        left, right = h.reshape(len(x), -1, 2, 4).unbind(2)
        h = torch.cat([left, right.flip(1)], -1)
        return self.o(F.dropout(torch.tanh(self.f(h)), 0.1).softmax(-1)[:, 1:].logsumexp(1))


class Siamese(nn.Module):
    """Both sides of a pair behind each other, through one network."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        first, second = F.normalize(torch.tanh(self.a(x.transpose(0, 1).reshape(-1, 3)))).chunk(2)
        return self.o(2 * first * second)


PLAIN = {
    "words": (Masked, lambda: torch.randint(1, 9, (4, 6)) * (torch.arange(6) < torch.randint(3, 7, (4, 1)))),
    "images": (Images, lambda: torch.randn(4, 3, 8, 8)),
    "pairs": (Siamese, lambda: torch.randn(4, 2, 3)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_shapes_say_is_not_confirmed_in_every_batch(name):
    make, inputs = PLAIN[name]
    model, y = make(), torch.tensor([0, 2, 1, 1])
    pre = kt.Preconditioner(model, CE, kf.Preconditioner(kf.KFAC(), kf.Clocks(1, 1)))
    for _ in range(3):
        model.zero_grad()
        with pre.capture():
            f = model(inputs())
        pre.loss(f, y).backward()
        pre.step()
    assert list(pre.engine.observer.loose.values()) == [{}]
