"""Bytes of state for a 4096 x 4096 layer: each structure of SINGD beside K-FAC and Adam; and what bfloat16 costs.

State is what a step keeps beside weights and gradients: K, C and their momenta; K-FAC's factors and inverses; Adam's
two moments. Peaks are traced over one measure, update and factored solve of 32 rows.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import tracemalloc
from typing import Any

import numpy as np
from report import Claim, arguments, at_most, finish

import kfaccore as kf
from kfaccore import tree
from kfaccore.methods.singd import recursion
from kfaccore.methods.singd.blocks import BlockDiagonal, Dense, Diagonal
from kfaccore.methods.singd.recursion import Rule, independent, unlimited
from kfaccore.methods.singd.toeplitz import UpperToeplitz
from kfaccore.methods.singd.triangular import Hierarchical, upper

MB = 2**20
STRUCTURES = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block-diagonal 30": BlockDiagonal(30),
    "Toeplitz": UpperToeplitz(),
    "rank-1 triangular": upper(1),
    "hierarchical 15, 15": Hierarchical(15, 15),
}


def held(method: Any, p: int, like: Any) -> int:
    """Bytes of a method's state for a p x p layer."""
    state = method.init(kf.Block(p, p), like)
    return sum(x.nbytes for x in tree.leaves(state))


def peak(method: Any, p: int, rows: int = 32) -> int:
    """Traced peak of a cycle and a factored solve, the state itself not counted."""
    rng = np.random.default_rng(0)
    a, g = (rng.standard_normal((rows, p)).astype(np.float32) for _ in range(2))
    record, grad, hyper = kf.Record(a, g, float(rows)), kf.Factored(a, g, float(rows)), kf.Hyper(0, 0.95, 0.1)
    state = method.init(kf.Block(p, p), a)
    tracemalloc.start()
    state = method.update(state, method.measure(state, record, hyper), hyper)
    method.solve(state, grad, hyper)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def stalled(storage: Any, condition: float, steps: int = 400, d: int = 32) -> float:
    """Relative error of K K^T after 400 IKFAC steps at rate 1e-2 on one A, against float64."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    a = (q * np.logspace(0, -np.log10(condition) / 2, d) * d**0.5).T
    found = []
    for dtype, kept in ((np.float64, recursion.full), (np.float32, storage)):
        rule = Rule(momentum=0.0, rate=1e-2, warm=0.0, limit=unlimited, storage=kept)
        method, hyper = kf.SINGD(coupling=independent, rule=rule), kf.Hyper(0, 0.0, 1e-3)
        record = kf.Record(a.astype(dtype), np.ones((d, 1), dtype), float(d))
        state = method.init(kf.Block.of(record), record.g)
        for _ in range(steps):
            state = method.update(state, method.measure(state, record, hyper), hyper)
        K = state.K["M"][0].astype(np.float64)
        found.append(K @ K.T)
    return float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))


def main() -> None:
    options = arguments(__doc__)
    p = 1024 if options.quick else 4096
    like, adam = np.zeros(1, np.float32), 8 * p * p
    bytes_of: dict[str, int] = {"Adam": adam, "K-FAC": held(kf.KFAC(), p, like)}
    rows: list[list] = [[name, count / MB, count / adam, ""] for name, count in bytes_of.items()]
    peaks = {}
    for name, side in STRUCTURES.items():
        method = kf.SINGD(inputs=side, outputs=side)
        bytes_of[name] = held(method, p, like)
        peaks[name] = peak(method, p) if name != "dense" else 0
        rows.append([name, bytes_of[name] / MB, bytes_of[name] / adam, peaks[name] / MB or ""])
    bytes_of["IKFAC"] = held(kf.IKFAC(), p, like)
    rows.append(["IKFAC, dense", bytes_of["IKFAC"] / MB, bytes_of["IKFAC"] / adam, ""])
    half = _native(p)
    rows.append(["dense, torch bfloat16", "-" if half is None else half / MB, "-" if half is None else half / adam, ""])
    errors = {(kind, c): stalled(getattr(recursion, kind), c) for kind in ("bfloat16", "master") for c in (1e2, 1e4)}
    rows += [[f"{kind}, condition {c:.0e}: error of K K^T", "", "", error] for (kind, c), error in errors.items()]
    structured = [name for name in STRUCTURES if name != "dense"]
    claims: list[Claim] = [
        at_most(f"diagonal at p {p}: state in numbers over 4 p", bytes_of["diagonal"] / (16 * p), 1.01),
        at_most("largest structured state over Adam's", max(bytes_of[n] for n in structured) / adam, 0.1),
        at_most("dense SINGD's state over K-FAC's", bytes_of["dense"] / bytes_of["K-FAC"], 1.01),
        at_most("largest structured temporaries over the (d_out, d_in) of a direction", _over(peaks, p), 4.0),
        at_most("bfloat16 dense in torch over float32 dense", None if half is None else half / bytes_of["dense"], 0.51),
        at_most("master, worst error of K K^T", max(errors["master", c] for c in (1e2, 1e4)), 0.02),
    ]
    columns = ("state", "MB", "/ Adam", "peak MB or error")
    finish(f"a {p} x {p} layer, float32", columns, rows, claims, options.json)


def _over(peaks: dict[str, int], p: int) -> float:
    return max(peaks.values()) / (4 * p * p)


def _native(p: int) -> int | None:
    """Bytes of dense SINGD in torch's own bfloat16; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    method = kf.SINGD(rule=Rule(storage=recursion.bfloat16))
    state = method.init(kf.Block(p, p), torch.zeros(1))
    return sum(x.numel() * x.element_size() for x in tree.leaves(state))


if __name__ == "__main__":
    main()
