"""A name for the content of trees: what was computed from equal arrays need not be computed again."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from kfaccore import tree
from kfaccore.xp.arrays import to_host


def digest(*trees: object) -> str:
    """32 hexadecimal digits of all leaves, their paths, shapes and dtypes; the same wherever the arrays live."""
    parts = blake2b(digest_size=16)
    for given in trees:
        parts.update(type(given).__name__.encode())
        for name, leaf in tree.items(given):
            parts.update(name.encode())
            if leaf is None or isinstance(leaf, int | float | str | bool):
                parts.update(repr(leaf).encode())
                continue
            host = np.ascontiguousarray(to_host(leaf))
            parts.update(repr((host.shape, host.dtype.str)).encode())
            parts.update(host.reshape(-1).view(np.uint8).data)
    return parts.hexdigest()
