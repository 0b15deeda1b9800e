"""Where nothing can be seen: inside a transform of torch.func, and in inference mode."""

from __future__ import annotations

import torch

SPENT = (
    "the forward that was captured last was differentiated: form all its losses before backward(). Run another one "
    "inside `with pre.capture():` too, or under torch.no_grad() if its loss is only looked at"
)


def check_plain() -> None:
    """ValueError inside torch.func.grad, vmap and the like: tensors there have no graph that calls could be found in,
    and parameters are stand-ins for those of the model."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "a step began inside a transform of torch.func (grad, vjp, vmap, ...), which shows no graph and no "
            "parameter of the model: differentiate by loss.backward() outside of it; torch.func.functional_call with "
            "the model's own parameters may stay"
        )


def check_grad() -> None:
    """ValueError in inference mode, which no graph comes out of."""
    if torch.is_inference_mode_enabled():
        raise ValueError("this is inside torch.inference_mode(), where nothing has a graph: call it outside")
