"""Triangular Toeplitz matrices by FFT: one number c_j a diagonal, products are truncated convolutions.

Pi(M)_0 is the mean of M's diagonal, Pi(M)_j the sum of its j-th upper and lower diagonals over d - j: what each entry
of the held diagonal has to be for <Pi(M), X> = <M, X>. Inner products never form (d, d): the diagonal sums of s^T s are
autocorrelations of the rows, those of K^T K are sum_m (d - j - m) c_m c_(m+j).
Source: Lin et al. 2024 (2312.05705).
Cost: rows d log d a product; memory d. Half precision is widened to float32 inside the transforms.
"""

from __future__ import annotations

from dataclasses import dataclass

from kfaccore import xp as kernels
from kfaccore.methods.singd.structured import Parts, eye, filled
from kfaccore.xp.arrays import Array, device_of, namespace, widen


@dataclass(frozen=True)
class UpperToeplitz:
    """K[i, j] = c[j - i] for j >= i."""

    def eye(self, blocks: int, d: int, like: Array) -> Parts:
        first = filled(1.0, (blocks, 1), like)
        return {"c": namespace(like).concat([first, filled(0.0, (blocks, d - 1), like)], axis=-1)}

    def times(self, x: Array, K: Parts) -> Array:
        return _convolve(x, K["c"][:, None, :])

    def times_transposed(self, x: Array, K: Parts) -> Array:
        return _correlate(x, K["c"][:, None, :])

    def product(self, K: Parts, M: Parts) -> Parts:
        return {"c": _convolve(K["c"], M["c"])}

    def gram(self, s: Array) -> Parts:
        xp = namespace(s)
        d = s.shape[-1]
        n = _length(d)
        wide = widen(s, "s")
        spectrum = kernels.rfftn(wide, (n,), (-1,))
        # the sum of s^T s along its j-th diagonal is the rows' autocorrelation at shift j: the transform of |s^|^2
        power = xp.sum(xp.real(spectrum) ** 2 + xp.imag(spectrum) ** 2, axis=1)
        sums = xp.fft.irfft(xp.astype(power, spectrum.dtype), n=n, axis=-1)[..., :d]
        return {"c": xp.astype(sums * _shares(wide), s.dtype)}

    def inner(self, K: Parts) -> Parts:
        c = K["c"]
        return {"c": _correlate(_counts(c) * c, c) * _shares(c)}

    def size(self, K: Parts) -> int:
        return K["c"].shape[-1]

    def trace(self, K: Parts) -> Array:
        return K["c"][:, 0] * K["c"].shape[-1]

    def square(self, K: Parts) -> Array:
        return namespace(K["c"]).sum(K["c"] * K["c"] * _counts(K["c"]), axis=-1)

    def dense(self, K: Parts) -> Array:
        return self.times(eye(K["c"].shape[0], self.size(K), K["c"]), K)

    def project(self, M: Array) -> Parts:
        c = _diagonal_sums(M)
        return {"c": c * _shares(c)}

    def take(self, M: Array) -> Parts:
        return {"c": M[:, 0, :]}


@dataclass(frozen=True)
class LowerToeplitz(UpperToeplitz):
    """K[i, j] = c[i - j] for i >= j: the transpose, so only the two products with rows change places."""

    def times(self, x: Array, K: Parts) -> Array:
        return _correlate(x, K["c"][:, None, :])

    def times_transposed(self, x: Array, K: Parts) -> Array:
        return _convolve(x, K["c"][:, None, :])

    def take(self, M: Array) -> Parts:
        return {"c": M[:, :, 0]}


def _length(d: int) -> int:
    """Of the transforms: twice d, so that a circular convolution does not wrap around into its first d entries."""
    return kernels.fast_length(2 * d, real=True)


def _filtered(x: Array, c: Array, conjugate: bool) -> Array:
    """First d entries of the convolution of x with c, or of their correlation sum_j x_j c_(j-i)."""
    xp = namespace(x)
    d = x.shape[-1]
    n = _length(d)
    left, right = (kernels.rfftn(widen(v, "x"), (n,), (-1,)) for v in (x, c))
    if conjugate:
        right = xp.conj(right)
    return xp.astype(xp.fft.irfft(left * right, n=n, axis=-1)[..., :d], x.dtype)


def _convolve(x: Array, c: Array) -> Array:
    return _filtered(x, c, False)


def _correlate(x: Array, c: Array) -> Array:
    return _filtered(x, c, True)


def _counts(c: Array) -> Array:
    """Entries d - j of the j-th diagonal, (d,)."""
    xp = namespace(c)
    d = c.shape[-1]
    return xp.astype(d - xp.arange(d, device=device_of(c)), c.dtype)


def _shares(c: Array) -> Array:
    """1 / d for the main diagonal, 2 / (d - j) for the j-th."""
    xp = namespace(c)
    counts = _counts(c)
    first = counts == c.shape[-1]
    return xp.where(first, xp.ones_like(counts), 2 * xp.ones_like(counts)) / counts


def _diagonal_sums(M: Array) -> Array:
    """The sum of each upper diagonal, (blocks, d)."""
    xp = namespace(M)
    sums = [xp.sum(xp.linalg.diagonal(M, offset=j), axis=-1) for j in range(M.shape[-1])]
    return xp.stack(sums, axis=-1)
