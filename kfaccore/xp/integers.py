"""Integers that name rows: widened once, as sums, products and comparisons wrap in a narrow dtype."""

from __future__ import annotations

import array_api_compat as aac

from kfaccore.xp.arrays import Array, is_numpy, namespace


def signed(x: Array) -> Array:
    """Integers or flags x as int32 or int64 of this machine's byte order: themselves where they are that."""
    xp = namespace(x)
    if x.dtype in (xp.int32, xp.int64):
        return x
    name = x.dtype.name if is_numpy(x) else str(x.dtype).rsplit(".", 1)[-1]  # a string tells NumPy's byte order, too
    # JAX may have nothing wider than 32 bits: what does not fit is negative then, so no row
    wide = name in ("int64", "uint64") or (name == "uint32" and not aac.is_jax_array(x))
    return xp.astype(x, xp.int64 if wide else xp.int32)
