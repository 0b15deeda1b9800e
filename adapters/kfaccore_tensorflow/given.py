"""What a model is called on, arrays and tensors, sparse and ragged ones too: of any number of examples."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def tensor(leaf: Any) -> Any:
    """A leaf as a tensor; None, and what is stored as several tensors, as it is."""
    stored = isinstance(leaf, tf.SparseTensor | tf.RaggedTensor)
    return leaf if leaf is None or stored else tf.convert_to_tensor(leaf)


def spec(leaf: Any) -> Any:
    """Of a tensor, or of an input of Keras: its shape but for the number of examples."""
    if leaf is None or isinstance(leaf, tf.RaggedTensor):
        return None if leaf is None else tf.type_spec_from_value(leaf)
    sparse = isinstance(leaf, tf.SparseTensor) or bool(getattr(leaf, "sparse", False))
    kind = tf.SparseTensorSpec if sparse else tf.TensorSpec
    return kind((None, *leaf.shape[1:]), leaf.dtype)


def of_any_batch(x: Any) -> Any:
    """The same tensor, one example not told from none: its batch axis is of unknown size."""
    if not tf.is_tensor(x) or x.shape.rank in (None, 0) or x.shape[0] != 1:
        return x
    if isinstance(x, tf.RaggedTensor):
        return x
    if isinstance(x, tf.SparseTensor):
        sizes = tf.compat.v1.placeholder_with_default(x.dense_shape[:1], (1,))
        return tf.SparseTensor(x.indices, x.values, tf.concat([sizes, x.dense_shape[1:]], 0))
    return tf.compat.v1.placeholder_with_default(x, (None, *x.shape[1:]))


def examples(leaf: Any) -> Any:
    """How many, (1,)."""
    return tf.reshape(leaf.nrows(), [1]) if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf)[:1]
