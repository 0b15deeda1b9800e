"""Masks are of flags: 0 and 1 in any dtype, and an additive mask is refused, not inverted."""

from __future__ import annotations

import pytest
import torch

import kfaccore as kf
import kfaccore_torch as kt

THERE = torch.arange(5) < torch.tensor([5, 3, 2, 4])[:, None]


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last((torch.tanh(self.first(x)) * THERE[..., None]).sum(1))


def direction(**given):
    torch.manual_seed(0)
    model = Pooled().double()
    pre = kt.Preconditioner(model, kf.Gaussian(), fisher=kf.type2)
    with pre.capture(**given):
        f = model(torch.randn(4, 5, 3, dtype=torch.float64))
    pre.loss(f, torch.zeros(4, 2, dtype=torch.float64)).backward()
    pre.step()
    return model.first.weight.grad


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_mask_is_of_flags(by_layer):
    def run(mask):
        return direction(**({"masks": {"first": mask}} if by_layer else {"mask": mask}))

    want = run(THERE)
    for mask in (THERE.double(), THERE.long()):
        torch.testing.assert_close(run(mask), want, rtol=1e-12, atol=0.0)
    zeros = torch.zeros(4, 5, dtype=torch.float64)
    for wrong in (zeros.masked_fill(~THERE, -1e9), zeros.masked_fill(~THERE, -torch.inf), 2 * THERE.long()):
        with pytest.raises(ValueError, match=r"^mask.* has entries such as .* of an additive mask.* give mask == 0"):
            run(wrong)
