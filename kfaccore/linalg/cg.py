"""Conjugate gradients on (blocks, d_out, d_in), every block with its own coefficients and its own end.

x minimises phi(x) = <x, Op x> / 2 - <b, x>. The right side is scaled to norm 1 first. The residual of the recurrence
is replaced by b - Op x every 50 iterations.
Source: Hestenes & Stiefel 1952; Martens 2010 for stopping by relative progress.
Cost: one application of the operator and five passes over x an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kfaccore.xp.arrays import Array, all_finite, device_of, eps, loop, namespace, select
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.ranges import AT_LEAST_0, COUNT, UNIT, ranged

Map = Callable[[Array], Array]
Carry = tuple[Array, ...]
_RENEW = 50


class Stop(Protocol):
    """When an iteration is good enough."""

    def reached(self, k: Array, residual: Array, floor: Array, phi: Array) -> Array:
        """(blocks,) bool after k iterations (0-d): |r| / |b| (blocks,), what rounding lets it reach, and phi
        (blocks, limit + 1), filled up to k."""
        ...


@dataclass(frozen=True)
class Iterations:
    """Exactly `count`: a truncated iteration, which is itself a damping."""

    count: int = 10

    def __post_init__(self) -> None:
        ranged(self, count=COUNT)

    def reached(self, k: Array, residual: Array, floor: Array, phi: Array) -> Array:
        return (k >= self.count) | (residual < 0)


@dataclass(frozen=True)
class Residual:
    """|b - Op x| <= tolerance |b|, or the rounding of Op x where that is larger."""

    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        ranged(self, tolerance=AT_LEAST_0)

    def reached(self, k: Array, residual: Array, floor: Array, phi: Array) -> Array:
        xp = namespace(residual)
        limit = xp.zeros_like(floor) + self.tolerance
        return residual <= xp.where(floor > limit, floor, limit)


@dataclass(frozen=True)
class Progress:
    """phi_k < 0 and (phi_k - phi_{k-j}) / phi_k < j tolerance over the last j = max(least, k share) iterations."""

    tolerance: float = 5e-4
    least: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        ranged(self, tolerance=AT_LEAST_0, least=COUNT, share=UNIT)

    def reached(self, k: Array, residual: Array, floor: Array, phi: Array) -> Array:
        xp = namespace(phi)
        j = xp.astype(xp.floor(self.share * xp.astype(k, phi.dtype)), k.dtype)
        j = xp.where(j > self.least, j, xp.zeros_like(j) + self.least)
        index = xp.arange(phi.shape[-1], dtype=k.dtype, device=device_of(phi))

        def at(i: Array) -> Array:  # a sum over one entry: an index may be a tracer
            return xp.sum(xp.where(index == i, phi, xp.zeros_like(phi)), axis=-1)

        now = at(k)
        before = at(k - j)
        gained = (now - before) / xp.where(now < 0, now, xp.ones_like(now))
        stalled = (k > j) & (now < 0) & (gained < xp.astype(j, phi.dtype) * self.tolerance)
        return stalled | (residual <= floor)


@dataclass(frozen=True)
class Result:
    """x like b; iterations, |r| / |b| and code, (blocks,) each."""

    x: Array
    iterations: Array
    residual: Array
    code: Array


@dataclass(frozen=True)
class CG:
    """How to iterate.

    stop      Residual(...) | Iterations(...) | Progress(...)
    limit     most iterations
    warm      share of the previous solution that the next starts from, in [0, 1]; the solution does not depend on it
    jacobi    power of the operator's diagonal to precondition with: 0 none, 1 Jacobi, 0.75 Martens
    """

    stop: Stop = Residual()
    limit: int = 50
    warm: float = 0.0
    jacobi: float = 0.0

    def __post_init__(self) -> None:
        ranged(self, limit=COUNT, warm=UNIT, jacobi=UNIT)


def solve(operator: Map, b: Array, how: CG, precondition: Map | None = None, start: Array | None = None) -> Result:
    """x with Op x = b. Codes: UNCONVERGED at the limit, INDEFINITE where <p, Op p> <= 0 (x of before), NONFINITE."""
    xp = namespace(b)
    finite = all_finite(b)
    b = select(finite, b, xp.zeros_like(b))
    norm = _norm(b)
    safe = xp.where(norm > 0, norm, xp.ones_like(norm))[:, None, None]
    b = b / safe
    system = _System(operator, b, how.stop, precondition, how.limit)
    carry = system.begin(None if start is None else start / safe, norm > 0)
    carry = loop(lambda carry: xp.any(carry[5]), system.advance, carry, how.limit)
    _, x, r, _, _, live, wrong, count, _, _ = carry
    code = choose(live, Code.UNCONVERGED, Code.OK)
    code = choose(~finite, Code.NONFINITE, choose(wrong, Code.INDEFINITE, code))
    return Result(x * safe, count, xp.sqrt(_dot(r, r)), code)


@dataclass(frozen=True)
class _System:
    """One system while it is solved; a carry is (k, x, r, p, <r, z>, live, wrong, iterations, top, phi), top the
    largest <p, Op p> / <p, p> so far."""

    operator: Map
    b: Array
    stop: Stop
    precondition: Map | None
    limit: int

    def begin(self, start: Array | None, nonzero: Array) -> Carry:
        b = self.b
        xp = namespace(b)
        x = xp.zeros_like(b) if start is None else start
        r = b if start is None else b - self.operator(x)
        z = self._preconditioned(r)
        rz = _dot(r, z)
        k = xp.asarray(0, dtype=xp.int32, device=device_of(b))
        phi = self._noted(xp.zeros((b.shape[0], self.limit + 1), dtype=b.dtype, device=device_of(b)), k, x, r)
        zero = xp.zeros_like(rz)
        live = nonzero & (rz > 0) & ~self._reached(k, x, r, zero, phi)
        return k, x, r, z, rz, live, zero > 0, xp.astype(zero, xp.int32), zero, phi

    def advance(self, carry: Carry) -> Carry:
        k, x, r, p, rz, live, wrong, count, top, phi = carry
        xp = namespace(x)
        q = self.operator(p)
        pq = _dot(p, q)
        pp = _dot(p, p)
        zero = xp.zeros_like(rz)
        ones = xp.ones_like(rz)
        good = live & (pq > 0) & xp.isfinite(pq)
        gain = pq / xp.where(pp > 0, pp, ones)  # no square of q, which may not be a number of its dtype
        top = xp.where(good & (gain > top), gain, top)
        alpha = (xp.where(good, rz, zero) / xp.where(good, pq, ones))[:, None, None]
        k = k + 1
        x = x + alpha * p
        r = r - alpha * select(good, q, xp.zeros_like(q))
        del q  # as large as x, and no longer needed
        # every _RENEW iterations the residual itself; a loop of at most one pass is a branch that can be traced
        (r,) = loop(lambda _: k % _RENEW == 0, lambda _: (self.b - self.operator(x),), (r,), 1)
        z = self._preconditioned(r)
        new = _dot(r, z)
        beta = xp.where(good, new, zero) / xp.where(rz > 0, rz, ones)
        p = select(good, z + beta[:, None, None] * p, p)
        phi = self._noted(phi, k, x, r)
        going = good & (new > 0) & ~self._reached(k, x, r, top, phi)
        return k, x, r, p, new, going, wrong | (live & ~good), count + xp.astype(good, xp.int32), top, phi

    def _reached(self, k: Array, x: Array, r: Array, top: Array, phi: Array) -> Array:
        xp = namespace(x)
        floor = eps(x.dtype, xp) * (1 + top * _norm(x))
        return self.stop.reached(k, xp.sqrt(_dot(r, r)), floor, phi)

    def _noted(self, phi: Array, k: Array, x: Array, r: Array) -> Array:
        xp = namespace(x)
        index = xp.arange(self.limit + 1, dtype=xp.int32, device=device_of(x))
        return xp.where(index == k, -0.5 * (_dot(x, r) + _dot(x, self.b))[:, None], phi)

    def _preconditioned(self, r: Array) -> Array:
        return r if self.precondition is None else self.precondition(r)


def _norm(x: Array) -> Array:
    """|x| of each block, (blocks,); its square may be too large or too small for the dtype."""
    xp = namespace(x)
    top = xp.max(xp.abs(xp.reshape(x, (x.shape[0], -1))), axis=-1)
    safe = xp.where((top > 0) & xp.isfinite(top), top, xp.ones_like(top))
    unit = x / safe[:, None, None]
    return safe * xp.sqrt(_dot(unit, unit))


def _dot(x: Array, y: Array) -> Array:
    """<x, y> of each block, (blocks,), without an array like x."""
    xp = namespace(x)
    return xp.matmul(xp.reshape(x, (x.shape[0], 1, -1)), xp.reshape(y, (y.shape[0], -1, 1)))[:, 0, 0]
