"""Models whose parameters go through operations that no module of a known type stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Uses(nn.Module):
    """Parameters by name, a head, and what is done with them as a function (self, x) -> (batch, positions, 4)."""

    def __init__(self, does, **shapes):
        super().__init__()
        self.does = does
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.7))
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        z = torch.tanh(self.does(self, x))
        return self.o(z.flatten(1, -2).mean(1) if z.ndim > 2 else z)


def of(does, **shapes):
    return lambda: Uses(does, **shapes)


def tokens():
    return torch.randn(4, 5, 3)


def rows():
    return torch.randn(4, 3)


class GPTConv(nn.Module):
    """The linear layer of GPT-2: weight (in, out), and addmm."""

    def __init__(self, nx, nf):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Norm(nn.Module):
    """RMSNorm as language models write it."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Cross(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.attention, self.o = nn.MultiheadAttention(4, 2, batch_first=True, **more), nn.Linear(4, 3)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, more.get("kdim") or 4)

    def forward(self, x):
        q, k = torch.tanh(self.a(x[:, :2])), torch.tanh(self.b(x))
        return self.o(self.attention(q, k, k, need_weights=False)[0].mean(1))


class Routed(nn.Module):
    """Experts whose weights are one parameter, each taken out of it for the rows that go to it."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(2, 4, 3)), nn.Linear(4, 3)
        self.goes = torch.tensor([0, 1, 1, 0])

    def forward(self, x):
        z = x.new_zeros(len(x), 4)
        for i in range(2):
            mine = (self.goes == i).nonzero()[:, 0]
            z = z.index_add(0, mine, torch.tanh(F.linear(x[mine], self.w[i])))
        return self.o(z)


class Recurrent(nn.Module):
    def __init__(self, kind, lengths=None, **more):
        super().__init__()
        self.r = kind(3, 4, batch_first=True, **more)
        self.lengths = lengths
        self.o = nn.Linear(2 * 4 if more.get("bidirectional") else more.get("proj_size") or 4, 3)

    def forward(self, x):
        if self.lengths is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
            y, _ = self.r(x)
            y = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]
        else:
            y, _ = self.r(x)
        return self.o(y.sum(1))


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.c, self.o = kind(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = None
        for t in range(x.shape[1]):
            h = self.c(x[:, t], h)
        return self.o(h[0] if isinstance(h, tuple) else h)


class Bags(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        padding = 2 if way == "padding" else None
        self.e = nn.EmbeddingBag(7, 4, mode="sum" if way in ("sum", "weights") else "mean", padding_idx=padding)
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        if self.way == "ragged":
            return self.o(torch.tanh(self.e(x.reshape(-1), torch.tensor([0, 5, 5, 9]))))
        weights = torch.linspace(0.5, 2, x.numel()).reshape(x.shape) if self.way == "weights" else None
        return self.o(torch.tanh(self.e(x, per_sample_weights=weights)))


class Adapter(nn.Module):
    """Low-rank matrices beside a frozen layer."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 4))
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.base(x) + (x @ self.A @ self.B) * 0.5).mean(1))


class Up(nn.Module):
    """A transposed convolution of any number of axes."""

    def __init__(self, axes, **more):
        super().__init__()
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        self.axes, self.up, self.o = axes, kind(2, 4, **more), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.up(x)).flatten(2).mean(2))


def image(axes):
    return lambda: torch.randn(4, 2, *(3, 4, 2)[:axes])


def ids(*shape):
    return lambda: torch.randint(0, 7, shape)


