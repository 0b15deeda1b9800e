"""From what a forward pass kept and the gradients of draws to records, which know what filled them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kfaccore import Ids, Patches, Record
from kfaccore_jax.layers import Layer
from kfaccore_jax.mesh import automatic, explicit_mesh

if TYPE_CHECKING:
    from kfaccore_jax.plan import Plan

Pair = tuple[Any, Any]  # a and g of a Record


@jax.tree_util.register_pytree_node_class
class Drawn(dict):
    """{layer: Record} with what the caller says of their draws; a JAX tree like a dict.

    fisher   kfaccore's function that made the draws, or None
    share    n of the batch where the values are Stats, which do not tell it; None where they are Records
    rest     {leaf: Record} of leaves without a layer
    own      the same rows with the loss's own gradients, where they were asked for
    """

    def __init__(
        self,
        records: Mapping[str, Any],
        fisher: Callable | None = None,
        share: Any = None,
        rest: Mapping[str, Any] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(records)
        self.fisher = fisher
        self.share = share
        self.rest = dict(rest or {})
        self.own = dict(own or {})

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Arrays, and the names they belong to, for jax."""
        return (*self.values(), self.share, self.rest, self.own), (tuple(self), self.fisher)

    @classmethod
    def tree_unflatten(cls, structure: tuple, values: tuple) -> Drawn:
        """The records again."""
        names, fisher = structure
        *records, share, rest, own = values
        return cls(dict(zip(names, records, strict=True)), fisher, share, rest, own)


def side_by_side(
    records: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> Mapping[str, Any] | None:
    """Records of one update that came as those of several micro-batches: {layer: [Record, ...]}; others as they are."""
    if records is None or isinstance(records, Mapping):
        check_one(records)
        return records
    if not all(isinstance(part, Mapping) for part in records) or not records:
        raise TypeError("records is a sequence; need one {layer: Record} a micro-batch, as Captured.records gives them")
    for part in records:
        check_one(part)
    parts = [part if isinstance(part, Drawn) else Drawn(part) for part in records]
    if any(part.keys() != parts[0].keys() or part.own.keys() != parts[0].own.keys() for part in parts):
        raise ValueError(
            "records has micro-batches of different layers; need those of one plan, alike with `cotangent`"
        )
    if len({part.fisher for part in parts}) > 1:
        raise ValueError("records has micro-batches of different draws; need one of type2, monte_carlo, empirical")

    def listed(of: Callable[[Drawn], Mapping[str, Any]]) -> dict[str, list[Any]]:
        return {name: [of(part)[name] for part in parts] for name in of(parts[0])}

    rest = listed(lambda part: part.rest)
    return Drawn(listed(lambda part: part), parts[0].fisher, rest=rest, own=listed(lambda part: part.own))


def check_one(records: Mapping[str, Any] | None) -> None:
    """ValueError where records are those of several micro-batches in one array, as lax.scan, lax.map and vmap do."""
    for name, record in (records or {}).items():
        if isinstance(record, Record) and record.g.ndim > 5:
            raise ValueError(
                f"the record of layer {name!r} has g of shape {record.g.shape}, micro-batches first, as lax.scan or "
                f"vmap puts them together; need (draws, blocks, batch, shared, outputs): give records=[jax.tree.map("
                f"lambda x: x[i], records) for i in range(k)], or step inside the scan by kfaccore_jax.accumulate"
            )


def pairs(plan: Plan, data: Mapping[str, Any], g: Mapping[str, Any], n: int, spec: Any = None) -> dict[str, Pair]:
    """{layer: (a, g)} of n examples; `spec` is what axes of an explicit mesh they are spread over."""

    def made(data: Mapping[str, Any], g: Mapping[str, Any]) -> dict[str, Pair]:
        return {layer.name: pair(plan, layer, data, g, n) for layer in plan.layers}

    if explicit_mesh((data, g)) is None:
        return made(data, g)
    shapes = jax.eval_shape(lambda *args: automatic(made, PartitionSpec(), *args), data, g)
    specs = {name: _spec(shape, n, spec) for name, shape in shapes.items()}
    return automatic(made, specs, data, g)


def _spec(shapes: Pair, n: int, spec: Any) -> Any:
    """PartitionSpecs like a pair: examples are spread as the prediction's are."""

    def of(x: Any, axis: int) -> PartitionSpec:
        return PartitionSpec(*[None] * axis, spec) if x.shape[axis] == n else PartitionSpec()

    a, g = shapes
    first = jax.tree.map(lambda x: of(x, 0 if isinstance(a, Ids) else 1), a)
    return first, of(g, 2)


def pair(plan: Plan, layer: Layer, data: Mapping[str, Any], g: Mapping[str, Any], n: int) -> Pair:
    """a and g of a layer, its calls joined on the shared axis."""

    def of(key: str) -> Pair:
        call = plan.calls[key]
        own = widened(call.gradients(g[key], data.get(key), n))
        a = call.inputs(data.get(key), own, n, layer.lone)
        return _with_bias(layer, a, own.dtype), own

    found = [of(key) for key in layer.calls]
    if layer.turned:
        found = [_unit(_folded(a, own)) for a, own in found]
        found += [_unit(_folded(own, a)) for a, own in map(of, layer.turned)]
    return reduce(_joined, found)


def _folded(first: Any, second: Any) -> Pair:
    """Two sides of one call, of which either has draws in front (draws, blocks, batch, shared, d), with the draws in
    the batch: an example a draw, so that F, a sum over both, is what it was."""
    if isinstance(first, Ids):
        first = jax.nn.one_hot(first.index, first.size, dtype=second.dtype)[None]
    draws = max(x.shape[0] for x in (first, second) if x.ndim == 5)
    if draws == 0:
        raise ValueError("a tied layer needs draws: its inputs in one use are output gradients in the other")

    def fold(x: Any) -> Any:
        x = jnp.broadcast_to(x if x.ndim == 5 else x[None], (draws, *x.shape[-4:]))
        return x.transpose(1, 0, 2, 3, 4).reshape(x.shape[1], draws * x.shape[2], *x.shape[3:])

    return fold(first), fold(second)[None]


def _unit(sides: Pair) -> Pair:
    """Rows a of length 1, g scaled against them: J is the same, and the Kronecker product of both uses' rows, which is
    half of (A1 + A2) x (G1 + G2) with traces of A1 and A2 alike, has the trace of their F."""
    a, g = sides
    length = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.where(length > 0, length, 1.0), g * length


def _with_bias(layer: Layer, a: Any, dtype: Any) -> Any:
    """Inputs with the column of a bias."""
    if isinstance(a, Patches) and layer.bias is not None and layer.factor != 1.0:
        a = a.unfold()
    if isinstance(a, Ids):
        return a
    if isinstance(a, Patches):
        return Patches(jnp.asarray(a.image, dtype), a.window, layer.bias is not None)
    a = jnp.asarray(a, dtype)
    return a if layer.bias is None else jnp.concatenate([a, jnp.full_like(a[..., :1], layer.factor)], -1)


def _joined(first: Pair, second: Pair) -> Pair:
    """Two calls of one layer as more shared positions."""
    a, g = first
    b, h = second
    if isinstance(a, Ids):
        both: Any = Ids(jnp.concatenate([a.index, b.index], 1), a.size)
    else:
        a, b = (x.unfold() if isinstance(x, Patches) else x for x in (a, b))
        both = jnp.concatenate([a, b], 2)
    return both, jnp.concatenate([g, h], 3)


def widened(x: Any) -> Any:
    """Half precision as float32."""
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
