"""Stacks: layers of equal method and sizes as the blocks of one state, and the dict of layers that hides them.

What is stacked is decided once, at `init`. Where operations are launched or traced, every layer that has an equal; on
NumPy the small ones, whose Python costs more than the copy of a gradient into the stack. Layers that different ranks
solve for are never of one stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import array_api_compat as aac

from kfaccore import tree
from kfaccore.method import Block, Method, State
from kfaccore.precondition.given import named
from kfaccore.xp.arrays import Array, device_of, is_numpy, namespace
from kfaccore.xp.blocks import together

SMALL = 1 << 15  # numbers of a layer's factors and gradient under which NumPy's copies cost less than its Python
Tree = TypeVar("Tree")
Names = tuple[str, ...]
Stacks = tuple[Names, ...]


@dataclass(frozen=True, eq=False)
class Layers(Mapping[str, State]):
    """{layer: state} whose states are kept by stack; one that is asked for is cut out of its stack.

    stacks   the layers of each state, in the order of its blocks
    order    all of them, as `init` was told
    """

    states: tuple[Any, ...]
    stacks: tuple[tuple[str, ...], ...] = tree.static(default=())
    order: tuple[str, ...] = tree.static(default=())

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Which stack a layer is in and where it stands there, looked up once for all."""
        return {name: (i, k) for i, names in enumerate(self.stacks) for k, name in enumerate(names)}

    def __getitem__(self, name: str) -> State:
        i, k = self.places[name]
        count = len(self.stacks[i])
        return self.states[i] if count == 1 else tree.map(lambda x: _cut(x, k, count), self.states[i])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def rebuilt(self, new: Mapping[str, State]) -> Mapping[str, State]:
        """The same stacks of other states; a dict where what came has no blocks to stack."""
        blocked = all(aac.is_array_api_obj(leaf) and leaf.ndim for leaf in tree.leaves(new))
        return restacked(new, self.stacks) if blocked else dict(new)


def restacked(layers: Mapping[str, State], stacks: Stacks) -> Layers:
    """States one a layer, as stacks; those that are stacked so already are handed on."""
    if isinstance(layers, Layers) and layers.stacks == stacks:
        return layers
    states = tuple(merged([layers[name] for name in names]) for names in stacks)
    return Layers(states, stacks, tuple(layers))


def stacks_of(
    methods: Mapping[str, Method],
    blocks: Mapping[str, Block],
    work: Mapping[str, tuple[int, ...]],
    like: Array,
    wanted: bool | None,
) -> Stacks:
    """Which layers share a state. blocks and work (the ranks of each layer) as in `placement`; `wanted` None: by cost,
    True: all that can, False: none."""
    groups: dict[Any, list[str]] = {}
    for name, method in methods.items():
        block = blocks[name]
        joins = wanted or (wanted is None and (not is_numpy(like) or _numbers(block) <= SMALL))
        groups.setdefault((method, block, work[name]) if joins else name, []).append(name)
    return tuple(tuple(names) for names in groups.values())


def started(methods: Mapping[str, Method], blocks: Mapping[str, Block], stacks: Sequence[Names], like: Array) -> Layers:
    """The state of each stack: that of one layer, as often as there are layers, so that all start as one alone does."""
    states = []
    for names in stacks:
        first = names[0]
        with named(first):
            one = methods[first].init(blocks[first], like)
        states.append(merged([one] * len(names)))
    return Layers(tuple(states), tuple(stacks), tuple(methods))


def _numbers(block: Block) -> int:
    """Of a layer's factors and gradient."""
    side_in = block.d_in if block.diagonal_in else block.d_in**2
    side_out = block.d_out if block.diagonal_out else block.d_out**2
    return block.blocks * (side_in + side_out + block.d_in * block.d_out)


def merged(trees: Sequence[Tree]) -> Tree:
    """States or Stats of layers as one: blocks joined, along the second axis in fields that their class lists in
    `DRAWS_FIRST`; numbers that all share are kept."""
    if len(trees) == 1:
        return trees[0]
    axes = iter(tree.marks(trees[0], "DRAWS_FIRST"))
    likes = [next((x for x in tree.leaves(one) if not _numeric(x)), None) for one in trees]

    def joined(*leaves: Any) -> Any:
        axis = int(next(axes))
        if any(_numeric(x) for x in leaves):
            alike = all(isinstance(x, int | float) for x in leaves) and len(set(leaves)) == 1
            return leaves[0] if alike else _numbers_of(leaves, likes)
        return together(leaves, axis)

    return tree.map(joined, *trees)


def _numeric(x: Any) -> bool:
    """Whether a leaf is a number of all blocks: what a trace or a tree of arrays was handed as one is an array ()."""
    return isinstance(x, int | float) or x.ndim == 0


def _numbers_of(leaves: Sequence[Any], likes: Sequence[Any]) -> Array:
    """Numbers, or arrays () and (blocks,), one a layer, as (all blocks,), with the blocks of each layer's array in
    `likes`: nothing is copied from the host."""
    like = likes[0]
    xp = namespace(like)
    where = {"dtype": like.dtype, "device": device_of(like)}
    pieces = []
    paired = zip(leaves, likes, strict=True)
    for number, run in groupby(paired, lambda pair: pair[0] if isinstance(pair[0], int | float) else None):
        same = list(run)
        if number is None:
            pieces += [x + xp.zeros((own.shape[0],), **where) for x, own in same]
        else:
            pieces.append(xp.full((sum(own.shape[0] for _, own in same),), number, **where))
    return together(pieces)


def mergeable(trees: Sequence[object]) -> bool:
    """Whether all leaves of several trees have one shape and dtype, or are numbers."""
    outlines = {tuple(_outline(x) for x in tree.leaves(one) if not _numeric(x)) for one in trees}
    return len(outlines) == 1


def _outline(x: Any) -> object:
    return (tuple(x.shape), x.dtype)


def part(state: Tree, whole: Names, names: Sequence[str]) -> Tree:
    """The blocks of some layers of a stack, in the order of `names`."""
    if tuple(names) == whole:
        return state
    place = whole.index if len(names) == 1 else {name: i for i, name in enumerate(whole)}.__getitem__
    places = [place(name) for name in names]
    if places == list(range(places[0], places[0] + len(places))):  # side by side: a view
        return tree.map(lambda x: _cut(x, places[0], len(whole), len(places)), state)
    return tree.map(lambda x: together([_cut(x, i, len(whole)) for i in places]), state)


def put(state: Tree, whole: Names, names: Sequence[str], new: Tree) -> Tree:
    """`state` with the blocks of the layers `names` replaced by those of `new`."""
    if tuple(names) == whole:
        return new
    at = {name: i for i, name in enumerate(names)}

    def mixed(old: Array, fresh: Array) -> Array:
        cuts = [
            _cut(fresh, at[name], len(names)) if name in at else _cut(old, i, len(whole))
            for i, name in enumerate(whole)
        ]
        return together(cuts)

    return tree.map(mixed, state, new)


def cut_out(stats: Tree, place: int, count: int) -> Tree:
    """The Stats of one of `count` layers from those of all; numbers are of each."""
    return tree.map(lambda x: x if _numeric(x) else _cut(x, place, count), stats)


def _cut(x: Array, place: int, count: int, many: int = 1) -> Array:
    """The blocks of one of `count` layers, or of as `many` from there on."""
    each = x.shape[0] // count
    return x[place * each : (place + many) * each, ...]