W = {"w": (3, 4)}
OBSERVED = {  # name: (model, inputs); every row is of one example
    "matmul": (of(lambda m, x: x @ m.w, **W), tokens),
    "matmul of rows": (of(lambda m, x: x @ m.w, **W), rows),
    "matrix first": (of(lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2), w=(4, 3)), tokens),
    "columns": (of(lambda m, x: (m.w @ x.T).T, w=(4, 3)), rows),
    "mm, twice": (of(lambda m, x: torch.mm(torch.tanh(torch.mm(x, m.w)), m.w) @ m.v, w=(3, 3), v=(3, 4)), rows),
    "addmm": (of(lambda m, x: torch.addmm(m.b, x, m.w), b=(4,), **W), rows),
    "addmm, scaled": (of(lambda m, x: torch.addmm(m.b, x, m.w, alpha=2, beta=0.5), b=(4,), **W), rows),
    "product and sum": (of(lambda m, x: x @ m.w + m.b, b=(4,), **W), tokens),
    "einsum": (of(lambda m, x: torch.einsum("bsd,df->bsf", x, m.w), **W), tokens),
    "einsum, turned": (of(lambda m, x: torch.einsum("fd,bsd->bsf", m.w, x), w=(4, 3)), tokens),
    "einsum to heads": (of(lambda m, x: torch.einsum("bsd,hdf->bshf", x, m.w), w=(2, 3, 4)), tokens),
    "tensordot": (of(lambda m, x: torch.tensordot(x, m.w, dims=1), **W), tokens),
    "linear of a slice": (of(lambda m, x: F.linear(x, m.w[:4]) + F.linear(x, m.w[4:]), w=(8, 3)), tokens),
    "linear of a transpose": (of(lambda m, x: F.linear(x, m.w.T), **W), tokens),
    "linear of a copy": (of(lambda m, x: F.linear(x, m.w.to(torch.float64, copy=True)), w=(4, 3)), tokens),
    "parameter of three axes": (of(lambda m, x: x @ m.w.view(3, 4), w=(3, 2, 2)), tokens),
    "vector": (of(lambda m, x: (x @ m.v)[..., None] * torch.ones(4), v=(3,)), tokens),
    "heads": (of(lambda m, x: torch.einsum("bhd,hdf->bhf", x, m.w), w=(5, 3, 4)), tokens),
    "bmm": (of(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=(5, 3, 4)), tokens),
    "bmm of a repeated matrix": (of(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), **W), tokens),
    "matmul of a stack": (of(lambda m, x: x[:, None] @ m.w, w=(2, 3, 4)), tokens),
    "stack first": (of(lambda m, x: (m.w @ x[:, None].mT).mT, w=(2, 4, 3)), tokens),
    "experts, all rows": (of(lambda m, x: (x.reshape(1, -1, 3) @ m.w).unflatten(1, (4, 5))[0], w=(1, 3, 4)), tokens),
    "routed": (Routed, rows),
    "conv1d of GPT-2": (
        lambda: nn.Sequential(GPTConv(3, 4), nn.GELU(), GPTConv(4, 4), Mean(), nn.Linear(4, 3)),
        tokens,
    ),
    "rms norm by hand": (lambda: nn.Sequential(nn.Linear(3, 4), Norm(4), nn.Tanh(), Mean(), nn.Linear(4, 3)), tokens),
    "layer scale": (of(lambda m, x: (x @ m.w) * m.s, s=(4,), **W), tokens),
    "gain of channels": (of(lambda m, x: (x.mT * m.s).mT @ m.w, s=(3, 1), **W), tokens),
    "gain of one number": (of(lambda m, x: (x @ m.w) * m.s, s=(), **W), tokens),
    "divided": (of(lambda m, x: (x @ m.w) / m.s, s=(4,), **W), rows),
    "one and a gain": (of(lambda m, x: F.rms_norm(x @ m.w, (4,)) * (1.0 + m.s), s=(4,), **W), tokens),
    "a gain turned round": (of(lambda m, x: (x @ m.w) * (2 - 3 * m.s), s=(4,), **W), tokens),
    "one and a gain of a norm": (
        of(lambda m, x: F.layer_norm(x @ m.w, (4,), m.s + 1, m.b), s=(4,), b=(4,), **W),
        tokens,
    ),
    "scaled": (of(lambda m, x: F.linear(x, 0.5 * m.w, m.b / 3), w=(4, 3), b=(4,)), tokens),
    "scaled alike, twice": (
        of(lambda m, x: F.linear(x, -m.w, m.b) + F.linear(x.tanh(), m.w), w=(4, 3), b=(4,)),
        tokens,
    ),
    "scaled convolution": (of(lambda m, x: F.conv1d(x.mT, m.w * 0.3, m.b).mT, w=(4, 3, 2), b=(4,)), tokens),
    "scaled look-up": (of(lambda m, x: F.embedding(x, m.t * 3.0), t=(7, 4)), ids(4, 5)),
    "straight through": (of(lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach()), w=(4, 3)), tokens),
    "constant added to a matrix": (of(lambda m, x: x @ (m.w + torch.eye(3, 4)), **W), tokens),
    "data added before a product": (of(lambda m, x: (x + m.p) @ m.w, p=(5, 3), **W), tokens),
    "joined along outputs": (
        of(
            lambda m, x: F.linear(x, torch.cat([m.w, 2 * m.v]), torch.cat([m.q, m.r])),
            w=(3, 3),
            v=(1, 3),
            q=(3,),
            r=(1,),
        ),
        tokens,
    ),
    "joined along inputs": (of(lambda m, x: F.linear(x, torch.cat([m.w, m.v], 1)), w=(4, 2), v=(4, 1)), tokens),
    "biases joined with zeros": (
        of(lambda m, x: F.linear(x, m.w, torch.cat([m.q, torch.zeros(2), m.v])), w=(4, 3), q=(1,), v=(1,)),
        tokens,
    ),
    "matrix times one row": (of(lambda m, x: torch.stack([m.w @ row for row in x]), w=(4, 3)), rows),
    "subtracted": (of(lambda m, x: (x @ m.w) - m.s, s=(1, 4), **W), tokens),
    "power": (of(lambda m, x: (x @ m.w).exp() ** m.s, s=(4,), **W), rows),
    "gain and bias in one": (of(lambda m, x: torch.addcmul(m.b, x, m.s) @ m.w, b=(3,), s=(3,), **W), tokens),
    "prelu": (of(lambda m, x: F.prelu((x @ m.w).mT, m.s).mT, s=(4,), **W), tokens),
    "positions added": (of(lambda m, x: (x + m.p) @ m.w, p=(5, 3), **W), tokens),
    "first positions": (of(lambda m, x: (x + m.p[:, :5]) @ m.w, p=(1, 9, 3), **W), tokens),
    "gains of positions": (of(lambda m, x: (x * m.p) @ m.w, p=(5, 3), **W), tokens),
    "class token": (of(lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1) @ m.w, p=(1, 1, 3), **W), tokens),
    "queries repeated": (
        of(lambda m, x: torch.softmax(m.p[None].repeat(len(x), 1, 1) @ x.mT, -1) @ x @ m.w, p=(2, 3), **W),
        tokens,
    ),
    "instance norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Unflatten(2, (4, 1)), Turned(), Mean(), nn.Linear(4, 3)),
        tokens,
    ),
    "looked up by hand": (of(lambda m, x: m.t[x], t=(7, 4)), ids(4, 5)),
    "chosen by hand": (of(lambda m, x: m.t.index_select(0, x.reshape(-1)).reshape(4, 5, 4), t=(7, 4)), ids(4, 5)),
    "bag, sum": (lambda: Bags("sum"), ids(4, 5)),
    "bag, mean": (lambda: Bags("mean"), ids(4, 5)),
    "bag, weights": (lambda: Bags("weights"), ids(4, 5)),
    "bag, ragged": (lambda: Bags("ragged"), ids(4, 3)),
    "bag, padding": (lambda: Bags("padding"), ids(4, 5)),
    "cross-attention": (Cross, tokens),
    "cross-attention, kdim": (lambda: Cross(kdim=3, vdim=3), tokens),
    "attention with bias_kv": (lambda: Cross(add_bias_kv=True), tokens),
    "low rank": (Adapter, tokens),
    "transposed 1d": (lambda: Up(1, kernel_size=3, stride=2, padding=1, output_padding=1), image(1)),
    "transposed 2d": (lambda: Up(2, kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2)), image(2)),
    "transposed 2d, groups": (lambda: Up(2, kernel_size=2, stride=2, groups=2, bias=False), image(2)),
    "transposed 3d": (lambda: Up(3, kernel_size=2, padding=1), image(3)),
    "transposed, padded past the kernel": (lambda: Up(1, kernel_size=2, stride=3, padding=2), image(1)),
    "LSTM": (lambda: Recurrent(nn.LSTM), tokens),
    "LSTM, two ways, two layers": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), tokens),
    "LSTM, projected": (lambda: Recurrent(nn.LSTM, proj_size=2), tokens),
    "LSTM, packed": (lambda: Recurrent(nn.LSTM, lengths=[5, 2, 4, 1], bidirectional=True), tokens),
    "GRU": (lambda: Recurrent(nn.GRU), tokens),
    "GRU, packed": (lambda: Recurrent(nn.GRU, lengths=[3, 5, 1, 5]), tokens),
    "RNN": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bias=False), tokens),
    "LSTM cell": (lambda: Cell(nn.LSTMCell), tokens),
    "GRU cell": (lambda: Cell(nn.GRUCell), tokens),
}


