"""kfaccore for TensorFlow: Keras models, their layers read from inside; the core runs on NumPy."""

import keras

if keras.backend.backend() != "tensorflow":
    there = "; on 'jax' use kfaccore_jax.keras_apply(model)" if keras.backend.backend() == "jax" else ""
    raise ImportError(f"Keras runs on {keras.backend.backend()!r} here; kfaccore_tensorflow needs 'tensorflow'{there}")

from kfaccore_tensorflow.bridge import to_numpy, to_tensor
from kfaccore_tensorflow.capture import tap
from kfaccore_tensorflow.heads import Several, objective
from kfaccore_tensorflow.losses import Objective
from kfaccore_tensorflow.model import KFACModel
from kfaccore_tensorflow.optimizer import Optimizer
from kfaccore_tensorflow.plan import Part, Plan
from kfaccore_tensorflow.records import records, unread
from kfaccore_tensorflow.step import Engine, Settings
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
    "coverage",
    "objective",
    "records",
    "tap",
    "to_numpy",
    "to_tensor",
    "unread",
]
