"""What do update, refresh and solve of a d x d layer cost, by width and rows? float32, NumPy, one core.

Each method gets one batch of `rows` rows as its statistics and that batch's gradient. Peak is of one whole cycle, the
state included. Methods that the catalogue lacks are left out. `--quick` takes d of 256 and 1024
with 32 and 128 rows.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg
from report import Claim, arguments, at_least, at_most, claim, finish

import kfaccore as kf
from kfaccore.linalg.cg import CG, Iterations
from kfaccore.methods import CATALOGUE
from kfaccore.methods.rows.cgfac import InRows, Kron
from kfaccore.methods.rows.factors import always

DAMPING = 1e-2  # of the mean eigenvalue
SPLIT = kf.Relative(kf.pi, kf.mean_eigenvalue)
LARGEST = {"ekfac": 2048}  # an eigendecomposition of 4096 takes minutes
CUBIC = ("kfac", "ekfac")  # the cost of whose refresh and dense solve does not depend on rows
ITERATIONS = (1, 2, 3, 5, 8, 12, 20, 40)
PATIENCE = 15.0  # seconds for one case of CG-FAC
OTHERS = ("brand", "brand-r", "brand-c", "randomized", "singd", "ingd", "ikfac")


def methods(rows: int) -> dict[str, Any]:
    """What is timed, by name."""
    given = {
        "kfac": lambda: kf.KFAC(split=SPLIT),
        "ekfac": kf.EKFAC,
        "skfac": lambda: kf.SKFAC(split=SPLIT, rows=rows),
        "cgfac": lambda: kf.CGFAC(solver=CG(Iterations(10)), rows=rows),
    }
    found = {name: make() for name, make in given.items() if name in CATALOGUE}
    return {**found, **{name: CATALOGUE[name]() for name in OTHERS if name in CATALOGUE}}


def batch(d: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """a and g (rows, d) whose columns fall off over two decades."""
    rng, scale = np.random.default_rng(d + rows), np.logspace(0, -2, d)
    return tuple((rng.standard_normal((rows, d)) * scale).astype(np.float32) for _ in range(2))


def timed(function: Callable[[], Any], least: float = 0.2) -> tuple[float, Any]:
    """Best seconds of repeats that take `least` together, the first included, and the result."""
    best, total, result = np.inf, 0.0, None
    while total < least:
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        best, total = min(best, seconds), total + seconds
    return best, result


class Case:
    """One method at one width and number of rows: seconds of each clock, and peak bytes of a cycle."""

    def __init__(self, name: str, method: Any, d: int, rows: int, known: dict[str, float]) -> None:
        a, g = batch(d, rows)
        self.name, self.d, self.rows, self.method = name, d, rows, method
        self.record, self.factored = kf.Record(a, g, float(rows)), kf.Factored(a, g, float(rows))
        hyper = kf.Hyper(0, 0.0, DAMPING)
        tracemalloc.start()
        state = method.init(replace(kf.Block.of(self.record), rows=rows), a)
        state = method.update(state, method.measure(state, self.record, hyper), hyper)
        if not known:
            start = time.perf_counter()
            state = method.refresh(state, hyper)
            slow = time.perf_counter() - start
        method.solve(state, self.factored, hyper, self.record)
        self.peak = float(known.get("peak", tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        self.update = timed(lambda: method.update(state, method.measure(state, self.record, hyper), hyper))[0]
        if known:
            self.refresh, self.dense = known["refresh"], known["dense"]
        else:
            self.refresh = slow if slow > 2 else min(slow, timed(lambda: method.refresh(state, hyper))[0])
            v = self.factored.dense()
            self.dense = timed(lambda: method.solve(state, v, hyper, self.record))[0]
        self.solve = timed(lambda: method.solve(state, self.factored, hyper, self.record))[0]
        self.state = None if known else state

    @property
    def cycle(self) -> float:
        """Seconds of one update, refresh and solve of the gradient's rows."""
        return self.update + self.refresh + self.solve

    def amortised(self, update: int = 10, refresh: int = 100) -> float:
        """Seconds a step with statistics and inverses on their usual clocks."""
        return self.update / update + self.refresh / refresh + self.solve

    def row(self) -> list:
        """The table's row: milliseconds, megabytes."""
        cells = (self.update, self.refresh, self.solve, self.dense, self.amortised())
        return [self.d, self.rows, self.name, *(c * 1e3 for c in cells), self.peak / 2**20]


