"""K-FAC as an optax transformation: against the NumPy core, under jit, in chains, with failures."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp

import kfaccore as kf
import kfaccore_jax as kj
import kfaccore_numpy as kn
from jax_models import MAKERS_FOR_OPTAX, normal
