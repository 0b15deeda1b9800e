"""Per-example gradients from records and by vmap(grad), and how close they are."""

from __future__ import annotations

from jax_needed import jax, jnp


def examples(plan, params, records):
    """Per-example gradients {leaf: (draws, batch, *shape)} rebuilt from the records alone."""
    J = {layer.name: jnp.moveaxis(records[layer.name].examples(), 1, 2) for layer in plan.layers}
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.vmap(jax.vmap(lambda one: plan.tree(zeros, one)))(J)


def reference(apply, params, draws, *args):
    def one(params, draw, *args):
        return jnp.vdot(apply(params, *jax.tree.map(lambda x: x[None], args))[0], draw)

    return jax.vmap(lambda d: jax.vmap(jax.grad(one), (None, 0, *(0 for _ in args)))(params, d, *args))(draws)


def close(got, want, tolerance=1e-10):
    """Leaf by leaf, relative to its largest entry; leaves whose true gradient is zero in absolute terms."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        size = float(jnp.max(jnp.abs(b), initial=0.0))
        error = float(jnp.max(jnp.abs(a - b), initial=0.0))
        assert error <= tolerance * (size if size > 1e-12 else 1.0), (jax.tree_util.keystr(path), error, size)
