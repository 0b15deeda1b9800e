"""How precisely products are made on an accelerator: of the rows of statistics, and of a solve.

A `Precision` is in force inside a `with`, for all layers or by layer. Averages, factorisations and inverses are never
touched by it: inside `exact` float32 products are float32, whatever the process allows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

FLOAT32 = "float32"
TF32 = "tf32"
BFLOAT16 = "bfloat16"
_KINDS = (FLOAT32, TF32, BFLOAT16)  # from the strictest


@dataclass(frozen=True)
class Precision:
    """Of products of float32 arrays; what is float64 stays float64.

    statistics   of the rows of a factor, whose sums are float32: "float32" | "tf32" (10 bits) | "bfloat16" (8 bits)
    solve        of inverses and gradients: "float32" | "tf32"

    Errors of a direction against float64, by real factors: TF32 solves 7e-4 to 3e-2, by their condition, bfloat16 rows
    4e-4 to 2e-3 (`bench/gpu.py`). TF32 is there on GPUs alone; elsewhere it is float32. ValueError for other names.

    >>> import numpy as np
    >>> with kf.Precision("bfloat16").in_force():
    ...     kf.xp.gram(np.full((1, 1, 1), 1.001, np.float32))
    array([[[1.]]], dtype=float32)
    """

    statistics: str = FLOAT32
    solve: str = FLOAT32

    def __post_init__(self) -> None:
        if self.statistics not in _KINDS or self.solve not in _KINDS[:2]:
            raise ValueError(f"{self}: need statistics one of {_KINDS} and solve one of {_KINDS[:2]}")

    def in_force(self) -> AbstractContextManager[None]:
        """A `with` inside which products are made so."""
        return precisely(self)


Wanted = Precision | Mapping[str, Precision] | None  # of all layers, by layer, or what the process allows
_NOW: ContextVar[Wanted] = ContextVar("kfaccore_precision", default=None)


@contextmanager
def precisely(precision: Wanted) -> Iterator[None]:
    """Inside, this is in force: one precision for all layers, or one by layer; None for what the process allows."""
    token = _NOW.set(precision)
    try:
        yield
    finally:
        _NOW.reset(token)


@contextmanager
def measuring(names: Sequence[str]) -> Iterator[None]:
    """Inside, rows are those of these layers; of several that are measured in one call the strictest counts."""
    with precisely(_of(names)):
        yield


@contextmanager
def solving(names: Sequence[str]) -> Iterator[None]:
    """Inside, products are as these layers' solves want them."""
    found = _of(names)
    with products(None if found is None else found.solve):
        yield


@contextmanager
def exact() -> Iterator[None]:
    """Inside, float32 products are float32: a factorisation in TF32 is not one from condition 1e6 on."""
    with products(FLOAT32):
        yield


def statistics() -> str | None:
    """Of rows, as it is in force; None for what the process allows."""
    now = _NOW.get()
    return now.statistics if isinstance(now, Precision) else None


def _of(names: Sequence[str]) -> Precision | None:
    now = _NOW.get()
    if now is None or isinstance(now, Precision):
        return now
    found = [now[name] for name in names if name in now]
    if not found:
        return None
    rows = min((each.statistics for each in found), key=_KINDS.index)
    return Precision(rows, min((each.solve for each in found), key=_KINDS.index))


@contextmanager
def products(how: str | None) -> Iterator[None]:
    """Inside, float32 products of torch and CuPy on a GPU, and those that JAX traces, are TF32 or float32; None leaves
    the process's choice."""
    if how is None:
        yield
        return
    switches = [switch() for switch in (_torch_switch, _cupy_switch)]
    live = [switch for switch in switches if switch is not None]
    before = [switch(how) for switch in live]
    try:
        with _traced(how):
            yield
    finally:
        for switch, old in zip(live, before, strict=True):
            switch(old)


def _traced(how: str) -> AbstractContextManager[object]:
    """JAX's: by itself its products are TF32 on a GPU, and of bfloat16 rows on a TPU."""
    jax: Any = sys.modules.get("jax")
    return nullcontext() if jax is None else jax.default_matmul_precision("highest" if how == FLOAT32 else "high")


def _torch_switch() -> Any:
    """Sets torch's flag and hands back what it was; None where torch has no GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    flags = torch.backends.cuda.matmul
    if not torch_from(2, 9):
        return lambda how: _swapped(flags, "allow_tf32", how == TF32 if isinstance(how, str) else how)
    names = {FLOAT32: "ieee"}
    return lambda how: _swapped(flags, "fp32_precision", names.get(how, how))


@cache
def torch_from(major: int, minor: int) -> bool:
    """Whether torch is of this version or a later one."""
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (major, minor)


def _cupy_switch() -> Any:
    """As `_torch_switch`, of CuPy."""
    cupy: Any = sys.modules.get("cupy")
    if cupy is None:
        return None
    types: Any = cupy._core._routines_linalg
    names = {FLOAT32: types.COMPUTE_TYPE_DEFAULT, TF32: types.COMPUTE_TYPE_TF32}

    def switch(how: Any) -> Any:
        old = cupy._core.get_compute_type("float32")
        cupy._core.set_compute_type("float32", names.get(how, how))
        return old

    return switch


def _swapped(owner: Any, name: str, value: Any) -> Any:
    old = getattr(owner, name)
    if old != value:
        setattr(owner, name, value)
    return old
