"""Products with J, the matrix of per-example gradients, from records alone: nothing of size examples x parameters.

(J v) of an example and draw is a sum over layers and positions of g . (V a); J^T w is a sum of w g a^T. Layers of one
batch with the same draws add: F v = J^T (J v) / n over the whole network. Patches are unfolded a few examples at a
time.
Cost: rows d_in d_out a vector, each way.
"""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.record.chunks import joined, summed
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array, is_tracer, namespace
from kfaccore.xp.memory import shared_first


def outputs(record: Record, *vs: Array) -> list[Array]:
    """V a of each position, (blocks, batch, shared, d_out), for each v (blocks, d_out, d_in) of this layer."""
    xp = namespace(record.g)
    full = [v if v.ndim == 3 else v[None, ...] for v in vs]
    if len(full) > 1 and is_tracer(record.g) and not isinstance(record.a, Patches):
        # under jit joining them is a copy that costs more than it saves; unfolding twice costs more
        return [z for v in full for z in outputs(record, v)]
    v = full[0] if len(full) == 1 else xp.concat(full, axis=1)
    if isinstance(record.a, Ids):
        z = xp.take(v[0, ...].mT, xp.reshape(record.a.index, (-1,)), axis=0)
    elif isinstance(record.a, Patches):
        z = joined(record, lambda a: _times(a, v))
    elif shared_first(record.a):
        a = xp.reshape(xp.moveaxis(record.a, -2, -3), (record.blocks, -1, record.d_in))
        z = xp.reshape(xp.matmul(a, v.mT), (record.blocks, record.shared, record.batch, -1))
        z = xp.moveaxis(z, -2, -3)
        return [z[..., i * record.d_out : (i + 1) * record.d_out] for i in range(len(vs))]
    else:
        z = _times(record.a, v)
    z = xp.reshape(z, (record.blocks, record.batch, record.shared, -1))
    return [z[..., i * record.d_out : (i + 1) * record.d_out] for i in range(len(vs))]


def products(record: Record, *vs: Array) -> list[Array]:
    """J v of each draw and example, (draws, batch), for each v (blocks, d_out, d_in) of this layer.

    V a comes first in every layer: V^T g first is cheaper where d_in < d_out, but KFAC* then stops at three times the
    error on a Poisson equation (`bench/pinn.py`), for its damping is near rounding.
    """
    return [contracted(record, z) for z in outputs(record, *vs)]


def contracted(record: Record, z: Array) -> Array:
    """<g, z> of each draw and example, (draws, batch), for z (blocks, batch, shared, d_out): J v where z is V a."""
    xp = namespace(z)
    return xp.sum(xp.vecdot(record.g, z[None, ...]), axis=(1, 3))


def adjoint(record: Record, w: Array) -> Array:
    """J^T w, (blocks, d_out, d_in), for a number w (draws, batch) a draw and example."""
    return pulled(record, weighed(record, w))


def weighed(record: Record, w: Array) -> Array:
    """Sum over draws of w g, (blocks, batch, shared, d_out)."""
    if record.draws == 1:
        return record.g[0, ...] * w[0, None, :, None, None]
    return namespace(record.g).sum(record.g * w[:, None, :, None, None], axis=0)


def pulled(record: Record, g: Array) -> Array:
    """Sum of g a^T over examples and positions, (blocks, d_out, d_in), for any g (blocks, batch, shared, d_out)."""
    xp = namespace(record.g)
    if isinstance(record.a, Ids):
        index = xp.reshape(record.a.index, (-1,))
        return kernels.segment_sum(xp.reshape(g, (-1, record.d_out)), index, record.a.size).mT[None, ...]
    return summed(record, g, lambda a, g: xp.matmul(_flat(g).mT, _flat(a)))


def _times(a: Array, v: Array) -> Array:
    """Rows a (blocks, examples, shared, d_in) times v (blocks, d, d_in)."""
    xp = namespace(a)
    return xp.reshape(xp.matmul(_flat(a), v.mT), (*a.shape[:-1], v.shape[-2]))


def _flat(x: Array) -> Array:
    return namespace(x).reshape(x, (x.shape[0], -1, x.shape[-1]))
