"""Models whose rows are laid out in ways that their sizes do not tell, each with inputs and a target."""

from __future__ import annotations

import torch
from torch import nn


class Tokens(nn.Module):
    """Attention-like mixing of positions; `way` says how predictions are laid out for the loss."""

    def __init__(self, way="axis", classes=3):
        super().__init__()
        self.way, self.a, self.m, self.o = way, nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, classes)

    def forward(self, x):
        z = torch.tanh(self.a(x))
        z = self.o(z + torch.tanh(self.m(z.cumsum(1))))
        if self.way == "axis":
            return z.transpose(1, 2)
        if self.way == "shifted":
            return z[:, :-1].reshape(-1, z.shape[-1])
        if self.way == "positions first":
            return z.transpose(0, 1).reshape(-1, z.shape[-1])
        return z.flatten(0, 1)


class TimeMajor(nn.Module):
    """Positions on the first axis, as many as or a multiple of the examples."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x.transpose(0, 1))).cumsum(0).mean(0))


class FoldedTimeMajor(TimeMajor):
    """Positions and examples folded into one axis, positions first."""

    def forward(self, x):
        rows = torch.tanh(self.a(x.transpose(0, 1).flatten(0, 1)))
        return self.o(rows.unflatten(0, (x.shape[1], x.shape[0])).mean(0))


class Pairs(nn.Module):
    """Both sides of a pair in one batch, one behind the other."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        first, second = torch.tanh(self.a(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
        return self.o(first * second)


class Frames(nn.Module):
    """Frames of a clip folded into the batch of a convolution."""

    def __init__(self, groups=1):
        super().__init__()
        self.c, self.o = nn.Conv2d(2, 2, 2, groups=groups), nn.Linear(2, 3)

    def forward(self, x):
        z = torch.tanh(self.c(x.flatten(0, 1))).mean((2, 3))
        return self.o(z.unflatten(0, x.shape[:2]).mean(1))


class Graphs(nn.Module):
    """Nodes of graphs of several sizes, summed into their graph."""

    def __init__(self, to=(0, 0, 0, 1, 1, 2, 2, 2, 2), graphs=3):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)
        self.goes, self.graphs = torch.tensor(to), graphs

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.o(h.new_zeros(self.graphs, 4).index_add(0, self.goes, h))


class Routed(nn.Module):
    """A mixture: each example goes to the expert that `self.goes` says, experts get their rows sorted."""

    def __init__(self):
        super().__init__()
        self.e, self.o = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]), nn.Linear(4, 3)
        self.goes = torch.tensor([0, 1, 1, 0])

    def forward(self, x):
        z = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.e):
            mine = (self.goes == i).nonzero()[:, 0]
            z = z.index_add(0, mine, torch.tanh(expert(x[mine])))
        return self.o(z)


class Sorted(nn.Module):
    """Rows in the order of their first feature, and back."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.o(torch.tanh(self.a(x[order]))[order.argsort()])


class Flipped(nn.Module):
    """Examples backwards through one layer."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x.flip(0))).flip(0))


class Stacked(nn.Module):
    """Examples one by one in an order of Python's, stacked in another."""

    def __init__(self):
        super().__init__()
        self.a, self.o, self.order = nn.Linear(3, 4), nn.Linear(4, 3), [2, 0, 3, 1]

    def forward(self, x):
        rows = {i: torch.tanh(self.a(x[i : i + 1])) for i in self.order}
        return self.o(torch.cat([rows[i] for i in range(len(x))]))


class Shared(nn.Module):
    """Positions embedded once for all, then moved, cast, scaled, dropped out or concatenated."""

    def __init__(self, way):
        super().__init__()
        self.way, self.p, self.a, self.o = way, nn.Embedding(3, 3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)
        self.wide = nn.Linear(6, 3)

    def forward(self, x):
        p = self.p(torch.arange(3))
        if self.way == "scaled":
            x = x + 0.5 * p
        elif self.way == "moved":
            x = (x.transpose(1, 2) + p.T).transpose(1, 2)
        elif self.way == "dropped":
            torch.manual_seed(3)
            x = x + self.drop(p)
        elif self.way == "concatenated":
            x = self.wide(torch.cat([x, p.expand(len(x), -1, -1)], -1))
        elif self.way == "prepended":
            x = torch.cat([p.expand(len(x), -1, -1), x], 1)
        elif self.way == "bias":
            x = torch.softmax(x @ x.transpose(1, 2) + (p @ p.T), -1) @ x
        return self.o(torch.tanh(self.a(x)).mean(1))


