"""The way out of JAX and back, for a core that runs outside jit on NumPy (CPU) or CuPy (GPU).

Out: views through DLPack, read-only on NumPy; half precision is widened before. In: always a copy on NumPy, so memory
that JAX takes for immutable is never aliased.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfaccore_jax.records import widened
from kfaccore_jax.trees import register


def exported(tree: Any, to: Any = np) -> Any:
    """Any tree (records, gradients) with its JAX arrays as views of the namespace `to`, NumPy on the CPU; on a GPU pass
    cupy. Waits until they are computed."""
    return jax.tree.map(lambda x: to.from_dlpack(widened(x)) if isinstance(x, jax.Array) else x, register(tree))


def imported(tree: Any, like: Any = None) -> Any:
    """Any tree (updates) with its NumPy or CuPy arrays as JAX arrays; in the dtypes of `like` if that is given."""
    found = jax.tree.map(_in, register(tree))
    return found if like is None else jax.tree.map(lambda x, y: x.astype(y.dtype), found, like)


def _in(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jnp.array(x, copy=True)
    return jnp.from_dlpack(x).copy() if hasattr(x, "__dlpack__") and not isinstance(x, jax.Array) else x
