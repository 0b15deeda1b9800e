"""kfaccore for TensorFlow: Keras models, their layers read from inside; the core runs on NumPy."""

import keras

if keras.backend.backend() != "tensorflow":
    there = "; on 'jax' use kfaccore_jax.keras_apply(model)" if keras.backend.backend() == "jax" else ""
    raise ImportError(f"Keras runs on {keras.backend.backend()!r} here; kfaccore_tensorflow needs 'tensorflow'{there}")

from kfaccore_tensorflow.analysis import records, unread
from kfaccore_tensorflow.bridge import to_numpy, to_tensor
from kfaccore_tensorflow.engine import Engine, Settings, record
from kfaccore_tensorflow.losses import Objective, objective
from kfaccore_tensorflow.model import KFACModel
from kfaccore_tensorflow.optimizer import Optimizer
from kfaccore_tensorflow.plan import TABLE, Part, Plan, coverage
from kfaccore_tensorflow.tap import tap

__all__ = [
    "TABLE",
    "Engine",
    "KFACModel",
    "Objective",
    "Optimizer",
    "Part",
    "Plan",
    "Settings",
    "coverage",
    "objective",
    "record",
    "records",
    "tap",
    "to_numpy",
    "to_tensor",
    "unread",
]