class Normed(nn.Module):
    """Batch statistics mix examples."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.o = nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.0), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.n(self.a(x))))


class Messages(nn.Module):
    """Nodes are the examples, and hear from their neighbours."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 4), nn.Linear(4, 3)
        self.edge = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.o(h + h.new_zeros(h.shape).index_add(0, self.edge[1], h[self.edge[0]]))


class Contrast(nn.Module):
    """Similarities of two towers: each prediction sees the whole batch of the second."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.u(x) @ torch.tanh(self.v(x)).T


class Chosen(nn.Module):
    """The loss is of some examples, or some positions, alone."""

    def __init__(self, chosen):
        super().__init__()
        self.a, self.o, self.chosen = nn.Linear(3, 4), nn.Linear(4, 3), torch.tensor(chosen)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x)))[self.chosen]


def labels(*shape):
    return torch.randint(0, 3, shape)


OWNED = {  # name: (model, inputs, target); every row is of one example
    "classes second": (Tokens, lambda: torch.randn(4, 5, 3), lambda: labels(4, 5)),
    "flattened": (lambda: Tokens("flat"), lambda: torch.randn(4, 5, 3), lambda: labels(20)),
    "flattened, as many positions": (lambda: Tokens("flat"), lambda: torch.randn(4, 4, 3), lambda: labels(16)),
    "flattened, one example": (lambda: Tokens("flat"), lambda: torch.randn(1, 5, 3), lambda: labels(5)),
    "shifted": (lambda: Tokens("shifted"), lambda: torch.randn(4, 5, 3), lambda: labels(16)),
    "positions first, flattened": (
        lambda: Tokens("positions first"),
        lambda: torch.randn(4, 5, 3),
        lambda: labels(20),
    ),
    "ignored": (Tokens, lambda: torch.randn(4, 5, 3), lambda: labels(4, 5).index_fill(1, torch.tensor([1, 3]), -100)),
    "time major": (TimeMajor, lambda: torch.randn(4, 8, 3), lambda: labels(4)),
    "time major, square": (TimeMajor, lambda: torch.randn(4, 4, 3), lambda: labels(4)),
    "folded, positions first": (FoldedTimeMajor, lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "pairs": (Pairs, lambda: torch.randn(4, 2, 3), lambda: labels(4)),
    "two pairs": (Pairs, lambda: torch.randn(2, 2, 3), lambda: labels(2)),
    "frames": (Frames, lambda: torch.randn(4, 3, 2, 4, 4), lambda: labels(4)),
    "frames in groups": (lambda: Frames(2), lambda: torch.randn(4, 3, 2, 4, 4), lambda: labels(4)),
    "graphs": (Graphs, lambda: torch.randn(9, 3), lambda: labels(3)),
    "graphs, shuffled": (lambda: Graphs((2, 0, 1, 0, 2, 2)), lambda: torch.randn(6, 3), lambda: labels(3)),
    "graphs, one empty": (lambda: Graphs((0, 0, 0, 2, 2)), lambda: torch.randn(5, 3), lambda: labels(3)),
    "routed": (Routed, lambda: torch.randn(4, 3), lambda: labels(4)),
    "sorted": (Sorted, lambda: torch.randn(5, 3), lambda: labels(5)),
    "backwards": (Flipped, lambda: torch.randn(5, 3), lambda: labels(5)),
    "chosen examples": (lambda: Chosen([0, 3, 4]), lambda: torch.randn(6, 3), lambda: labels(3)),
    "chosen positions": (
        lambda: Chosen([[True, False, True], [False, True, False], [True, True, True]]),
        lambda: torch.randn(3, 3, 3),
        lambda: labels(6),
    ),
    "one by one": (Stacked, lambda: torch.randn(4, 3), lambda: labels(4)),
}
MIXING = {
    "scaled": (lambda: Shared("scaled"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "moved": (lambda: Shared("moved"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "dropped": (lambda: Shared("dropped"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "concatenated": (lambda: Shared("concatenated"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "prepended": (lambda: Shared("prepended"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "relative bias": (lambda: Shared("bias"), lambda: torch.randn(4, 3, 3), lambda: labels(4)),
    "positions as many as examples": (lambda: Shared("scaled"), lambda: torch.randn(3, 3, 3), lambda: labels(3)),
    "batch statistics": (Normed, lambda: torch.randn(4, 3), lambda: labels(4)),
    "messages": (Messages, lambda: torch.randn(4, 3), lambda: labels(4)),
    "contrast": (Contrast, lambda: torch.randn(3, 3), lambda: labels(3)),
}
