"""JAX and what its adapter needs, or a skip of the module that asks for them."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
kj = pytest.importorskip("kfaccore_jax")
jnp, lax = jax.numpy, jax.lax
jax.config.update("jax_enable_x64", True)

__all__ = ["jax", "jnp", "kj", "lax", "optax"]
