"""Optimisers of a PINN to compare with: all need only J v and J^T w, both from records."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from scipy.optimize import minimize

from kfaccore.network.gauss_newton import gram, jacobian, pull, scaled
from kfaccore.record.jacobian import products
from kfaccore_numpy.equations.train import flatten, unflatten

Params = dict[str, np.ndarray]


def jvp(records: dict[str, Any], v: Params) -> np.ndarray:
    """J v over all layers and terms, each row over sqrt(n) of its term."""
    parts = []
    for t in range(len(next(iter(records.values())))):
        rows = [products(terms[t], v[name][None])[0][0] for name, terms in records.items()]
        parts.append(reduce(add, rows) / next(iter(records.values()))[t].n ** 0.5)
    return np.concatenate(parts)


def vjp(records: dict[str, Any], w: np.ndarray) -> Params:
    """J^T w for rows scaled as those of `jvp`."""
    found: Params = {}
    for name, terms in records.items():
        start = 0
        for term in terms:
            part = w[start : start + term.batch] / term.n**0.5
            start += term.batch
            g = (term.g[0, 0] * part[:, None, None]).reshape(-1, term.d_out)
            found[name] = found.get(name, 0.0) + g.T @ term.a[0].reshape(-1, term.d_in)
    return found


@dataclass(frozen=True)
class HessianFree:
    """Conjugate gradients on (J^T J + damping I) x = grad, then the grid search; damping follows the step."""

    damping: float = 1e-2
    iterations: int = 250
    tolerance: float = 1e-6

    def direction(self, captured: Any, damping: float) -> Params:
        grad = captured.grads
        b = flatten(grad)
        x, r = np.zeros_like(b), b.copy()
        p, rho = r.copy(), r @ r
        stop = self.tolerance**2 * rho
        for _ in range(self.iterations):
            v = unflatten(p, grad)
            q = flatten(vjp(captured.records, jvp(captured.records, v))) + damping * p
            alpha = rho / (p @ q)
            x, r = x + alpha * p, r - alpha * q
            new = r @ r
            if new <= stop:
                break
            p, rho = r + new / rho * p, new
        return unflatten(x, grad)


@dataclass(frozen=True)
class ENGD:
    """Energy natural gradient: the least-squares step of J itself, then the grid search; no damping to tune."""

    cutoff: float = 1e-10

    def direction(self, captured: Any, damping: float) -> Params:
        rows = {name: jacobian(record) for name, record in captured.records.items()}
        values, vectors = np.linalg.eigh(gram(rows))
        keep = values > self.cutoff * values[-1]
        r = scaled(captured.records, captured.residuals)
        weights = vectors[:, keep] @ ((vectors[:, keep].T @ r) / values[keep])
        return {name: update[0] for name, update in pull(rows, weights, captured.records).items()}


def searched(pinn: Any, params: Params, batch: Any, captured: Any, x: Params, points: int = 31) -> float:
    """The step of the grid 1, 1/2, ... of least loss, taken in `params`; 0 when none lowers the loss."""
    best, step, rising = captured.loss, 0.0, 0
    for k in range(points):
        loss = pinn.loss({n: W - 2.0**-k * x[n] for n, W in params.items()}, batch)
        if np.isfinite(loss) and loss < best:
            best, step, rising = loss, 2.0**-k, 0
        elif step:
            rising += 1
            if rising == 2:
                break
    params.update({n: W - step * x[n] for n, W in params.items()})
    return step


def matrix_free(pinn: Any, params: Params, batch: Any, rival: HessianFree | ENGD, damping: float) -> float:
    """One step of a rival in `params`; the damping to come."""
    captured = pinn.capture(params, batch)
    step = searched(pinn, params, batch, captured, rival.direction(captured, damping))
    return damping * (0.5 if step == 1 else 2.0 if 0 < step <= 0.25 else 1.0 if step else 10.0)


def lbfgs(pinn: Any, params: Params, batch: Any, seconds: float, memory: int = 20) -> int:
    """SciPy's L-BFGS for so many CPU seconds, in `params`; iterations."""
    begun = time.process_time()

    def value(vector: np.ndarray) -> tuple[float, np.ndarray]:
        loss, grads = pinn.gradient(unflatten(vector, params), batch)
        return loss, flatten(grads)

    def look(intermediate_result: Any) -> None:
        if time.process_time() - begun > seconds:
            raise StopIteration

    options = {"maxiter": 10**6, "maxfun": 10**7, "maxcor": memory, "ftol": 0.0, "gtol": 0.0}
    call: Callable[..., Any] = minimize
    done = call(value, flatten(params), jac=True, method="L-BFGS-B", callback=look, options=options)
    params.update({n: W.copy() for n, W in unflatten(done.x, params).items()})
    return int(done.nit)
