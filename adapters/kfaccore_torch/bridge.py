"""Between torch and the namespace the core runs in: views out, copies in.

`numpy` for tensors on the CPU, `torch` for no conversion at all there or on any device, `cupy` on CUDA. Half precision
is widened to float32 inside torch and never crosses; the lazy conjugate and negative bits, which DLPack loses, are
resolved first.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Array = Any
HALF = (torch.float16, torch.bfloat16)
NAMESPACES = ("numpy", "cupy", "torch")


def chosen(namespace: str | None, device: torch.device) -> str:
    """The namespace asked for, or the default of a device; ValueError where the two do not fit."""
    found = namespace or ("numpy" if device.type == "cpu" else "torch")
    if found not in NAMESPACES:
        raise ValueError(f"namespace is {found!r}; need one of {NAMESPACES}")
    need = {"numpy": "cpu", "cupy": "cuda"}.get(found, device.type)
    if device.type != need:
        raise ValueError(f"namespace {found!r} serves tensors on {need}, the model is on {device}; try 'torch'")
    if found == "cupy" and importlib.util.find_spec("cupy") is None:
        raise ValueError("namespace is 'cupy', and CuPy is not installed: install it, or leave namespace at torch")
    return found


def detached(x: torch.Tensor) -> torch.Tensor:
    """x outside the graph, dense, with plain bits, at least in single precision.

    Raises TypeError for sparse, meta and fake tensors, which hold no such values.
    """
    if x.layout is not torch.strided or x.is_meta or type(x).__name__ == "FakeTensor":
        raise TypeError(f"a tensor of layout {x.layout} on {x.device} ({type(x).__name__}) has no values to view")
    x = x.detach().resolve_conj().resolve_neg()
    return x.float() if x.dtype in HALF else x


@lru_cache(maxsize=32)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number that nobody writes to, made once: each would be a launch."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def to_core(x: torch.Tensor, namespace: str) -> Array:
    """A view of x's memory in `namespace`, read-only where arrays can be; ValueError on the wrong device."""
    x = detached(x)
    if namespace == "torch":
        return x
    if x.device.type != ("cpu" if namespace == "numpy" else "cuda"):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} is on {x.device}, where {namespace} cannot view it")
    if namespace == "cupy":
        return importlib.import_module("cupy").from_dlpack(x)
    view = x.numpy()
    view.flags.writeable = False
    return view


def to_torch(x: Array, like: torch.Tensor) -> torch.Tensor:
    """x as a tensor with the dtype and device of `like`; it may share memory with x unless either differs."""
    if isinstance(x, torch.Tensor):
        return x.to(like)
    if isinstance(x, np.ndarray):
        plain = x.flags.writeable and x.flags.c_contiguous and min(x.strides, default=0) >= 0
        return torch.from_numpy(x if plain else np.array(x, order="C")).to(like)
    return torch.from_dlpack(x).to(like)


class _Stream:
    """A CUDA stream of torch as CuPy wants to be handed one."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@contextmanager
def ordered(namespace: str, device: torch.device) -> Iterator[None]:
    """Work inside runs after what torch has queued on the device, and before what it queues later; the core's own
    products are not under the caller's autocast."""
    if namespace == "torch":
        on = torch.is_autocast_enabled(device.type)  # leaving it costs as much as a small layer's product
        with torch.autocast(device.type, enabled=False) if on else nullcontext():
            yield
        return
    if namespace != "cupy":
        yield
        return
    cuda = importlib.import_module("cupy").cuda
    stream = torch.cuda.current_stream(device)
    with cuda.Device(stream.device_index), cuda.Stream.from_external(_Stream(stream.cuda_stream)):
        yield
