"""Eigendecomposition of symmetric matrices that reports failure instead of raising it."""

from __future__ import annotations

from typing import Any

import array_api_compat as aac
import numpy as np
from scipy.linalg import eigh as scipy_eigh

from kfaccore.xp.arrays import Array, all_finite, device_of, from_host, is_numpy, namespace, select, to_host
from kfaccore.xp.codes import Code, choose


def eigh(x: Array) -> tuple[Array, Array, Array]:
    """Ascending eigenvalues (blocks, d), eigenvectors (blocks, d, d) as columns, code (blocks,) of symmetric matrices.

    The input is symmetrised first (namespaces read different triangles). A non-finite matrix gives the eigenpairs
    of the identity and NONFINITE, one that no driver of LAPACK finishes those of the identity and UNCONVERGED. On NumPy
    the divide-and-conquer driver is used, twice as fast in float32.
    """
    xp = namespace(x)
    finite = all_finite(x)
    eye = xp.eye(x.shape[-1], dtype=x.dtype, device=device_of(x))
    x = select(finite, x / 2 + x.mT / 2, xp.zeros_like(x) + eye)  # halves first: the sum of two may overflow
    code = choose(finite, Code.OK, Code.NONFINITE)
    try:
        values, vectors = _eigenpairs(x)
    except _linalg_errors(x):  # eager namespaces only: nothing is raised under a trace
        values, vectors, found = _one_by_one(x)
        code = choose(~found, Code.UNCONVERGED, code)
    return values, vectors, code


def _eigenpairs(x: Array) -> tuple[Array, Array]:
    """Of symmetric matrices (blocks, d, d), by the namespace's own routine; raises where it does not converge."""
    if aac.is_jax_array(x):
        return namespace(x).linalg.eigh(x, symmetrize_input=False)  # it would add before it halves
    if not is_numpy(x):
        return namespace(x).linalg.eigh(x)
    pairs: list[Any] = [scipy_eigh(block, driver="evd", check_finite=False) for block in x]
    values = np.stack([pair[0] for pair in pairs])
    return values, np.ascontiguousarray(np.stack([pair[1] for pair in pairs]))


def _one_by_one(x: Array) -> tuple[Array, Array, Array]:
    """Eigenpairs of each block on the host by LAPACK's slower relatives of divide and conquer, those of the identity
    where none converges; and which converged, (blocks,)."""
    pairs = [_by_any_driver(block) for block in to_host(x)]
    values = from_host(np.stack([pair[0] for pair in pairs]), x)
    vectors = from_host(np.stack([pair[1] for pair in pairs]), x)
    return values, vectors, from_host(np.array([pair[2] for pair in pairs]), x)


def _by_any_driver(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    for driver in ("evr", "ev"):
        try:
            values, vectors = scipy_eigh(block, driver=driver, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        return values, vectors, True
    d = len(block)
    return np.ones(d, block.dtype), np.eye(d, dtype=block.dtype), False


def _linalg_errors(x: Array) -> tuple[type[Exception], ...]:
    """What the eigendecomposition of a namespace raises when LAPACK does not converge."""
    if not aac.is_torch_array(x):
        return (np.linalg.LinAlgError,)
    import torch

    return (torch.linalg.LinAlgError,)
