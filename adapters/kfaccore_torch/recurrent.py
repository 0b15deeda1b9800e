"""Recurrent layers step by step, so that the products inside are seen; equal to torch's fused kernels to rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Cell = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
Weights = Sequence[torch.Tensor | None]


def _lstm(given: torch.Tensor, hidden: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """i, f, g, o of the input's and the hidden state's products, each with its bias."""
    i, f, g, o = (given + hidden).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(given: torch.Tensor, hidden: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """r, z, n; the reset gate multiplies the hidden state's own product."""
    r, z, n = given.chunk(3, -1)
    s, y, m = hidden.chunk(3, -1)
    update = torch.sigmoid(z + y)
    new = torch.tanh(n + torch.sigmoid(r + s) * m)
    return (new + update * (state[0] - new),)


def _tanh(given: torch.Tensor, hidden: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (torch.tanh(given + hidden),)


def _relu(given: torch.Tensor, hidden: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (torch.relu(given + hidden),)


_LAYERS: dict[Any, Cell] = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}
_CELLS: dict[Any, Cell] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _tanh,
    torch.rnn_relu_cell: _relu,
}
RECURRENT = {*_LAYERS, *_CELLS}


def unfused(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What `func` returns, of products, sums and gates."""
    if func in _CELLS:
        return _one_step(_CELLS[func], func is torch.lstm_cell, *args, **kwargs)
    return _layers(_LAYERS[func], func is torch.lstm, *args, **kwargs)


def _one_step(cell: Cell, two: bool, x: torch.Tensor, hx: Any, *weights: Any, **named: Any) -> Any:
    w_ih, w_hh, b_ih, b_hh = (*weights, *named.values(), None, None)[:4]
    state = tuple(hx) if two else (hx,)
    found = cell(F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return found if two else found[0]


def _layers(cell: Cell, two: bool, data: torch.Tensor, *args: Any) -> tuple:
    """The signatures of torch: (input, hx, weights, biases, layers, dropout, train, bidirectional, batch_first), or
    (data, batch_sizes, hx, weights, biases, layers, dropout, train, bidirectional) of a packed sequence."""
    packed = isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor | tuple | list)
    packed = packed and not isinstance(args[2], bool)
    sizes = args[0].tolist() if packed else None
    hx, weights, biases, layers, dropout, train, both = args[packed : packed + 7]
    first = False if packed else args[7]
    if sizes is None:
        x = data.transpose(0, 1) if first else data
        sizes = [x.shape[1]] * x.shape[0]
        rows = x.flatten(0, 1)
    else:
        rows = data
    states = tuple(hx) if two else (hx,)
    ways = 2 if both else 1
    apart = len(weights) // (layers * ways)
    ends: list[tuple[torch.Tensor, ...]] = []
    for layer in range(layers):
        outs = []
        for way in range(ways):
            turn = layer * ways + way
            given: Weights = weights[turn * apart : (turn + 1) * apart]
            start = tuple(s[turn] for s in states)
            out, end = _along(cell, rows, sizes, start, given, bool(biases), bool(way))
            outs.append(out)
            ends.append(end)
        rows = torch.cat(outs, -1) if both else outs[0]
        if dropout and train and layer < layers - 1:
            rows = F.dropout(rows, dropout, True)
    if not packed:
        rows = rows.unflatten(0, (len(sizes), sizes[0] if sizes else 0))
        rows = rows.transpose(0, 1) if first else rows
    return rows, *(torch.stack([end[i] for end in ends]) for i in range(len(states)))


def _along(
    cell: Cell,
    rows: torch.Tensor,
    sizes: Sequence[int],
    start: tuple[torch.Tensor, ...],
    weights: Weights,
    biased: bool,
    backwards: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One layer in one direction over rows sorted by time, `sizes` of them a step: (outputs in order, last states)."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = weights[2:4] if biased else (None, None)
    w_hr = weights[-1] if len(weights) in (3, 5) else None  # a projection of the output
    same = len(set(sizes)) == 1
    whole = rows.unflatten(0, (len(sizes), sizes[0])) if same else rows
    given = F.linear(whole, w_ih, b_ih)  # type: ignore[arg-type]
    steps = list(given.unbind(0) if same else given.split(list(sizes)))
    outs: list[Any] = [None] * len(steps)
    state = start
    for t in reversed(range(len(steps))) if backwards else range(len(steps)):
        now = tuple(s[: sizes[t]] for s in state)
        found = cell(steps[t], F.linear(now[0], w_hh, b_hh), now)  # type: ignore[arg-type]
        out = found[0] if w_hr is None else F.linear(found[0], w_hr)
        found = (out, *found[1:])
        outs[t] = found[0]
        # sequences that are over, or have not begun, keep their state
        state = tuple(
            torch.cat([f, s[sizes[t] :]]) if len(s) > sizes[t] else f for f, s in zip(found, state, strict=True)
        )
    return torch.cat(outs), state
