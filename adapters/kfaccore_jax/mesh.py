"""Arrays over several devices: what their types say, named axes in force, and meshes that are explicit.

An explicit mesh (the default of `jax.make_mesh` in jax 0.10) types every array by how it is spread, and refuses
operations whose result could lie in two ways. What is not the model's own runs with the mesh automatic instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

Spec = tuple[Any, ...]  # for each axis of an array the mesh axes it is spread over, or None


@dataclass(frozen=True)
class Shape:
    """Type of an array: shape, dtype, axes of an explicit mesh it is spread over, manual axes it differs along."""

    shape: tuple[int, ...]
    dtype: Any
    spec: Spec = ()
    varying: frozenset[str] = frozenset()

    @classmethod
    def of(cls, x: Any) -> Shape:
        """Of an array, a tracer or a ShapeDtypeStruct."""
        return cls(tuple(x.shape), x.dtype, spread(x), varying(x))

    def stacked(self, length: int) -> Shape:
        """With one axis more in front."""
        return replace(self, shape=(length, *self.shape), spec=(None, *self.spec) if self.spec else ())

    def zeros(self) -> Any:
        """Zeros that differ along the same manual axes."""
        return _vary(jnp.zeros(self.shape, self.dtype), self.varying)


def zeros(shapes: Mapping[str, Shape], near: Any) -> dict[str, Any]:
    """Zeros of these types; `near` is any tree of arrays on their mesh."""
    specs = {key: jax.sharding.PartitionSpec(*shape.spec) for key, shape in shapes.items()}
    return automatic(lambda _: {key: shape.zeros() for key, shape in shapes.items()}, specs, near)


def _type(x: Any) -> Any:
    """jax's own type of an array; what has none is its own."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def spread(x: Any) -> Spec:
    """Mesh axes that each axis of `x` is spread over by its type, () where it is not."""
    sharding = _type(x).sharding
    spec = tuple(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else ()
    return spec if any(axes is not None for axes in spec) else ()


def varying(x: Any) -> frozenset[str]:
    """Manual axes along which `x` is known to differ between devices; none where jax does not check them."""
    kind = _type(x)
    if hasattr(kind, "manual_axis_type"):  # jax 0.10
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(getattr(kind, "vma", None) or ())  # jax 0.7 to 0.9


def differing(tree: Any, near: Any) -> Any:
    """`tree` as what may differ along the manual axes that `near` differs along: a derivative with respect to it is
    then each device's own, where jax would sum it over devices."""
    axes = _all_varying(near)
    return jax.tree.map(lambda x: _vary(x, axes), tree) if axes else tree


def _all_varying(tree: Any) -> frozenset[str]:
    return frozenset().union(*(varying(x) for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)))


def _vary(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - varying(x)))
    if not missing:
        return x
    return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes that arrays of a tree are typed by, or None."""
    for x in jax.tree.leaves(tree):
        if not isinstance(x, jax.Array):
            continue
        mesh = getattr(jax.typeof(x).sharding, "mesh", None)
        if mesh is not None and not mesh.empty and _explicit(mesh):
            return mesh
    return None


def _explicit(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)


def automatic(function: Callable, specs: Any, *args: Any) -> Any:
    """function(*args) with explicit axes of the mesh of `args` automatic within; `specs` of the results, a tree of
    PartitionSpec like them or one for all."""
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)

    def run(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(function, axes=_explicit(mesh), out_sharding=specs)(*args)

    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
    return (
        run(*args) if traced else jax.jit(run, keep_unused=True)(*args)
    )  # outside jit the arguments say which devices


def promoting(function: Callable) -> Callable:
    """`function` with arrays of fewer axes and of other dtypes joined as NumPy does, where
    jax_numpy_rank_promotion="raise" or jax_numpy_dtype_promotion="strict" forbids it: the core is written for NumPy
    too."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


def under(names: tuple[str, ...], made: Callable[[], Any]) -> Any:
    """`made()` while axes of these names are in force, of two devices each, which nothing is computed on."""
    if not names:
        return made()
    found: list[Any] = []

    def one(_: object) -> None:
        found.append(under(names[1:], made))

    jax.eval_shape(jax.vmap(one, axis_name=names[0]), jax.ShapeDtypeStruct((2,), jnp.float32))
    return found[0]


def named_axes() -> tuple[str, ...]:
    """Axes in force of shard_map, pmap and named vmaps, as far as this jax tells."""
    names = dict.fromkeys(str(name) for name in jax.sharding.get_abstract_mesh().manual_axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jax 0.10 has no other way to see a named vmap
        known = getattr(jax.core, "unsafe_get_axis_names_DO_NOT_USE", None)
    return tuple(names | dict.fromkeys(str(name) for name in (known() if known else ())))


def specs_of(tree: Any) -> Any:
    """PartitionSpecs of a tree of arrays, by their types."""
    return jax.tree.map(lambda x: jax.sharding.PartitionSpec(*spread(x)), tree)


def placed_like(tree: Any, near: Any) -> Any:
    """`tree` on all devices of the explicit mesh that `near` lies on; as it is under tracing and on other meshes."""
    mesh = explicit_mesh(near)
    if mesh is None or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(near)):
        return tree
    real = next(x.sharding.mesh for x in jax.tree.leaves(near) if explicit_mesh(x) is not None)
    return jax.device_put(tree, jax.sharding.NamedSharding(real, jax.sharding.PartitionSpec()))
