"""Is Brand's update linear in d, what does it lose, and how much faster than eigh is a sketch? float32, NumPy."""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

from typing import Any

import numpy as np
from report import Claim, arguments, at_least, at_most, claim, finish, interleaved
from scipy.linalg import eigh

import kfaccore as kf
from kfaccore.linalg.sketch import residual

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
    seconds = interleaved(functions, repeats)
    seconds |= interleaved({"eigh": lambda: eigh(M, driver="evd", check_finite=False)}, max(1, repeats // 3))
    values, found = np.linalg.eigvalsh(M.astype(np.float64)), {}
    for name, call in functions.items():
        U, D, _ = call()
        error = np.linalg.norm(M - (U[0] * D[0]) @ U[0].T) / np.linalg.norm(values[:-RANK])
        found[name] = (float(residual(M[None], U, D)[0]), float(error))
    return seconds, found


def corrected(updates: int, d: int) -> dict[str, float]:
    """|A - U D U^T| over that of the best modes held, after many updates and a refresh in every five."""
    found = {}
    for kind in (kf.BrandKFAC, kf.BrandCKFAC, kf.BrandRKFAC):
        method = kind(rank=kf.Rank(40, 40))
        state, A = method.init(kf.Block(2, d), np.zeros(1, np.float32)), np.zeros((d, d), np.float32)
        count = 0
        for a in rows(np.random.default_rng(2), 64 * updates, d).reshape(updates, 64, d):
            record = kf.Record(a, a[:, :2], 64.0)
            state = method.update(state, method.measure(state, record, HYPER), HYPER)
            A = np.float32(0.95) * A + np.float32(0.05 / 64) * (a.T @ a)
            count += 1
            state = method.refresh(state, HYPER) if count % 5 == 0 else state
        best = np.linalg.norm(np.linalg.eigvalsh(A)[:-40])
        found[kind.__name__] = float(np.linalg.norm(A - (state.A.U[0] * state.A.D[0]) @ state.A.U[0].T) / best)
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
    errors = corrected(20, 512)
    table = [[f"update, d {d}", update[str(d)], "", ""] for d in widths]
    table += [[f"factored solve, d {d}", solve[str(d)], "", ""] for d in widths]
    table += [[f"eigh evd, d {size}", seconds["eigh"], "", ""]]
    table += [[f"{name} passes, d {size}", seconds[name], *quality[name]] for name in quality]
    table += [[f"{name}, 20 updates, d 512, rank 40", "", "", error] for name, error in errors.items()]
    s = slope(widths, [update[str(d)] for d in widths])
    claims: list[Claim] = [
        claim(f"Brand's update over d {widths}, log-log slope", s, "1 +- 0.15", abs(s - 1) <= 0.15),
        at_most("its modes after 3 float32 updates, |U^T U - I|", drift, 1e-4),
        at_least(f"eigh over the symmetric sketch, 4 passes, d {size}", seconds["eigh"] / seconds["symmetric 4"], 3),
        at_most("its error over that of the best rank 220", quality["symmetric 4"][1], 1.05),
        at_most("B-R's error over B's", errors["BrandRKFAC"] / errors["BrandKFAC"], 1.0),
        at_most("B-C's error over B's", errors["BrandCKFAC"] / errors["BrandKFAC"], 1.0),
    ]
    columns = ("what", "seconds", "residual", "error / best")
    finish(f"rank {RANK}, {ROWS} rows, float32", columns, table, claims, options.json)


def _drift(U: np.ndarray) -> float:
    return float(np.abs(U.T @ U - np.eye(U.shape[1])).max())


if __name__ == "__main__":
    main()
