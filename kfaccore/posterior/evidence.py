"""The log evidence of a posterior, its slope in the precisions, and the precisions that maximise it.

log p(D) ~ -loss - 1/2 sum over layers (log det(I + scale F~ / p) + p |theta - center|^2). With theta held, gamma(p)
falls and p |theta|^2 grows: the maximiser is the one root of gamma(p) = p |theta|^2, found by bisection in log p.
Source: MacKay 1992. Cost: D a bisection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from math import log
from operator import add

from kfaccore import xp as kernels
from kfaccore.posterior.checks import check_layers
from kfaccore.posterior.gaussian import Posterior
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.codes import Code, choose

Center = float | Mapping[str, Array]
BISECTIONS = 60
BOUND = 1e12  # mean eigenvalues, either way


def evidence(P: Posterior, loss: float | Array, center: Center = 0.0) -> Array:
    """The log evidence, 0-d. loss: -log likelihood summed over the data at the mean, its constants included."""
    apart = squares(P, center)
    logdet = P.logdet()
    terms = [logdet[name] + scalar(P.prior(name), logdet[name]) * apart[name] for name in logdet]
    return -loss - 0.5 * reduce(add, terms)


def slope(P: Posterior, group: Mapping[str, Array] | None = None, center: Center = 0.0) -> dict[str, Array]:
    """The derivative of the evidence in each layer's precision: (gamma / p - |theta - center|^2) / 2, 0-d.

    group   {layer: mask like the mean, 1 in the group}: in a precision of those weights alone, (count / p -
            |theta|^2 - sum of variances) / 2; only for the layers given
    """
    if group is None:
        apart = squares(P, center)
        return {name: (g / scalar(P.prior(name), g) - apart[name]) / 2 for name, g in P.gamma().items()}
    variances = P.diagonal()
    found = {}
    for name, mask in group.items():
        variance = variances[name]
        xp = namespace(variance)
        inside = xp.astype(mask, variance.dtype) + xp.zeros_like(variance)
        count = xp.sum(inside) / scalar(P.prior(name), variance)
        found[name] = (count - xp.sum(inside * (_away(P, name, center) ** 2 + variance))) / 2
    return found


def tuned(
    P: Posterior, together: tuple[tuple[str, ...], ...] = (), center: Center = 0.0
) -> tuple[Posterior, dict[str, Array]]:
    """The posterior with the precisions that maximise its evidence, theta held, and a code (1,) for each layer.

    together   tuples of layers that have one precision; the other layers have one each

    No root within 1e+-12 mean eigenvalues (theta = center, or F~ = 0): that bound, UNCONVERGED.
    """
    if isinstance(together, str) or any(isinstance(group, str) for group in together):
        raise TypeError(f"together is {together!r}; need tuples of layers, such as (('fc1', 'fc2'),)")
    named = [name for group in together for name in group]
    check_together(P, named)
    groups = [*together, *((name,) for name in P.curvature.layers if name not in named)]
    precision: dict[str, float | Array] = {}
    codes = {}
    for group in groups:
        found, code = _root(P, group, squares(P, center))
        precision |= dict.fromkeys(group, found)
        codes |= dict.fromkeys(group, code)
    order = P.curvature.layers
    return replace(P, precision={name: precision[name] for name in order}), {name: codes[name] for name in order}


def check_together(P: Posterior, named: list[str]) -> None:
    """ValueError for layers that are unknown or in two groups."""
    wrong = sorted(set(named) - set(P.curvature.layers)) + sorted({name for name in named if named.count(name) > 1})
    if wrong:
        raise ValueError(f"together has {wrong}; need layers of {sorted(P.curvature.layers)}, each in one tuple")


def squares(P: Posterior, center: Center = 0.0) -> dict[str, Array]:
    """{layer: 0-d}: |theta - center|^2."""
    if isinstance(center, Mapping):
        check_layers("center and mean", center, P.mean)
    found = {}
    for name in P.curvature.layers:
        away = _away(P, name, center)
        found[name] = namespace(away).sum(away * away)
    return found


def _away(P: Posterior, name: str, center: Center) -> Array:
    return P.mean[name] - (center[name] if isinstance(center, Mapping) else center)


def _root(P: Posterior, group: tuple[str, ...], apart: Mapping[str, Array]) -> tuple[Array, Array]:
    """p of gamma(p) = p |theta|^2 over the layers of a group, and its code, in the widest dtype."""
    xp = namespace(apart[group[0]])
    wide = kernels.widest(apart[group[0]])
    values = [xp.reshape(xp.astype(P.eigenvalues(name), wide), (-1,)) for name in group]
    square = xp.astype(reduce(add, [apart[name] for name in group]), wide)
    joint = xp.concat(values) if len(values) > 1 else values[0]
    mean = xp.mean(joint)
    middle = xp.log(xp.where(mean > 0, mean, xp.ones_like(mean)))

    def excess(u: Array) -> Array:
        return xp.sum(joint / (joint + xp.exp(u))) - xp.exp(u) * square

    low = middle - log(BOUND)
    high = middle + log(BOUND)
    code = choose(xp.reshape((excess(low) > 0) & (excess(high) < 0), (1,)), Code.OK, Code.UNCONVERGED)
    for _ in range(BISECTIONS):
        half = (low + high) / 2
        above = excess(half) > 0
        low = xp.where(above, half, low)
        high = xp.where(above, high, half)
    return xp.exp((low + high) / 2), code
