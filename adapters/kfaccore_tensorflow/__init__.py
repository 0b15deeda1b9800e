"""kfaccore for TensorFlow: Keras models, their layers read from inside; the core runs on NumPy."""

import keras

if keras.backend.backend() != "tensorflow":
    others = {
        "jax": "; on 'jax' use kfaccore_jax.keras_apply(model)",
        "torch": "; on 'torch' no shell reads Keras layers: set KERAS_BACKEND=tensorflow, or jax with kfaccore_jax",
    }
    there = others.get(keras.backend.backend(), "; set KERAS_BACKEND=tensorflow before keras is imported")
    raise ImportError(f"Keras runs on {keras.backend.backend()!r} here; kfaccore_tensorflow needs 'tensorflow'{there}")

from kfaccore_tensorflow.bridge import to_numpy, to_tensor
from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.heads import Several, objective
from kfaccore_tensorflow.losses import Objective
from kfaccore_tensorflow.matrices import assign, matrices
from kfaccore_tensorflow.model import KFACModel
from kfaccore_tensorflow.optimizer import Optimizer
from kfaccore_tensorflow.plan import Part, Plan
from kfaccore_tensorflow.records import records, unread
from kfaccore_tensorflow.step import Engine, Settings
from kfaccore_tensorflow.stream import Stream, measured, outputs
from kfaccore_tensorflow.trace import coverage

__all__ = [
    "Engine",
    "KFACModel",
    "Objective",
    "Optimizer",
    "Part",
    "Plan",
    "Settings",
    "Several",
    "Stream",
    "assign",
    "coverage",
    "matrices",
    "measured",
    "objective",
    "outputs",
    "records",
    "tap",
    "to_numpy",
    "to_tensor",
    "unread",
]
