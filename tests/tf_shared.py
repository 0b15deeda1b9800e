"""What every test of the TensorFlow adapter begins with: TensorFlow, quiet and on the CPU, or a skip."""

from __future__ import annotations

import os
from importlib.util import find_spec

if find_spec("tensorflow"):  # without it other tests of the process may want the GPU
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
kt = pytest.importorskip("kfaccore_tensorflow")
L = keras.layers
SGD = keras.optimizers.SGD
SAVES = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras does, in saving


@pytest.fixture(autouse=True)
def double():
    """Models in float64, of the same weights."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(3)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def crossentropy():
    """Of classes, on logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
