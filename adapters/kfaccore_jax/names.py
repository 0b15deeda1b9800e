"""Names of the leaves of a tree of parameters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax


def named(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf} of a tree of parameters; a flax.nnx Variable and its bare array have one name."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    found = {".".join(_text(key) for key in _bare(path)) or "params": leaf for path, leaf in pairs}
    if len(found) < len(pairs):
        paths = Counter(".".join(_text(key) for key in _bare(path)) for path, _ in pairs)
        several = sorted(name for name, count in paths.items() if count > 1)
        raise ValueError(f"several leaves have the names {several}, dots between their keys: take keys without dots")
    return found


def check_arrays(params: Any) -> None:
    """TypeError naming leaves that are no arrays."""
    other = [
        f"{name} is a {type(x).__name__}"
        for name, x in named(params).items()
        if not (hasattr(x, "dtype") and hasattr(x, "shape"))
    ]
    if other:
        raise TypeError(
            f"params has leaves that are no arrays: {', '.join(other[:5])}; make numbers that train arrays, "
            f"jnp.asarray(x), and keep others out of the tree"
        )


def without_number(params: Any, args: tuple, batched: tuple[int, ...]) -> Any:
    """What two batches have in common that differ in the number of their examples alone."""
    leaves, structure = jax.tree.flatten((params, *args))
    axes = jax.tree.leaves((jax.tree.map(lambda _: 0, params), *(_axes(x, i in batched) for i, x in enumerate(args))))
    return structure, tuple((x.shape[axis:], x.dtype) for x, axis in zip(leaves, axes, strict=True))


def _axes(arg: Any, batched: bool) -> Any:
    return jax.tree.map(lambda _: int(batched), arg)


def _bare(path: tuple) -> tuple:
    """A path without the `value` of a Variable at its end."""
    if len(path) > 1 and str(path[-1]) == ".value":
        return path[:-1]
    return path


def _text(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)
