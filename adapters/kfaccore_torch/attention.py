"""Attention as torch writes it, run so that the products inside are seen; nothing of torch is changed for it."""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F


def _own_copy(function: Any) -> Any:
    """The same code with globals of its own, in which nothing overrides torch functions: the function checks that
    before it does anything, and would be handed back to the mode for ever."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


attention = _own_copy(F.multi_head_attention_forward)
