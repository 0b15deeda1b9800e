"""Is Brand's update linear in d, what does it lose, and how much faster than eigh is a sketch? float32, NumPy."""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

from typing import Any

import numpy as np
from report import Claim, arguments, at_least, at_most, claim, finish, interleaved
from scipy.linalg import eigh

import kfaccore as kf
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.sketch import residual

RANK, ROWS = 220, 256
HYPER = kf.Hyper(0, 0.95, 0.1)


def rows(rng: np.random.Generator, n: int, d: int, power: float = 0.7) -> np.ndarray:
    """Rows whose covariance has eigenvalues i^(-2 power), in a basis of their own."""
    mix = rng.standard_normal((min(d, 1024), d)).astype(np.float32) / np.float32(d**0.5)
    scale = np.arange(1, len(mix) + 1, dtype=np.float32) ** -np.float32(power)
    return (rng.standard_normal((n, len(mix))).astype(np.float32) * scale) @ mix


class Brand:
    """One layer of width d after two updates, and the third as a function to time."""

    def __init__(self, d: int) -> None:
        rng = np.random.default_rng(0)
        self.method = kf.BrandKFAC(rank=kf.Rank(RANK, RANK))
        a, g = rows(rng, ROWS, d), rng.standard_normal((ROWS, 8)).astype(np.float32)
        self.record = kf.Record(a, g, float(ROWS))
        self.grad = kf.Factored(a, g, float(ROWS))
        self.state = self.method.init(kf.Block(8, d, rows=ROWS), a)
        for _ in range(2):
            self.state = self.update()

    def update(self) -> Any:
        """measure and update."""
        return self.method.update(self.state, self.method.measure(self.state, self.record, HYPER), HYPER)

    def solve(self) -> Any:
        """The direction of a gradient that is never formed."""
        return self.method.solve(self.state, self.grad, HYPER)


def slope(widths: tuple[int, ...], seconds: list[float]) -> float:
    """Of log seconds over log d, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(seconds), 1)[0])


def covariance(d: int) -> np.ndarray:
    """The average of forty batches, as a factor of K-FAC is."""
    rng = np.random.default_rng(1)
    x = rows(rng, 40 * ROWS, d)
    return x.T @ x / np.float32(len(x))


def sketches(d: int, repeats: int) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Seconds of eigh and of both sketches at 2 and 4 passes, and (residual, error over the best rank's) of each."""
    M = covariance(d)
    rules = {f"{kind.__name__.lower()} {p}": kind(passes=p) for kind in (kf.Symmetric, kf.Singular) for p in (2, 4)}
    draws = {name: rule.draw(1, d, RANK, 0, M) for name, rule in rules.items()}
    functions: dict[str, Any] = {name: lambda n=name: rules[n].modes(M[None], draws[n], RANK) for name in rules}
    seconds = interleaved(functions | {"eigh": lambda: eigh(M, driver="evd", check_finite=False)}, repeats)
    values, found = np.linalg.eigvalsh(M.astype(np.float64)), {}
    for name, call in functions.items():
        U, D, _ = call()
        error = np.linalg.norm(M - (U[0] * D[0]) @ U[0].T) / np.linalg.norm(values[:-RANK])
        found[name] = (float(residual(M[None], U, D)[0]), float(error))
    return seconds, found


def between(updates: int, d: int) -> dict[str, tuple[float, float]]:
    """Mean relative error of A's damped inverse just before each refresh, one in five updates, and of A over the best.

    RandomizedKFAC's modes are five updates old there; Brand's variants are current.
    """
    drift = rows(np.random.default_rng(2), 64 * updates, d).astype(np.float64).reshape(updates, 64, d)
    drift *= 1 + np.sin(np.arange(updates) / 4)[:, None, None] * np.linspace(-1, 1, d)
    found = {}
    for kind in (kf.RandomizedKFAC, kf.BrandKFAC, kf.BrandCKFAC, kf.BrandRKFAC):
        method = kind(rank=kf.Rank(40, 40), split=kf.top)
        state, A, errors, inverses = method.init(kf.Block(2, d), drift), np.zeros((d, d)), [], []
        for k, a in enumerate(drift):
            record = kf.Record(a, a[:, :2], 64.0)
            state = method.update(state, method.measure(state, record, HYPER), HYPER)
            A = 0.95 * A + 0.05 / 64 * (a.T @ a)
            if k % 5 == 4:
                values, now = np.linalg.eigvalsh(A), A / state.weight[0]
                exact = np.linalg.inv(now + HYPER.damping * values[-1] / state.weight[0] * np.eye(d))
                got = method.inverses(state, HYPER)[0][0]
                inverses.append(np.linalg.norm(got - exact) / np.linalg.norm(exact))
                modes = state.modes_A if kind is kf.RandomizedKFAC else lowrank.scaled(state.A, 1 / state.weight)
                miss = now - lowrank.dense(modes)[0]
                errors.append(np.linalg.norm(miss) / np.linalg.norm(values[:-40] / state.weight[0]))
            state = method.refresh(state, HYPER) if k % 5 == 0 else state
        found[kind.__name__] = (float(np.mean(inverses)), float(np.mean(errors)))
    return found


def main() -> None:
    options = arguments(__doc__)
    widths = (2048, 4096, 8192) if options.quick else (4096, 8192, 16384)
    repeats = 3 if options.quick else 7
    layers = {d: Brand(d) for d in widths}
    update = interleaved({str(d): layer.update for d, layer in layers.items()}, repeats)
    solve = interleaved({str(d): layer.solve for d, layer in layers.items()}, repeats)
    drift = max(_drift(layer.state.A.U[0]) for layer in layers.values())
    size = 1024 if options.quick else 2048
    seconds, quality = sketches(size, repeats)
    errors = between(20 if options.quick else 60, 512)
    table = [[f"update, d {d}", update[str(d)], "", ""] for d in widths]
    table += [[f"factored solve, d {d}", solve[str(d)], "", ""] for d in widths]
    table += [[f"eigh evd, d {size}", seconds["eigh"], "", ""]]
    table += [[f"{name} passes, d {size}", seconds[name], *quality[name]] for name in quality]
    table += [[f"{name} before refreshes, d 512, rank 40", "", *pair] for name, pair in errors.items()]
    s = slope(widths, [update[str(d)] for d in widths])

    def ratio(over: str, under: str = "RandomizedKFAC") -> float:
        return errors[over][0] / errors[under][0]

    faster = None if options.quick else seconds["eigh"] / seconds["symmetric 4"]
    claims: list[Claim] = [
        claim(f"Brand's update over d {widths}, log-log slope", s, "1 +- 0.15", abs(s - 1) <= 0.15),
        at_most("its modes after 3 float32 updates, |U^T U - I|", drift, 1e-4),
        at_least("eigh over the symmetric sketch, 4 passes, d 2048", faster, 3),
        at_most("its error over that of the best rank 220", quality["symmetric 4"][1], 1.05),
        at_most("error of the inverse before a refresh, B-R over RandomizedKFAC", ratio("BrandRKFAC"), 1.0),
        at_most("the same, B over RandomizedKFAC", ratio("BrandKFAC"), 1.0),
        at_most("the same, B-C over B: a correction's gain is gone by then", ratio("BrandCKFAC", "BrandKFAC"), 1.005),
    ]
    columns = ("what", "seconds", "residual, or error of the inverse", "error / best")
    finish(f"rank {RANK}, {ROWS} rows, float32", columns, table, claims, options.json)


def _drift(U: np.ndarray) -> float:
    return float(np.abs(U.T @ U - np.eye(U.shape[1])).max())


if __name__ == "__main__":
    main()
