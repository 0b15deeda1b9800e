"""The NumPy side of a step's capture: draws of a batch, and what they gave as records."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.bridge import to_numpy, to_tensor
from kfaccore_tensorflow.kinds import Seen
from kfaccore_tensorflow.losses import Told
from kfaccore_tensorflow.padding import untold
from kfaccore_tensorflow.places import Place, factors, suggested
from kfaccore_tensorflow.plan import Part
from kfaccore_tensorflow.rows import Batch, Given, Shape, record, seen

if TYPE_CHECKING:
    from kfaccore_tensorflow.step import Engine
    from kfaccore_tensorflow.tensors import Tensors

ASK = 2  # draws that ask whose row is whose


def drawn(engine: Engine, some: Sequence[bool], given: Sequence[Any]) -> list[Any]:
    """((n, examples, asking draws, which examples count), draws of each head) of a batch: leading axes of the inputs,
    sizes of the calls' outputs, predictions, then targets, weights and masks as far as there are `some`.

    Draws that are no samples get a random sign an example and draw: nothing changes for rows that an example owns, and
    for others the products of two examples vanish in expectation.
    """
    arrays = iter([to_numpy(x) for x in given])
    leading = next(arrays)
    sizes = next(arrays)
    heads = [next(arrays) for _ in engine.objective.names]
    rest = [next(arrays) if there else None for there in some]
    told = [Told(*rest[i :: len(heads)]) for i in range(len(heads))]
    examples = len(heads[0])
    if any(len(f) != examples for f in heads):
        shapes = {name: f.shape for name, f in zip(engine.objective.names, heads, strict=True)}
        raise ValueError(f"outputs are of {shapes}; need the same leading axis, (batch, ..., outputs)")
    rng = np.random.default_rng([engine.settings.seed, engine.state.step])
    draws = engine.objective.draws_of(engine.fisher, engine.settings.draws, heads, told, rng)
    draws = [np.asarray(v) for v in draws]
    if engine.signs and engine.fisher in (kf.type2, kf.empirical):
        signs = rng.choice([-1.0, 1.0], (len(draws[0]), examples))
        draws = [v * signs.astype(v.dtype).reshape(*signs.shape, *(1,) * (v.ndim - 2)) for v in draws]
    asked = ASK if len(draws[0]) and engine.owners.due((examples, *sizes.tolist())) else 0
    if asked:
        draws = [np.concatenate([_asking(f, examples), v]) for f, v in zip(heads, draws, strict=True)]
    _tell(engine, told, set(leading.tolist()), examples)
    present = engine.objective.present_of(heads, told)
    share = engine.objective.share_of(heads, told) if present.any() else 0.0
    count = [share, examples, asked, *([] if present.all() else present)]
    return [to_tensor(count, tf.float64), *(to_tensor(v, f.dtype) for v, f in zip(draws, heads, strict=True))]


def _tell(engine: Engine, told: Sequence[Told], leading: set[int], examples: int) -> None:
    """Warnings of a batch, once each."""
    if not engine.negative and any(one.weight is not None and one.weight.min(initial=0) < 0 for one in told):
        engine.negative = True
        warnings.warn("sample_weight is negative: the Fisher is that of its size, |sample_weight|", stacklevel=3)
    inputs = next(iter(leading), 0)
    if not engine.flat and len(leading) == 1 and 0 < inputs < examples and not examples % inputs:
        engine.flat = True
        positions = examples // inputs
        warnings.warn(
            f"the prediction has {examples} rows for {inputs} inputs, and each row is taken for an example: if they "
            f"are {positions} positions of each, return them as axes, ({inputs}, {positions}, outputs), or "
            f"sharing=kfaccore.reduce and what is by example are of positions",
            stacklevel=3,
        )


def _asking(f: np.ndarray, examples: int) -> np.ndarray:
    """A random draw, and the same with each example scaled."""
    v = np.random.default_rng(f.shape).standard_normal(f.shape).astype(f.dtype)
    return np.stack([v, v * factors(examples).astype(f.dtype).reshape(-1, *(1,) * (f.ndim - 1))])


@dataclass(frozen=True)
class Taken:
    """Records of the draws, and of the loss's own gradients where a rule has a use for them."""

    drawn: dict[str, kf.Record]
    own: dict[str, kf.Record]


def recorded(engine: Engine, tensors: Tensors, arrays: Sequence[np.ndarray], exact: bool = False) -> Taken | None:
    """{part: Record} from what `gathered` gave; None where the clock wanted no records.

    exact   rows that mix examples make one example, so that `dense` has the right mean; else they stand as their sizes
            suggest

    Parts whose rows mix examples, that are read whole, or whose inputs are drawn (a tied table) have no own gradients
    by example.
    """
    batch = _Batch.of(tensors, arrays)
    if batch.n <= 0:
        return None
    if batch.asked:
        look(engine, batch.given)
    taken = Taken({}, {})
    stacked = not exact and not engine.preconditioner.rule.needs_records  # which models all layers under the same draws
    for part in tensors.parts:
        if part.whole:
            taken.drawn[part.name] = _whole(batch.wholes[part.name][batch.asked :], batch.n)
            continue
        shapes = tensors.shapes[part.name]
        last = bool(tensors.own)
        apart = any(shape.turned for shape in shapes)
        rest = [one.of(slice(batch.asked, -1 if last and apart else None)) for one in batch.given[part.name]]
        where = _placed(engine, part, shapes, rest, batch.examples)
        mixes = any(place.mixes for place in where)
        if exact and mixes:
            where = [Place(None, mixes=True)] * len(where)
        both = record(part, shapes, rest, where, batch, stacked)
        taken.drawn[part.name] = both if apart or not last else replace(both, g=both.g[:-1, ...])
        if last and not mixes and not apart:
            taken.own[part.name] = replace(both, g=both.g[-1:, ...])
    _unseen(engine, batch)
    return taken


