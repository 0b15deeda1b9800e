"""One side of a Kronecker block: a dense factor (blocks, d, d), or a diagonal (blocks, d) of an embedding's inputs or
of a side too wide for a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfaccore import xp as kernels
from kfaccore.xp import traced
from kfaccore.xp.arrays import Array, device_of, eps, is_numpy, is_tracer, namespace, place
from kfaccore.xp.asking import Answer, Ask, Asks
from kfaccore.xp.codes import Code, choose

if TYPE_CHECKING:
    from kfaccore.method import Block


WIDEST = 4096  # of a side that is kept as modes and may be multiplied out all the same


class Unformed:
    """A symmetric factor that is known by its products, in memory linear in its width."""

    @property
    def products(self) -> int:
        """Products that one row takes."""
        raise NotImplementedError

    def times(self, rows: Array) -> Array:
        """rows (blocks, many, d) times the factor."""
        raise NotImplementedError


Side = Array | Unformed


@dataclass(frozen=True)
class Scale:
    """Size of a factor: its mean eigenvalue (blocks,) and, computed only when asked, its largest."""

    mean: Array
    top: Callable[[], Array]

    @classmethod
    def of_factor(cls, x: Array) -> Scale:
        """Of a factor, or of a diagonal one."""
        return cls(trace(x) / x.shape[-1], lambda: top_eigenvalue(x))

    @classmethod
    def of_eigenvalues(cls, values: Array) -> Scale:
        """Of a factor given by its eigenvalues (blocks, d)."""
        xp = namespace(values)
        return cls(xp.mean(values, axis=-1), lambda: xp.max(values, axis=-1))


def is_diagonal(x: Array) -> bool:
    """Whether the factor holds only its diagonal."""
    return x.ndim == 2


def zeros(blocks: int, d: int, diagonal: bool, like: Array) -> Array:
    """A zero factor in the namespace, dtype and device of `like`."""
    shape = (blocks, d) if diagonal else (blocks, d, d)
    return namespace(like).zeros(shape, **place(like))


def identity(like: Array) -> Array:
    """The identity, shaped like the factor `like`."""
    xp = namespace(like)
    if is_diagonal(like):
        return xp.ones_like(like)
    eye = xp.eye(like.shape[-1], dtype=like.dtype, device=device_of(like))
    # `eye` as it is where it will do: NumPy and torch touch no memory but the diagonal's, a sum touches all of three
    return eye[None, ...] if like.shape[0] == 1 else xp.zeros_like(like) + eye


def diagonal(x: Array) -> Array:
    """The diagonal (blocks, d)."""
    if is_diagonal(x):
        return x
    return traced.diagonal(x) if is_tracer(x) else namespace(x).linalg.diagonal(x)


def trace(x: Array) -> Array:
    """The sum of the diagonal, (blocks,)."""
    of_x = diagonal(x)
    return traced.total(of_x) if is_tracer(x) else namespace(x).sum(of_x, axis=-1)


def gram(rows: Array, diagonal: bool) -> Array:
    """Sum over rows of x x^T, or of its diagonal alone, for rows (blocks, many, d)."""
    return kernels.gram_diagonal(rows) if diagonal else kernels.gram(rows)


def top_eigenvalue(x: Array) -> Array:
    """Largest eigenvalue, (blocks,); an eigenvalue decomposition for a dense factor."""
    xp = namespace(x)
    return xp.max(x if is_diagonal(x) else kernels.eigh(x)[0], axis=-1)


def inverse(x: Array, shift: Array) -> tuple[Array, Array]:
    """(x + shift I)^-1 and a code, for shift (blocks,)."""
    xp = namespace(x)
    as_numbers = is_numpy(x) or is_tracer(x)  # elsewhere `spd_inverse` does it in fewer operations
    if as_numbers and not is_diagonal(x) and x.shape[-1] == 1:  # of gains and biases alone, which are many
        row = x[..., 0]
        found, code = inverse(row, shift)
        return found[..., None], choose((row - row != 0)[:, 0], Code.NONFINITE, code)
    if not is_diagonal(x):
        return kernels.spd_inverse(kernels.shifted(x, shift))
    shifted = x + shift[:, None]
    floor = eps(x.dtype, xp) * xp.max(shifted, axis=-1, keepdims=True)
    jittered = xp.any(shifted <= floor, axis=-1)
    code = choose(floor[:, 0] > 0, Code.OK, Code.INDEFINITE)
    code = choose(jittered & (code == int(Code.OK)), Code.JITTERED, code)
    return 1.0 / xp.where(shifted > floor, shifted, xp.where(floor > 0, floor, xp.ones_like(floor))), code


def grown(given: tuple[Array, ...], width: int) -> tuple[Array, ...]:
    """What `inverse` takes, for factors in the corner of matrices of that width, with the mean of their diagonal beside
    them, which is then the wide ones' too."""
    x, shift = given
    return traced.widened(x, width, trace(x) / x.shape[-1]), shift


def eigh(x: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues (blocks, d), eigenvectors shaped like `x`, code; a diagonal factor is its own decomposition."""
    if not is_diagonal(x):
        return kernels.eigh(x)
    xp = namespace(x)
    return x, xp.ones_like(x), xp.zeros(x.shape[:1], dtype=xp.int32, device=device_of(x))


def inverses(A: Array, d_a: Array, G: Array, d_g: Array) -> Asks[tuple[Answer, Answer]]:
    """`inverse` of both sides of a block, asked for in one round."""
    found_A, found_G = yield Ask(inverse, (A, d_a), grown), Ask(inverse, (G, d_g), grown)
    return found_A, found_G


def decompositions(A: Array, G: Array) -> Asks[tuple[Answer, Answer]]:
    """`eigh` of both sides of a block, asked for in one round."""
    found_A, found_G = yield Ask(eigh, (A,)), Ask(eigh, (G,))
    return found_A, found_G


def times(v: Array, x: Array) -> Array:
    """v x: (blocks, m, d) times the factor."""
    return v * x[:, None, :] if is_diagonal(x) else kernels.product(v, x)


def through(v: Array, x: Side) -> Array:
    """v x for a factor that may be unformed."""
    return x.times(v) if isinstance(x, Unformed) else times(v, x)


def products(x: Side) -> int:
    """Products that one row takes through the factor."""
    if isinstance(x, Unformed):
        return x.products
    return x.shape[-1] if is_diagonal(x) else x.shape[-2] * x.shape[-1]


def transposed(x: Array) -> Array:
    """x^T."""
    return x if is_diagonal(x) else x.mT


def dense_only(name: str, block: Block) -> str:
    """What a method says that needs dense factors of both sides; "" where it has them."""
    if not (block.diagonal_in or block.diagonal_out):
        return ""
    what = "an embedding, or inputs" if block.diagonal_in else "outputs"
    size = block.d_in if block.diagonal_in else block.d_out
    return (
        f"{name} got {what} too wide for a matrix ({size}, a diagonal side), and both its factors are dense: give this "
        f"layer KFAC, EKFAC or TKFAC, or BrandKFAC for modes alone; a Preconditioner's `widest` says what is too wide"
    )