def grid(widths: tuple[int, ...], counts: tuple[int, ...]) -> dict[tuple[str, int, int], Case]:
    """Every case, inverses of the cubic methods timed once a width."""
    found: dict[tuple[str, int, int], Case] = {}
    for d in widths:
        for rows in counts:
            for name, method in methods(rows).items():
                if d > LARGEST.get(name, d) or (name == "cgfac" and d * rows > 1 << 20):
                    continue
                first = found.get((name, d, counts[0])) if name in CUBIC else None
                known = {k: getattr(first, k) for k in ("refresh", "dense", "peak")} if first else {}
                found[name, d, rows] = Case(name, method, d, rows, known)
    return found


def errors(d: int, rows: int) -> dict[str, float]:
    """Relative error of float32 directions against a dense float64 solve of the same factors."""
    a, g = batch(d, rows)
    wide = [x.astype(np.float64) for x in (a, g)]
    V = wide[1].T @ wide[0] / rows
    A, G = (x.T @ x / rows for x in wide)
    c, pi = DAMPING * np.trace(A) / d * np.trace(G) / d, np.sqrt(np.trace(A) / np.trace(G))
    A[np.diag_indices(d)] += pi * c**0.5
    G[np.diag_indices(d)] += c**0.5 / pi
    want = scipy.linalg.solve(G, V, assume_a="pos", check_finite=False, overwrite_a=True)
    want = scipy.linalg.solve(A, want.T, assume_a="pos", check_finite=False, overwrite_a=True).T
    record, found, size = kf.Record(a, g, float(rows)), {}, np.linalg.norm(want)
    for name, method in (("kfac", kf.KFAC(split=SPLIT)), ("skfac", kf.SKFAC(split=SPLIT, rows=rows))):
        hyper = kf.Hyper(0, 0.0, DAMPING)
        state = kf.settle(method, record, damping=DAMPING)
        for kind, grad in (("dense", V.astype(np.float32)), ("factored", kf.Factored(a, g, float(rows)))):
            x = method.solve(state, grad, hyper).direction.reshape(d, d)
            found[f"{name} {kind}"] = float(np.linalg.norm(x - want) / size)
    return found


def to_error(d: int, rows: int, update: float) -> dict[float, tuple[float, int]]:
    """Seconds of update and solve, and iterations, at which CG-FAC's direction is within 1e-1 and 1e-2 of the end."""
    a, g = batch(d, rows)
    damping = DAMPING * float((a.astype(float) ** 2).sum() * (g.astype(float) ** 2).sum()) / (rows * d) ** 2
    grad, record = kf.Factored(a, g, float(rows)), kf.Record(a, g, float(rows))
    hyper, kron = kf.Hyper(0, 0.0, damping), Kron(branch=always)
    state = kf.settle(kf.CGFAC(kron, rows=rows), record, damping=damping)
    wide = kf.Record(a.astype(np.float64), g.astype(np.float64), float(rows))
    exact = kf.CGFAC(kron, InRows(), rows)
    want = exact.solve(kf.settle(exact, wide, damping=damping), wide.g[0, 0, :, 0].T @ wide.a[0, :, 0] / rows, hyper)
    found: dict[float, tuple[float, int]] = {}
    begun = time.perf_counter()
    for k in ITERATIONS:
        method = kf.CGFAC(kron, CG(Iterations(k), limit=k), rows)
        start = time.perf_counter()
        x = method.solve(state, grad, hyper).direction[0]
        seconds = time.perf_counter() - start
        error = float(np.linalg.norm(x - want.direction) / np.linalg.norm(want.direction))
        for level in (1e-1, 1e-2):
            if error <= level and level not in found:
                found[level] = (update + seconds, k)
        if len(found) == 2 or time.perf_counter() - begun > PATIENCE:
            break
    return found


