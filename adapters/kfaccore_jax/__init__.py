"""K-FAC for JAX: follows parameters through a model's jaxpr, and preconditions as an optax transformation."""

from kfaccore_jax.accumulate import accumulate
from kfaccore_jax.bridge import exported, imported
from kfaccore_jax.capture import Captured, capture
from kfaccore_jax.keras_model import keras_apply, keras_assign, keras_stateful
from kfaccore_jax.layers import Layer
from kfaccore_jax.plan import Plan, Row, plan
from kfaccore_jax.state import KFACState
from kfaccore_jax.step import Step, kfac, step
from kfaccore_jax.stream import Stream, measured, outputs, stream
from kfaccore_jax.tap import Tap

__all__ = [
    "Captured",
    "KFACState",
    "Layer",
    "Plan",
    "Row",
    "Step",
    "Stream",
    "Tap",
    "accumulate",
    "capture",
    "exported",
    "imported",
    "keras_apply",
    "keras_assign",
    "keras_stateful",
    "kfac",
    "measured",
    "outputs",
    "plan",
    "step",
    "stream",
]
