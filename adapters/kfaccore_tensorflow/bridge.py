"""Between TensorFlow and NumPy, where the core runs: views out, copies in.

TensorFlow aborts the process on foreign memory that is not 64-byte aligned, and NumPy's is so only by luck: nothing
goes in through DLPack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

HALF = (tf.float16, tf.bfloat16)
ASKED = "kfaccore_asks"


def widened(x: Any) -> Any:
    """A tensor as it is, IndexedSlices made dense, half precision in float32; works on symbolic tensors too."""
    x = tf.convert_to_tensor(x)
    return tf.cast(x, tf.float32) if x.dtype in HALF else x


def to_numpy(x: Any) -> np.ndarray:
    """A read-only view of an eager tensor's memory."""
    view = np.asarray(widened(x))
    view.flags.writeable = False
    return view


def to_tensor(x: Any, dtype: Any = None) -> Any:
    """A tensor with its own copy of `x`, whatever the strides, alignment or flags of `x`."""
    return tf.constant(np.array(x, order="C"), dtype=dtype)


def asked(function: Callable, given: Sequence[Any], kinds: Any) -> Any:
    """`tf.py_function` of this shell's own, within a pass: it is known by its name, and draws nothing."""
    return tf.py_function(function, given, kinds, name=ASKED)
