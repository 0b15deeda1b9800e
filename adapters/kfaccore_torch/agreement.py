"""Whether all ranks are about to do the same: a rank with another model or other settings is named."""

from __future__ import annotations

import torch

from kfaccore_torch.distributed import Distributed
from kfaccore_torch.step import Engine


def check_same(engine: Engine, parameters: bool = False) -> None:
    """ValueError on every rank, naming those whose layers, sizes, clocks or Fisher are not as on most.

    parameters   also what is in the parameters, which nothing else makes equal: DistributedDataParallel would
    """
    comm = engine.core.comm
    if not isinstance(comm, Distributed):
        return
    lines = [f"layer {name!r} of {b.blocks} x {b.d_out} x {b.d_in}" for name, b in engine.blocks().items()]
    lines += [f"uncovered {name!r}" for name in engine.plan.uncovered]
    numbers = {**vars(engine.settings), "fisher": engine.settings.fisher.__name__}
    lines += [f"{engine.core.clocks}, step {engine.state.step}", f"settings {numbers}"]
    if parameters:
        lines += [f"parameter {name!r} of sum {_sum(p)!r}" for name, p in engine.model.named_parameters()]
    comm.same("\n".join(lines))


def _sum(p: torch.Tensor) -> float:
    return float(p.detach().double().sum())
