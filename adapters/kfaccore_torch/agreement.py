"""Whether all ranks are about to do the same: a rank with another model or other settings is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial

import torch

import kfaccore as kf
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.step import Engine


def check_same(engine: Engine, parameters: bool = False) -> None:
    """ValueError on every rank, naming those whose layers, sizes, dtypes, method or numbers are not as on most.

    parameters   also what is in the parameters, which nothing else makes equal: DistributedDataParallel would
    """
    comm = engine.core.comm
    if not isinstance(comm, Distributed):
        return
    lines = [
        f"layer {name!r} of {b.blocks} x {b.d_out} x {b.d_in} in {_dtypes(engine, name)}"
        for name, b in engine.blocks().items()
    ]
    lines += [f"uncovered {name!r}" for name in engine.plan.uncovered]
    numbers = {**vars(engine.settings), "fisher": engine.settings.fisher.__name__}
    core = engine.core
    lines += [f"{core.clocks}, step {engine.state.step}", f"settings {numbers}"]
    lines += [f"method {_spelt(core.network or core.methods)}", _spelt(core.schedules), _spelt(core.rule)]
    lines += [f"fraction {comm.fraction}, widest {core.widest}"]
    if parameters:
        lines += [f"parameter {name!r} of sum {_sum(p)!r}" for name, p in engine.model.named_parameters()]
    comm.same("\n".join(lines))


def _dtypes(engine: Engine, name: str) -> str:
    """Of what a layer has of parameters."""
    return ", ".join(sorted({str(p.dtype) for p in engine.plan.layers[name].parameters.values()}))


def _spelt(value: object) -> str:
    """A method, rule or schedule with its numbers, the same in every process: functions by name, not by address."""
    if isinstance(value, Distributed | kf.Serial):
        return "ranks"
    if isinstance(value, partial):
        return _spelt(value.func)
    if is_dataclass(value) and not isinstance(value, type):
        numbers = ", ".join(f"{f.name}={_spelt(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__qualname__}({numbers})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key!r}: {_spelt(x)}" for key, x in value.items())
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _sum(p: torch.Tensor) -> float:
    return float(p.detach().double().sum())
