"""The minimum of a quadratic model in the plane of two directions, x and the previous update.

m(alpha, mu) = -(alpha, mu) . down + (alpha, mu) Q (alpha, mu)^T / 2: a 2x2 system in one code for numbers of the host
and of tracers, which therefore takes both sides of every choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kfaccore.step.model import inners, weighed
from kfaccore.xp.arrays import Array, eps, namespace
from kfaccore.xp.codes import Code
from kfaccore.xp.lists import times, weighted
from kfaccore.xp.numbers import Number, finite, number, pick, root, stack


def minimum(Q: Array, down: Array, most: Number = math.inf) -> tuple[Number, Number, Number]:
    """(alpha, mu) of Q (2, 2) and down (2,) over |mu| <= most, and how: OK; JITTERED, alpha alone, when the two
    directions are parallel to rounding; NONFINITE, no step. Zero directions get zero factors."""
    q = number(Q[0, 0])
    cross = number(Q[0, 1])
    p = number(Q[1, 1])
    d = number(down[0])
    e = number(down[1])
    sound = finite(q) & finite(cross) & finite(p) & finite(d) & finite(e)
    one = sound & (q > 0)
    two = one & (p > 0)
    # A curvature that is not there becomes 1: its side of a choice is computed too, and must not divide by zero.
    q = pick(one, q, 1.0)
    p = pick(two, p, 1.0)

    # The system scaled to a unit diagonal: [lead, cosine; cosine, last] (x, y) = (s d, t e), alpha = s x, mu = t y.
    s = 1 / root(q)
    t = 1 / root(p)
    lead = q * (s * s)
    cosine = cross * (s * t)
    last = p * (t * t)
    parallel = max(1e-6, 1024 * eps(Q.dtype, namespace(Q)))  # 1 - cos^2 below it is rounding
    apart = two & (1 - cosine * cosine >= parallel)

    # Elimination of x, then substitution.
    factor = cosine * (1 / lead)
    pivot = pick(apart, last - factor * cosine, 1.0)
    y = (t * e - factor * (s * d)) / pivot
    x = (s * d - cosine * y) / lead
    alpha = pick(one, pick(apart, s * x, d / q), 0.0)
    mu = pick(apart, t * y, 0.0)
    alpha, mu = _within(alpha, mu, Q, down, most)
    code = pick(sound, pick(two, pick(apart, Code.OK, Code.JITTERED), Code.OK), Code.NONFINITE)
    return alpha, mu, code


def _within(alpha: Number, mu: Number, Q: Array, down: Array, most: Number) -> tuple[Number, Number]:
    """The minimum over |mu| <= most, given the one over all: mu at its bound, and the best alpha there."""
    far = abs(mu) > most
    bound = pick(far, pick(mu > 0, most, -most), 0.0)
    q = pick(far, number(Q[0, 0]), 1.0)
    best = (number(down[0]) - bound * number(Q[0, 1])) / q
    return pick(far, best, alpha), pick(far, bound, mu)


def capped(alpha: Number, mu: Number, cap: float) -> tuple[Number, Number]:
    """Both factors times min(1, cap / |alpha|)."""
    size = abs(alpha)
    long = size > cap
    shrink = pick(long, cap / pick(long, size, 1.0), 1.0)
    return alpha * shrink, mu * shrink


def combined(alpha: Number, x: Mapping[str, Array], mu: Number, y: Mapping[str, Array]) -> dict[str, Array]:
    """alpha x + mu y by layer; a mu that is the number 0, as at the first step, costs no pass over y."""
    xs = list(x.values())
    if isinstance(mu, float) and not mu:
        return dict(zip(x, times(xs, [alpha] * len(xs)), strict=True))
    return dict(zip(x, weighted(alpha, xs, mu, [y[name] for name in x]), strict=True))


def gram(x: dict[str, Array], previous: dict[str, Array], l2: Mapping[str, float] | None = None) -> Array:
    """Inner products of the two directions over all layers, (2, 2), times each layer's l2 where it is given."""
    heavy = x if l2 is None else weighed(l2, x)
    heavy_previous = previous if l2 is None else weighed(l2, previous)
    own, cross, old = inners((heavy, x), (heavy, previous), (heavy_previous, previous))
    flat = stack([own, cross, cross, old])
    return namespace(flat).reshape(flat, (2, 2))
