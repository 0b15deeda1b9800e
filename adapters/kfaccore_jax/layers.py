"""From captured calls to layers: which calls make one matrix, which leaves have none, and leaf <-> matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from kfaccore import Block
from kfaccore_jax.calls import Call
from kfaccore_jax.layout import Axis, Layout, merged, put, take
from kfaccore_jax.names import named


@dataclass(frozen=True)
class Part:
    """Elements of a leaf as columns of a matrix: axes of blocks, d_out, columns."""

    leaf: str
    blocks: tuple[Axis, ...]
    outs: tuple[Axis, ...]
    ins: tuple[Axis, ...]
    offset: int

    @property
    def layout(self) -> Layout:
        """Axes of blocks, outputs and inputs in the leaf."""
        return Layout.from_axes((*self.blocks, *self.outs, *self.ins), self.offset)

    @property
    def shape(self) -> tuple[int, int, int]:
        b, o, i = (prod(n for n, _ in axes) for axes in (self.blocks, self.outs, self.ins))
        return b, o, i

    @property
    def key(self) -> tuple:
        """Equal for equal arrangements of the same elements."""
        return self.leaf, *(merged(axes) for axes in (self.blocks, self.outs, self.ins)), self.offset


@dataclass(frozen=True)
class Layer:
    """name, the calls that share its matrix (lone: only their bias is meant), its parts, weight first.

    turned   calls that use the matrix transposed: a tied embedding and output layer
    common   all examples share its rows: its record has a batch of one, whose g is the sum over examples
    mixed    outputs of other examples depend on its rows
    """

    name: str
    kind: str
    calls: tuple[str, ...]
    weight: Part
    bias: Part | None
    lone: bool
    factor: float
    diagonal: bool
    turned: tuple[str, ...] = ()
    common: bool = False
    mixed: bool = False

    @property
    def own(self) -> bool:
        """Whether each row of its record is one example's."""
        return not (self.common or self.turned or self.mixed)

    @property
    def block(self) -> Block:
        """Sizes for the core; the bias is a column."""
        blocks, d_out, d_in = self.weight.shape
        return Block(d_out, d_in + (self.bias is not None), blocks, self.diagonal)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, leaves: Mapping[str, Any]) -> Any:
        """(blocks, d_out, d_in) from {path: leaf}, the bias a last column."""
        w = take(leaves[self.weight.leaf], self.weight.layout, self.weight.shape)
        if self.bias is None:
            return w
        b = take(leaves[self.bias.leaf], self.bias.layout, self.bias.shape)
        return jnp.concatenate([w, b.astype(w.dtype)], axis=-1)

    def scatter(self, leaves: Mapping[str, Any], matrix: Any) -> dict[str, Any]:
        """`leaves` with this layer's elements replaced by those of `matrix`."""
        d_in = self.weight.shape[2]
        found = dict(leaves)
        found[self.weight.leaf] = put(found[self.weight.leaf], self.weight.layout, matrix[..., :d_in])
        if self.bias is not None:
            found[self.bias.leaf] = put(found[self.bias.leaf], self.bias.layout, matrix[..., d_in:])
        return found


def gathered(params: Any, calls: dict[str, Call], refused: dict[int, list[str]]) -> tuple[tuple[Layer, ...], list]:
    """The layers, and a row (leaf, shape, kind, reason, note) for each leaf; `refused` says why leaves cannot be."""
    leaves = named(params)
    names = list(leaves)
    bad = {names[leaf]: list(why) for leaf, why in refused.items()}
    groups = _groups(calls, names)
    by_leaf: dict[str, list[tuple]] = {name: [] for name in names}
    for key in groups:
        by_leaf[key[1]].append(key)
    turned = {}
    for name, keys in by_leaf.items():
        pair = _turned(keys, groups) if name not in bad else None
        if pair:
            turned[pair[0]] = groups.pop(pair[1])
            keys.remove(pair[1])
        if name not in bad and (why := _overlap(keys, groups, leaves[name])):
            bad[name] = [why]
    layers = tuple(_layers(groups, calls, bad, turned))
    owners: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        for part in layer.parts:
            owners.setdefault(part.leaf, {})[layer.name] = layer
    return layers, [
        _row(name, leaf, list(owners.get(name, {}).values()), bad.get(name)) for name, leaf in leaves.items()
    ]


Groups = dict[tuple, list[tuple[str, Part, float]]]


def _groups(calls: dict[str, Call], names: list[str]) -> Groups:
    """Uses of leaves by (family, leaf, arrangement): each a call, the part it uses, and the factor of a bias."""
    groups: Groups = {}
    for key, call in calls.items():
        family = "embedding" if call.kind in ("bias", "scale") and call.ins else call.kind
        part = Part(names[call.leaf], call.blocks, call.outs, call.ins, call.offset)
        common = call.batch is None
        groups.setdefault((family, *part.key, part.shape, common), []).append((key, part, 1.0))
        if call.bias:
            b = call.bias
            part = Part(names[b.leaf], b.blocks, b.outs, (), b.offset)
            groups.setdefault(("bias", *part.key, part.shape, common), []).append((key, part, b.factor))
    return groups


def _turned(keys: list[tuple], groups: Groups) -> tuple[tuple, tuple] | None:
    """Two groups, the first of which uses the whole leaf as the other uses its transpose; an embedding comes first."""
    if len(keys) != 2 or {key[0] for key in keys} - {"dense", "embedding"}:
        return None
    first, second = sorted(keys, key=lambda key: key[0] != "embedding")
    one = groups[first][0][1]
    other = groups[second][0][1]
    swapped = (merged(one.outs), merged(one.ins)) == (merged(other.ins), merged(other.outs))
    plain = one.shape[0] == other.shape[0] == 1 and one.offset == other.offset and not (first[-1] or second[-1])
    return (first, second) if swapped and plain and second[0] == "dense" else None


