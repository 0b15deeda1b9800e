"""How far an approximate Kronecker inverse is from another: the four error metrics of Puiu 2022 (2210.08494)."""

from __future__ import annotations

from kfaccore.xp.arrays import Array, namespace, to_host


def four_errors(got: tuple[Array, Array], want: tuple[Array, Array], grad: Array) -> dict[str, float]:
    """Relative Frobenius errors of the inverses of A and G and of the step G^-1 V A^-1, and the steps' angle (radians).

    got, want are (A^-1, G^-1), (blocks, d, d) each, as the methods' `inverses` give them; grad (blocks, d_out, d_in) or
    (d_out, d_in). Blocks are taken together.
    """
    xp = namespace(grad)
    grad = grad[None, ...] if grad.ndim == 2 else grad
    steps = [xp.matmul(xp.matmul(G, grad), A) for A, G in (got, want)]
    u, v = (step / _norm(step) for step in steps)
    angle = 2 * xp.atan2(_norm(u - v), _norm(u + v))
    errors = (_relative(got[0], want[0]), _relative(got[1], want[1]), _relative(*steps), angle)
    return {name: float(to_host(e)) for name, e in zip(("A", "G", "step", "angle"), errors, strict=True)}


def _norm(x: Array) -> Array:
    xp = namespace(x)
    return xp.sqrt(xp.sum(x * x))


def _relative(x: Array, y: Array) -> Array:
    return _norm(x - y) / _norm(y)