def _unseen(engine: Engine, batch: Batch) -> None:
    """Warnings of masks that leave out rows of a part, though which is not to be seen, of each part once; of padding
    that no mask tells of."""
    new = {name: mask for name, mask in batch.unseen.items() if name not in engine.unseen}
    engine.unseen |= set(new)
    for name, mask in new.items():
        warnings.warn(
            f"the Keras mask {mask} that rows of {name!r} stand under fits neither their axes nor a loop over its "
            f"steps: rows that move nothing are left out where the masked examples tell them, else padding counts. "
            f"Keep an axis, or a call, for each position of the mask",
            stacklevel=2,
        )
    names = [] if engine.padded else untold(batch.alive, batch.present)
    if names:
        engine.padded = True
        listed = f"{names[:5]}{' and others' if len(names) > 5 else ''}"
        warnings.warn(
            f"examples of {listed} move nothing from some position on, each from another, and no mask tells of it: if "
            f"that is padding, it counts in A, and directions depend on how far a batch is padded. Let a layer tell: "
            f"Embedding(mask_zero=True), Masking, mask=, attention_mask= of Keras's attention, or a layer of your own "
            f"with compute_mask",
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Batch(Batch):
    """Arrays of one forward pass: rows of the calls of each part, draws first, of which the first `asked` ask and the
    last is the loss's own where it was asked for; and gradients of the parts that are read whole."""

    asked: int
    given: dict[str, list[Seen]]
    wholes: dict[str, np.ndarray]

    @classmethod
    def of(cls, tensors: Tensors, arrays: Sequence[np.ndarray]) -> _Batch:
        flat = iter(arrays)
        count = next(flat)
        n, examples, asked = (float(x) for x in count[:3])
        present = count[3:] > 0 if len(count) > 3 else None
        masks = [next(flat) for _ in tensors.masks]
        x = [None if t is None else next(flat) for t in tensors.x]
        slopes = [[next(flat) for _ in each] for each in tensors.slopes]
        by = [None if t is None else next(flat) for t in tensors.by]
        g = [next(flat) for _ in tensors.g]
        for i, own in enumerate(flat):
            g[i] = np.concatenate([g[i], np.asarray(n, own.dtype) * own[None]])
        given: dict[str, list[Seen]] = {part.name: [] for part in tensors.parts if not part.whole}
        if n > 0:
            calls = ((part, shape) for part in tensors.parts for shape in tensors.shapes.get(part.name, ()))
            for (part, shape), operand, each, other, rows in zip(calls, x, slopes, by, g[: len(x)], strict=True):
                given[part.name].append(seen(part, shape, Given(operand, each, rows, other)))
        wholes = zip((part.name for part in tensors.parts if part.whole), g[len(x) :], strict=True)
        return cls(n, int(examples), masks, present, {}, {}, int(asked), given, dict(wholes))


def _whole(g: np.ndarray, n: float) -> kf.Record:
    g = g.reshape(len(g), 1, 1, 1, -1)
    return kf.Record(np.ones((1, 1, 1, 1), g.dtype), g, n)


def look(engine: Engine, given: dict[str, list[Seen]]) -> None:
    """Whose rows are whose, from the draws that ask; ValueError where a method needs rows of examples and has none."""
    before = set(engine.owners.ragged)
    engine.owners.look(given)
    new = sorted(engine.owners.ragged - before)
    if new:
        warnings.warn(
            f"rows of {new} are each of one example in an order that no axis tells, as of ragged groups: they are "
            f"taken together, which is right under sharing=kfaccore.expand and not under reduce; pad them to an axis "
            f"of positions instead",
            stacklevel=2,
        )
    if engine.mixing and kf.own_gradients(engine.preconditioner):
        raise ValueError(
            f"rows of {engine.mixing} mix examples or are shared by them, so per-example gradients, which "
            f"{engine.settings.method} is made of, do not exist there: give those parts another method, or freeze them"
        )


def _placed(
    engine: Engine, part: Part, shapes: Sequence[Shape], given: Sequence[Seen], examples: int
) -> Sequence[Place]:
    """The places found, where as many calls are there as were then; else what sizes suggest.

    A rule that judges steps by its model of them is given rows an example even where each moves all examples, as before
    a BatchNormalization of few values: as one example they would be one sample of the curvature, and flat along some
    mixture of two directions. What all examples share stays one.
    """
    models = engine.preconditioner.rule.needs_records
    known = engine.owners.places.get(part.name, [])
    found = []
    for i, one in enumerate(given):
        likely = next(suggested(one.rows, examples), Place(None, mixes=True))
        place = known[i] if len(known) == len(given) else known[0] if known and len(set(known)) == 1 else likely
        apart = models and place.axis is None and shapes[i].of_inputs
        if apart or not place.fits(one.rows, examples):
            place = replace(likely, mixes=place.mixes or likely.mixes)
        found.append(place)
    return found