def _overlap(keys: list[tuple], groups: Groups, leaf: Any) -> str:
    """Why a leaf's uses cannot each have a matrix, "" if they can: boxes of the leaf, disjoint or equal."""
    size = prod(leaf.shape)
    hit = np.zeros(size, bool) if len(keys) > 1 else None
    for key in keys:
        found = groups[key][0][1].layout.region(size)
        if found is None:
            return "elements used that are no box of the leaf"
        if hit is not None:
            box = hit.reshape(found[0])
            if box[found[1]].any():
                kinds = sorted({k[0] for k in keys})
                if len({k[-1] for k in keys}) > 1:
                    return f"{' and '.join(kinds)} on rows of examples and on rows that all of them share"
                return f"used as {' and '.join(kinds)}" if len(kinds) > 1 else f"{kinds[0]} in two arrangements"
            box[found[1]] = True  # a leaf of one element has no slice in its index
    return ""


def _layers(groups: Groups, calls: dict[str, Call], bad: dict, turned: dict):
    """Weights first, with the bias that goes with all their calls and with no other; then biases left over."""
    found = []
    taken = set()
    for key, uses in groups.items():
        if key[1] in bad or (key[0] == "bias" and any(calls[k].kind != "bias" for k, _, _ in uses)):
            continue
        partner = None if key in turned else _partner(uses, groups, calls, bad)
        taken |= {key, partner}
        found.append((key, uses, groups[partner][0] if partner else None, False))
    left = [(key, uses, None, True) for key, uses in groups.items() if key not in taken and key[1] not in bad]
    several = Counter(key[1] for key, *_ in found + left)
    for key, uses, bias, lone in found + left:
        layer = _layer(key, uses, bias, several[key[1]] > 1, calls, lone)
        joins = tuple(k for k, _, _ in turned.get(key, ()))
        mixed = any(calls[k].mixed for k in (*layer.calls, *joins))
        yield replace(layer, turned=joins, common=bool(key[-1]), mixed=mixed)


def _partner(uses: list, groups: Groups, calls: dict[str, Call], bad: dict) -> tuple | None:
    """The bias group whose uses are exactly these calls with one factor."""
    wanted = {key for key, _, _ in uses}
    if any(calls[key].kind not in ("dense", "conv") for key in wanted):
        return None
    for key, found in groups.items():
        same = {k for k, _, _ in found} == wanted and len({f for _, _, f in found}) == 1
        if key[0] == "bias" and key[1] not in bad and same and found is not uses:
            return key if all(calls[k].bias for k in wanted) else None
    return None


def _layer(key: tuple, uses: list, bias: tuple | None, several: bool, calls: dict[str, Call], lone: bool) -> Layer:
    part = uses[0][1]
    name = part.leaf if not several else f"{part.leaf}[{_span(part.layout)}]"
    kind = "bias" if lone else calls[uses[0][0]].kind
    factor = bias[2] if bias else uses[0][2]
    keys = tuple(k for k, _, _ in uses)
    return Layer(name, kind, keys, part, bias[1] if bias else None, lone, factor, key[0] == "embedding")


def _span(layout: Layout) -> str:
    """First and last element of a part, which tells parts of one leaf apart."""
    last = layout.offset + sum((n - 1) * s for n, s in layout.axes)
    return f"{layout.offset}:{last + 1}"


def _row(name: str, leaf: Any, layers: list[Layer], why: list[str] | None) -> tuple[str, tuple, str, str, str]:
    shape = tuple(leaf.shape)
    if why:
        reason = f"goes into: {', '.join(dict.fromkeys(why))}"
        return name, shape, "", reason, reason
    if not layers:
        kind = "never used" if jnp.issubdtype(leaf.dtype, jnp.floating) else f"dtype {leaf.dtype}"
        kind = "no elements" if 0 in shape else kind
        return name, shape, "", kind, kind
    kinds = ", ".join(dict.fromkeys("bias" if _own(layer, name) else layer.kind for layer in layers))
    seen = sum(prod(part.shape) for layer in layers for part in layer.parts if part.leaf == name)
    count = sum(len(layer.calls) + len(layer.turned) for layer in layers)
    notes = [f"{count} call{'s' if count > 1 else ''}"]
    with_bias = [layer for layer in layers if layer.weight.leaf == name and layer.bias]
    notes += [f"with bias {with_bias[0].bias.leaf}"] if with_bias and with_bias[0].bias else []
    notes += [f"of {next(layer.weight.leaf for layer in layers)}"] if all(_own(layer, name) for layer in layers) else []
    notes += ["tied, used transposed too"] if any(layer.turned for layer in layers) else []
    notes += ["rows that all examples share"] if any(layer.common for layer in layers) else []
    notes += ["rows that mix examples"] if any(layer.mixed for layer in layers) else []
    notes += [f"{layers[0].block.blocks} blocks"] if layers[0].block.blocks > 1 else []
    notes += [f"{seen} of {prod(shape)} elements, the rest never used"] if seen < prod(shape) else []
    return name, shape, kinds, "", ", ".join(notes)


def _own(layer: Layer, name: str) -> bool:
    return layer.bias is not None and layer.bias.leaf == name and layer.weight.leaf != name
