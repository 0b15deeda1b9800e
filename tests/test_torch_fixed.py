"""What shapes say of rows against derivatives: no number is given to an example whose neighbour it moves."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from kfaccore_torch import fixed, fixed_parts
from kfaccore_torch.fixed import SEVERAL, UNKNOWN, numbers, reshaped
from kfaccore_torch.fixed_rules import Passed

W = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPERATIONS = {
    "added": lambda x: x + W[:1],
    "wider": lambda x: x[:, :1] * W,
    "where": lambda x: torch.where(W > 0, x, 0.0),
    "lerp": lambda x: torch.lerp(x, W, 0.3),
    "expand": lambda x: x[:1].expand(2, 3, 4, 4),
    "expand before": lambda x: x.expand(2, 2, 3, 4, 4),
    "repeat": lambda x: x.repeat(2, 2, 1, 3, 1),
    "tile": lambda x: x.tile(2),
    "sum": lambda x: x.sum((1, -1)),
    "sum of all": lambda x: x.sum(),
    "mean": lambda x: x.mean((0, 2), keepdim=True),
    "amax": lambda x: x.amax(-2),
    "max": lambda x: x.max(1).values,
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=2),
    "var": lambda x: x.var(0),
    "var, mean": lambda x: torch.var_mean(x, 1)[1],
    "softmax": lambda x: x.softmax(-2),
    "log_softmax": lambda x: x.log_softmax(0),
    "cumsum": lambda x: x.cumsum(1),
    "glu": lambda x: F.glu(x, 2),
    "flip": lambda x: x.flip(0, -1),
    "roll": lambda x: x.roll((1, -2), (0, 3)),
    "padded": lambda x: F.pad(x, (1, 2, 0, 1)),
    "cut": lambda x: F.pad(x, (-1, 0)),
    "reshape": lambda x: x.reshape(3, 2, 16),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:1].squeeze(),
    "permute": lambda x: x.permute(2, 0, -1, 1),
    "transpose": lambda x: x.transpose(0, -1),
    "t": lambda x: x.reshape(6, 16).t(),
    "slice": lambda x: x[:, :, 1:4:2],
    "slice from behind": lambda x: x[..., -2:],
    "select": lambda x: x[:, -1],
    "split": lambda x: x.split((1, 3), 2)[1],
    "chunk": lambda x: x.chunk(2, 3)[1],
    "unbind": lambda x: x.unbind(2)[3],
    "cat": lambda x: torch.cat([x.tanh(), W, x], 1),
    "cat of constants": lambda x: torch.cat([W, x.tanh(), W], 1),
    "cat elsewhere": lambda x: torch.cat([x, x.tanh()], -1),
    "stack": lambda x: torch.stack([x.tanh(), x], 2),
    "mm": lambda x: x.reshape(6, 16) @ W.reshape(16, 6),
    "mm, right": lambda x: W.reshape(16, 6) @ x.reshape(6, 16),
    "bmm": lambda x: x.flatten(0, 1).bmm(W.flatten(0, 1)),
    "bmm, right": lambda x: W.flatten(0, 1).bmm(x.flatten(0, 1)),
    "baddbmm": lambda x: torch.baddbmm(x.flatten(0, 1), x.flatten(0, 1), W.flatten(0, 1)),
    "addmm": lambda x: torch.addmm(W[0, 0, 0], x.reshape(24, 4), W[0, 0]),
    "addmm, added": lambda x: torch.addmm(x[0, 0, 0], W[0, 1], W[0, 0]),
    "mv": lambda x: x.reshape(6, 16) @ W[0, 0].flatten(),
    "mv, vector": lambda x: W.reshape(6, 16) @ x[0, 0].flatten(),
    "dot": lambda x: x.flatten() @ W.flatten(),
    "conv": lambda x: F.conv2d(x, W[:, :, :2, :2]),
    "conv in groups": lambda x: F.conv2d(x, W[0, :, None, :2, :2], groups=3),
    "conv, turned": lambda x: F.conv_transpose2d(x, W.transpose(0, 1)),
    "conv, one image": lambda x: F.conv2d(x[0], W[:, :, :2, :2]),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool, one image": lambda x: F.avg_pool2d(x[0], 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive, one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "grid_sample": lambda x: F.grid_sample(x, W[..., :2].tanh(), align_corners=True),
    "pixel_shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x[:, :1]], 1), 2),
    "cummax": lambda x: x.cummax(1).values,
    "layer_norm": lambda x: F.layer_norm(x, (4, 4)),
    "group_norm": lambda x: F.group_norm(x, 3),
    "instance_norm": lambda x: F.instance_norm(x),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm, evaluated": lambda x: F.batch_norm(x, torch.zeros(3).to(x), torch.ones(3).to(x)),
    "attention, queries": lambda x: F.scaled_dot_product_attention(x, W, W),
    "attention, keys": lambda x: F.scaled_dot_product_attention(W, x, W),
    "attention, values": lambda x: F.scaled_dot_product_attention(W, W, x),
    "attention, masked": lambda x: F.scaled_dot_product_attention(W, x, x, torch.eye(4).bool()),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(2, 3, 8, 2)) * (1 + 2j)),
}
UNRULED = {  # nothing is said below them
    "solve": lambda x: torch.linalg.solve(W, x),
    "index": lambda x: x[torch.tensor([1, 0])],
    "strides": lambda x: x.as_strided((2, 3, 4, 4), (48, 16, 1, 4)),
    "fft": lambda x: torch.fft.fft(x).real,
    "cdist": lambda x: torch.cdist(x, W),
    "sort": lambda x: x.sort(0).values,
}


def numbered(shape, axis):
    """Examples along one axis, by twos where it is long."""
    owner = np.arange(shape[axis]) // (2 if shape[axis] > 3 else 1)
    return owner.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def down(y, owner, start):
    """Numbers of examples at `start`, from those of the output of y."""
    return numbers({(y.grad_fn, y.output_nr): owner}, Passed())[start.grad_fn, start.output_nr]


def axes(y):
    return range(y.ndim) if y.ndim else [None]


@pytest.mark.parametrize("name", OPERATIONS)
def test_numbers_of_an_argument_are_of_no_other_example(name):
    leaf = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    y = OPERATIONS[name](x)
    moved = torch.autograd.functional.jacobian(OPERATIONS[name], leaf.detach()).reshape(*y.shape, -1) != 0
    for axis in axes(y):
        owner = np.zeros(()) if axis is None else numbered(y.shape, axis)
        got = np.broadcast_to(down(y, owner.astype(np.int64), x), x.shape).reshape(-1)
        of = np.broadcast_to(owner, y.shape)
        for number, example in enumerate(got):
            seen = set(of[moved[..., number].numpy()].tolist())
            assert example >= SEVERAL or seen <= {example}, (axis, number, example, seen)


@pytest.mark.parametrize("name", UNRULED)
def test_nothing_is_said_below_other_operations(name):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) * 1
    y = UNRULED[name](x)
    assert (down(y, numbered(y.shape, 0), x) >= UNKNOWN).all()


def test_what_a_reshape_does_not_part_stays_of_size_one():
    owner = numbered((2, 3, 4, 4), 0)
    assert reshaped(owner, (2, 3, 4, 4), (2, 12, 4)).shape == (2, 1, 1)
    assert reshaped(owner, (2, 3, 4, 4), (6, 16)).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert reshaped(reshaped(owner, (2, 3, 4, 4), (6, 16)), (6, 16), (2, 3, 4, 4)).shape == (2, 1, 1, 1)


def test_time_steps_cost_their_number(monkeypatch):
    """Of T steps cut out of one tensor and joined again, as a recurrence has them, nothing is asked T times T times."""
    asked = []
    both, shape = fixed._both, fixed_parts._shape
    monkeypatch.setattr(fixed, "_both", lambda old, x: asked.append(max(old.size, x.size)) or both(old, x))
    monkeypatch.setattr(fixed_parts, "_shape", lambda node, k: asked.append(1) or shape(node, k))
    counts = []
    for steps in (50, 100):
        x = torch.randn(4, steps, 2, requires_grad=True)
        start = x * 1
        cut = [start[:, t] + part.squeeze(1) for t, part in enumerate(start.split(1, 1))]
        y = torch.cat([one[:, None] + two[:, None] for one, two in zip(cut, start.unbind(1), strict=True)], 1).sum(2)
        owner = np.arange(4)[:, None].repeat(steps, 1) + 4 * np.arange(steps)
        asked.clear()
        found = numbers({(y.grad_fn, y.output_nr): owner}, Passed())[start.grad_fn, 0]
        np.testing.assert_array_equal(np.broadcast_to(found[..., :1], (4, steps, 1))[..., 0], owner)
        counts.append(sum(asked))
    assert 0 < counts[1] <= 2.1 * counts[0]