def pooled(m, x):
    """Learned queries, in a copy each example, of attention written out by PyTorch, which scales them by a number."""
    k = torch.tanh(x @ m.w)[:, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1, -1), k, k)


def pooled_once(m, x):
    """The same queries of all examples."""
    k = torch.tanh(x @ m.w)[:, None]
    return F.scaled_dot_product_attention(m.q, k, k)


def by_numbers(m, x):
    """Products and quotients of which autograd keeps a number, as PyTorch's own functions make them."""
    return x @ torch.ops.aten.mul.Scalar(torch.ops.aten.div.Scalar(m.w, 2.0), 3)


OBSERVED |= {
    "sdpa, learned queries": (of(pooled, q=(1, 1, 2, 4), **W), tokens),
    "sdpa, learned queries, repeated by it": (of(pooled_once, q=(1, 1, 2, 4), **W), tokens),
    "sdpa, a query of one head": (of(lambda m, x: pooled(m, x).mean(1), q=(1, 1, 1, 4), **W), tokens),
    "factors that are numbers": (of(by_numbers, **W), tokens),
    "a gain times a number": (of(lambda m, x: x * torch.ops.aten.mul.Scalar(m.g, 0.5) @ m.w, g=(3,), **W), tokens),
}


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class Turned(nn.Module):
    """InstanceNorm over positions, channels second, and back."""

    def __init__(self):
        super().__init__()
        self.n = nn.InstanceNorm1d(4, affine=True)
        nn.init.normal_(self.n.weight)

    def forward(self, x):
        return torch.tanh(self.n(x[..., 0].mT)).mT
