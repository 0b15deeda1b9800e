"""Array kernels outside the Array API standard: a native call where a namespace has one, an agnostic twin otherwise.

This folder is the only one that knows NumPy from CuPy from PyTorch from JAX; everything else is written against the
standard. No kernel raises on data: failure comes back as a `Code`. The only host read on a device is the condition of
`loop`, once a factorisation."""

from kfaccore.xp.arrays import (
    all_finite,
    device_of,
    eps,
    from_host,
    is_numpy,
    loop,
    namespace,
    scalar,
    select,
    shifted,
    to_host,
    widen,
)
from kfaccore.xp.chunks import at_once, read_again, spans
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.eigen import eigh
from kfaccore.xp.factorise import qr, spd_inverse, widest
from kfaccore.xp.fourier import fast_length, rfftn
from kfaccore.xp.gram import average, gram, gram_diagonal, product, quadratic, turned
from kfaccore.xp.half import to_bfloat16
from kfaccore.xp.memory import shared_first
from kfaccore.xp.scatter import add_at, segment_sum

__all__ = [
    "Code",
    "add_at",
    "all_finite",
    "at_once",
    "average",
    "choose",
    "device_of",
    "eigh",
    "eps",
    "fast_length",
    "from_host",
    "gram",
    "gram_diagonal",
    "is_numpy",
    "loop",
    "namespace",
    "product",
    "qr",
    "quadratic",
    "read_again",
    "rfftn",
    "scalar",
    "segment_sum",
    "select",
    "shared_first",
    "shifted",
    "spans",
    "spd_inverse",
    "to_bfloat16",
    "to_host",
    "turned",
    "widen",
    "widest",
]
