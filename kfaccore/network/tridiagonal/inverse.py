"""The inverse Xi^T Lambda Xi of a chain, from its damped factors, and the matrix that it inverts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.linalg import kron
from kfaccore.network.tridiagonal.difference import denominators, whitened
from kfaccore.network.tridiagonal.state import Layer, Link, Next, Parts
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.asking import Ask, Asks, alone, lockstep
from kfaccore.xp.codes import Code, choose


@dataclass(frozen=True)
class Damped:
    """A layer's factors A + d_a I and G + d_g I."""

    A: Array
    G: Array


def followed(names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(layer, the next one) along the chain; the last has None."""
    return zip(names, [*names[1:], None], strict=True)


def decomposed(layers: Mapping[str, Layer], damped: Mapping[str, Damped]) -> tuple[dict[str, Parts], dict[str, Array]]:
    """Parts and code (1,) of every layer."""
    callers = []
    for name, following in followed(list(layers)):
        callers.append(_parts(layers[name], damped[name], damped[following] if following else None))
    found = dict(zip(layers, alone(lockstep(callers)), strict=True))
    return {name: parts for name, (parts, _) in found.items()}, {name: code for name, (_, code) in found.items()}


def _parts(layer: Layer, own: Damped, following: Damped | None) -> Asks[tuple[Parts, Array]]:
    xp = namespace(own.A)
    codes = [choose(layer.weight >= 0, Code.OK, Code.OK)]
    psi: Next = ()
    less_A = xp.zeros_like(own.A)
    less_G = xp.zeros_like(own.G)
    if following is not None and isinstance(layer.link, Link):
        A = _regressed(factors.mean(layer.link.A, layer.weight), following.A)
        G = _regressed(factors.mean(layer.link.G, layer.weight), following.G)
        (psi_A, less_A, code_A), (psi_G, less_G, code_G) = yield from lockstep([A, G])
        psi = Link(psi_A, psi_G)
        codes += [code_A, code_G]
    sides = Ask(whitened, (own.A, less_A)), Ask(whitened, (own.G, less_G))
    (Ka, s_a, code_a), (Kg, s_g, code_g) = yield sides
    below, told = denominators(s_g, s_a)
    codes += [code_a, code_g, told]
    return Parts(Kg, Ka, below, psi), reduce(xp.maximum, codes)


def _regressed(cross: Array, following: Array) -> Asks[tuple[Array, Array, Array]]:
    """Psi = C D^-1 of one side, Psi D Psi^T = Psi C^T, and the code of D^-1."""
    xp = namespace(cross)
    ((inverse, code),) = yield (Ask(kernels.spd_inverse, (following,)),)
    psi = xp.matmul(cross, inverse)
    return psi, xp.matmul(psi, cross.mT), code


def applied(parts: Mapping[str, Parts], v: Mapping[str, Array]) -> dict[str, Array]:
    """Xi^T Lambda Xi v."""
    y = {}
    for name, following in followed(list(parts)):  # Lambda Xi v
        own = parts[name]
        u = v[name]
        if following is not None and isinstance(own.psi, Link):
            u = u - own.psi.times(v[following])
        y[name] = kron.solve(own.Kg, u, own.Ka, own.below)
    x = dict(y)
    for name, following in followed(list(parts)):  # Xi^T
        psi = parts[name].psi
        if following is not None and isinstance(psi, Link):
            x[following] = y[following] - psi.transposed_times(y[name])
    return x


def inverted(parts: Mapping[str, Parts], damped: Mapping[str, Damped], v: Mapping[str, Array]) -> dict[str, Array]:
    """(Xi^T Lambda Xi)^-1 v = Xi^-1 Lambda^-1 Xi^-T v."""
    y = dict(v)
    for name, following in followed(list(parts)):  # Xi^-T, down the chain
        psi = parts[name].psi
        if following is not None and isinstance(psi, Link):
            y[following] = v[following] + psi.transposed_times(y[name])
    x = {}
    for name, following in reversed(list(followed(list(parts)))):  # Lambda^-1 and Xi^-1, up the chain
        psi = parts[name].psi
        x[name] = kron.apply(damped[name].G, y[name], damped[name].A)
        if following is not None and isinstance(psi, Link):
            # S y = (G (x) A) y - Psi D Psi^T y, D the next layer's block: both of its terms have the factor Psi
            low = psi.transposed_times(y[name])
            low = x[following] - kron.apply(damped[following].G, low, damped[following].A)
            x[name] = x[name] + psi.times(low)
    return {name: x[name] for name in parts}
