"""Parts of bench/gpu.py: what an inverse takes beside a product of its size, and the error of each precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_models import Case
from report import Claim, at_most

import kfaccore as kf
import kfaccore_torch as kt
from kfaccore.record.moved import moved
from kfaccore.xp.precision import exact

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SIZES = ((1, 768), (1, 2304), (1, 4608), (8, 1152), (4, 2304), (12, 3072)) if GPU else ((1, 48), (3, 32))
PRECISIONS = {
    "float32": kf.Precision(),
    "TF32 solves": kf.Precision("float32", "tf32"),
    "bfloat16 rows": kf.Precision("bfloat16", "float32"),
    "both": kf.Precision("bfloat16", "tf32"),
}
MOST = {"float32": 1e-3, "TF32 solves": 9e-3, "bfloat16 rows": 3e-3}


def idle() -> None:
    """Wait for the device."""
    if GPU:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median time, the device idle before and after."""
    found = []
    for turn in range(repeats + 1):
        idle()
        start = time.perf_counter()
        function()
        idle()
        if turn:
            found.append(1e3 * (time.perf_counter() - start))
    return median(found)


def inverses() -> tuple[list[list[Any]], list[Claim]]:
    """Of damped covariances with a power-law spectrum, float32."""
    rows: list[list[Any]] = []
    claims = []
    for count, n in SIZES:
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(n, n, device=DEVICE))[0]
        x = ((basis * torch.logspace(0, -4, n, device=DEVICE)) @ basis.T).expand(count, n, n).contiguous()
        with exact():
            inverse = milliseconds(lambda x=x: kf.xp.spd_inverse(x))
            product = milliseconds(lambda x=x: x @ x)
        rows.append([f"{count} inverses of {n}", "torch", "", inverse, inverse / product, "", "", "", "", ""])
        if n >= 2304:
            claims.append(at_most(f"{count} inverses of {n}, over products of that size", inverse / product, 5.0))
    return rows, claims


def errors(case: Case) -> tuple[list[list[Any]], list[Claim]]:
    """Of the directions of one batch against those of the same rows in float64, all layers together."""
    records, grads = rows_of(case)
    want = directions(records, grads, torch.float64, kf.Precision())
    rows: list[list[Any]] = []
    claims = []
    for name, precision in PRECISIONS.items():
        found = directions(records, grads, torch.float32, precision)
        gap = sum(float((found[key] - x).square().sum()) for key, x in want.items())
        error = (gap / sum(float(x.square().sum()) for x in want.values())) ** 0.5
        rows.append([case.name, "torch", f"error, {name}", error, "", "", "", "", "", ""])
        if name in MOST:
            claims.append(at_most(f"{case.name}, error of the direction, {name}", error, MOST[name]))
    return rows, claims


def rows_of(case: Case) -> tuple[dict[str, kf.Record], dict[str, Any]]:
    """Records and gradients of a quarter of a batch, at the labels; of all of it where it is small."""
    torch.manual_seed(0)
    model = case.model().to(DEVICE)
    x, y = case.batch()
    few = len(x) // 4 if GPU else len(x)
    y = y[: few * (len(y) // len(x))].to(DEVICE)
    skip = (*case.skip, *norms(model))
    return kt.records(model, case.loss, x[:few].to(DEVICE), y, fisher=kf.empirical, namespace="torch", skip=skip)


def directions(
    records: dict[str, kf.Record], grads: dict[str, Any], dtype: torch.dtype, precision: kf.Precision
) -> dict[str, torch.Tensor]:
    """Of a first update and refresh, in float64."""
    core = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(damping=1e-3))
    with precision.in_force():
        wide = {name: moved(record, lambda x: x.to(dtype)) for name, record in records.items()}
        given = {name: grad.to(dtype) for name, grad in grads.items()}
        blocks = {name: kf.Block(record.d_out, record.d_in, record.blocks) for name, record in records.items()}
        state = core.init(blocks, torch.zeros(1, dtype=dtype, device=DEVICE))
        found, _, _ = core.step(state, wide, given)
    return {name: x.double() for name, x in found.items()}


def norms(model: torch.nn.Module) -> list[str]:
    """The parameters of its norms: other libraries, and the figures to reach, leave them to SGD."""
    kinds = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
    owners = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [f"{name}.*" for name in owners]
