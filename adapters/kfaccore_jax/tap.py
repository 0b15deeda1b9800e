"""Explicit capture: the model calls `tap` for each layer. The floor that stands if jaxprs change: public jax only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from kfaccore_jax.interpret import Walk
