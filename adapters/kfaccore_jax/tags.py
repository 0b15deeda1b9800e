"""What is known of an array that came from a parameter, and how it moves through operations on whole axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import Literal

from kfaccore_jax.layout import Axis, Layout


@dataclass(frozen=True)
class Param:
    """A value that is `factor * scale` times elements of a leaf; `stack` are the axes that scans went over,
    (depth, size, stride); scale is a traced number.

    place, by   where the value was multiplied by an array `by` of its own shape, as a mask or the inverse deviation of
                BatchNorm is: a product to come may take it along, what else comes sees a call of that place; or where
                an array of its own shape was added, and `by` is None
    """

    leaf: int
    layout: Layout
    stack: tuple[tuple[int, int, int], ...] = ()
    factor: float = 1.0
    scale: Any = None
    place: str = ""
    by: Any = None

    def times(self, factor: float = 1.0, scale: Any = None) -> Param:
        scale = scale if self.scale is None else self.scale if scale is None else self.scale * scale
        return replace(self, factor=self.factor * factor, scale=scale)

    def row(self, depth: int) -> Param:
        """Of what a scan at that depth takes its turns over, as it is in one turn."""
        (n, s), *_ = self.layout.axes
        return replace(self, layout=self.layout.squeeze((0,)), stack=(*self.stack, (depth, n, s)))

    @property
    def depths(self) -> tuple[int, ...]:
        """Which scans stacked the leaf."""
        return tuple(depth for depth, _, _ in self.stack)

    @property
    def blocks(self) -> tuple[Axis, ...]:
        """(size, stride) of the stacked axes."""
        return tuple((n, s) for _, n, s in self.stack)


@dataclass(frozen=True)
class Out:
    """A value that is the output of call `key`, its elements laid out from that output's own row-major order."""

    key: str
    layout: Layout


@dataclass(frozen=True)
class Joined:
    """Values of several leaves, one behind the other along `axis`; each with its tag."""

    axis: int
    values: tuple[Any, ...]
    tags: tuple[Param, ...]

    @property
    def sizes(self) -> list[int]:
        """Lengths of the parts along the joined axis."""
        return [int(x.shape[self.axis]) for x in self.values]


@dataclass(frozen=True)
class Lifted:
    """A value that came from the calls `keys`, made once for all examples, and `each` what it is for each of them."""

    keys: frozenset[str]
    each: Any


Tag = Param | Out | Joined | Lifted | None
JITS = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}
REMATS = {"checkpoint", "remat", "remat2"}
PLACED = {"pvary", "pcast", "reshard", "mesh_cast", "sharding_constraint"}  # say where an array lies, not what it is
SAME = {"convert_element_type", "copy", "copy_p", "reduce_precision", "name", "optimization_barrier"} | PLACED


def arrays_in(tag: Tag) -> Any:
    """The arrays that a tag holds, a tree."""
    if isinstance(tag, Joined):
        return tag.values, [arrays_in(one) for one in tag.tags]
    return (tag.scale, tag.by) if isinstance(tag, Param) else None


def with_arrays(tag: Tag, arrays: Any) -> Tag:
    """The tag with these arrays in place of its own, as they are outside the trace that it was made in."""
    if isinstance(tag, Joined):
        return replace(tag, values=arrays[0], tags=tuple(map(with_arrays, tag.tags, arrays[1])))
    return replace(tag, scale=arrays[0], by=arrays[1]) if isinstance(tag, Param) else tag


def moved(eqn: Any, tag: Param | Out) -> list[Tag] | None:
    """Tags of the outputs of an equation that only moves or selects elements, else None."""
    name = eqn.primitive.name
    p = eqn.params
    if isinstance(tag, Param) and tag.by is not None and name not in SAME:
        return None
    layout = tag.layout
    shape = tuple(eqn.outvars[0].aval.shape)
    if name in SAME and len(eqn.outvars) == 1:
        new = layout
    elif name == "reshape" and p.get("dimensions") is None:
        new = layout.reshape(shape)
    elif name == "transpose":
        new = layout.transpose(tuple(p["permutation"]))
    elif name == "squeeze":
        new = layout.squeeze(tuple(p["dimensions"]))
    elif name == "broadcast_in_dim":
        new = layout.broadcast(shape, tuple(p["broadcast_dimensions"]))
    elif isinstance(tag, Out):
        return None
    elif name == "tile":
        new = _tiled(layout, shape)
    elif name == "slice":
        new = layout.slice(p["start_indices"], p["limit_indices"], p["strides"])
    elif name == "dynamic_slice" and all(isinstance(v, Literal) for v in eqn.invars[1:]):
        sizes = zip(layout.shape, p["slice_sizes"], strict=True)
        start = tuple(min(max(int(v.val), 0), n - k) for v, (n, k) in zip(eqn.invars[1:], sizes, strict=True))
        new = layout.slice(start, tuple(i + k for i, k in zip(start, p["slice_sizes"], strict=True)))
    elif name == "split":
        return list(_split(tag, int(p["axis"]), [int(n) for n in p["sizes"]]))
    elif name == "neg":
        return [tag.times(-1.0)]
    else:
        return None
    return None if new is None else [replace(tag, layout=new)]


def _tiled(layout: Layout, shape: tuple[int, ...]) -> Layout | None:
    """Axes of one element repeated; None where longer ones are."""
    before = (1,) * (len(shape) - len(layout.shape)) + layout.shape
    return layout.stretch(shape) if all(n in (1, m) for n, m in zip(before, shape, strict=True)) else None


def _split(tag: Param, axis: int, sizes: list[int]):
    start = 0
    for n in sizes:
        low = tuple(start if i == axis else 0 for i in range(len(tag.layout.shape)))
        high = tuple(start + n if i == axis else k for i, k in enumerate(tag.layout.shape))
        yield replace(tag, layout=tag.layout.slice(low, high))
        start += n


def scaled(eqn: Any, tag: Param, place: int, other: Any) -> Param | None:
    """The tag of a leaf times, over or plus one number that is no leaf, else None."""
    name = eqn.primitive.name
    number = eqn.invars[1 - place]
    if tag.by is not None or number.aval.ndim or tuple(eqn.outvars[0].aval.shape) != tag.layout.shape:
        return None
    if name in ("add", "add_any") or (name == "sub" and place == 0):
        return tag
    if name == "sub":
        return tag.times(-1.0)
    value = float(number.val) if isinstance(number, Literal) else None
    if name == "div" and place == 0:
        return tag.times(1 / value) if value else tag.times(scale=1 / other.reshape(()))
    if name == "mul":
        return tag.times(scale=other.reshape(())) if value is None else tag.times(value)
    return None