def cgfac_claims(cases: dict[tuple[str, int, int], Case]) -> list[Claim]:
    """Where, if anywhere, CG-FAC beats K-FAC at 10/100, and what it needs of memory."""
    claims, memory = [], []
    times: dict[float, list[tuple[float, str]]] = {1e-1: [], 1e-2: []}
    for (name, d, rows), case in cases.items():
        if name != "cgfac":
            continue
        peer = cases["kfac", d, rows]
        memory.append(case.peak / peer.peak)
        for level, (seconds, k) in to_error(d, rows, case.update).items():
            times[level].append((seconds / peer.amortised(), f"d {d}, {rows} rows, {k} iterations"))
    for level, pairs in times.items():
        best = min(pairs, default=None)
        wins = sum(ratio < 1 for ratio, _ in pairs)
        figure = None if best is None else f"{best[0]:.3g} ({best[1]}; below 1 in {wins} of {len(pairs)})"
        title = f"CG-FAC to relative error {level:g} over K-FAC at 10/100, seconds a step, best case"
        claims.append(claim(title, figure, "<= 1", best and best[0] <= 1))
    claims.append(at_most("CG-FAC's peak over K-FAC's, worst case", max(memory), 0.5))
    return claims


def brand_slope(quick: bool) -> float | None:
    """Log-log slope of Brand's update and refresh in d."""
    if "brand" not in CATALOGUE or quick:
        return None
    widths, seconds = (4096, 8192, 16384), []
    for d in widths:
        a, g = batch(d, 256)[0], batch(8, 256)[1]
        method, record, hyper = CATALOGUE["brand"](), kf.Record(a, g, 256.0), kf.Hyper(0, 0.95, DAMPING)
        state = method.init(replace(kf.Block.of(record), rows=256), a)
        for _ in range(2):
            state = method.refresh(method.update(state, method.measure(state, record, hyper), hyper), hyper)
        seconds.append(timed(lambda m=method, s=state, r=record, h=hyper: m.update(s, m.measure(s, r, h), h), 2.0)[0])
    return float(np.polyfit(np.log(widths), np.log(seconds), 1)[0])


def randomized_gain(cases: dict[tuple[str, int, int], Case]) -> float | None:
    """Seconds of the two eigendecompositions over the randomised refresh, at d = 2048."""
    if ("randomized", 2048, 128) not in cases:
        return None
    a, _ = batch(2048, 128)
    A = a.T @ a / 128
    exact = timed(lambda: scipy.linalg.eigh(A, driver="evd", check_finite=False))[0]
    return 2 * exact / cases["randomized", 2048, 128].refresh


def main() -> None:
    options = arguments(__doc__)
    widths = (256, 1024) if options.quick else (256, 512, 1024, 2048, 4096)
    cases = grid(widths, (32, 128) if options.quick else (32, 128, 512))
    dense, low = (cases.get((name, 4096, 128)) for name in ("kfac", "skfac"))
    found = {} if options.quick else errors(4096, 128)
    slope = brand_slope(options.quick)
    claims = [
        at_least("SKFAC refresh, d 4096, 128 rows, times faster", dense and low and dense.refresh / low.refresh, 100),
        at_least("SKFAC update + refresh + solve, times faster", dense and low and dense.cycle / low.cycle, 12),
        at_most("SKFAC float32 error, gradient as rows", found.get("skfac factored"), 1e-5),
        at_most(
            "SKFAC float32 error, dense gradient, over K-FAC's",
            found["skfac dense"] / found["kfac dense"] if found else None,
            5,
        ),
        *cgfac_claims(cases),
        claim("Brand update, log-log slope in d", slope, "1 +- 0.15", slope and abs(slope - 1) <= 0.15),
        at_least("randomised refresh over eigh(evd), d 2048, times faster", randomized_gain(cases), 3),
    ]
    columns = ("d", "rows", "method", "update ms", "refresh ms", "solve ms", "dense solve ms", "10/100 ms", "peak MB")
    title = "update, refresh and solve of a d x d layer; errors " + ", ".join(f"{k} {v:.1e}" for k, v in found.items())
    finish(title, columns, [case.row() for case in cases.values()], claims, options.json)


if __name__ == "__main__":
    main()
