"""In the graph: what a step hands to the core, of each call the other operand and the output's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from kfaccore_tensorflow import draw
from kfaccore_tensorflow.bridge import HALF, widened
from kfaccore_tensorflow.capture import Scopes
from kfaccore_tensorflow.given import examples
from kfaccore_tensorflow.losses import mask_of
from kfaccore_tensorflow.observe import Call, Observed
from kfaccore_tensorflow.plan import Part
from kfaccore_tensorflow.rows import Shape
from kfaccore_tensorflow.within import Masks, noted

if TYPE_CHECKING:
    from kfaccore_tensorflow.step import Engine

Tensor = Any


@dataclass(frozen=True)
class Tensors:
    """All tensors of one forward pass, and what is known of them while tracing.

    parts     the parts it went through; `shapes` of their calls in turn
    count     (n, examples, draws that ask whose row is whose), then which examples count, unless all do
    x         a call each, or None; `slopes` of each call's factors; `by` what multiplies each call's weight, or None
    g         a call each, draws first; then a variable each of parts without records
    own       a call each, the gradients of the loss itself, or none
    """

    parts: tuple[Part, ...]
    shapes: dict[str, tuple[Shape, ...]]
    count: Tensor
    masks: list[Tensor]
    x: list[Tensor | None]
    slopes: list[list[Tensor]]
    by: list[Tensor | None]
    g: list[Tensor]
    own: list[Tensor]

    def flat(self) -> list[Tensor]:
        """Those there are, in order."""
        some = [x for x in self.x if x is not None]
        some += [slope for slopes in self.slopes for slope in slopes]
        some += [by for by in self.by if by is not None]
        return [self.count, *self.masks, *some, *self.g, *self.own]


@dataclass(frozen=True)
class Pass:
    """One forward pass, made inside the persistent `tape`, and what it is trained on.

    heads    predictions by output; `target`, and sample `weight` or None, as the objective takes them
    loss     of the batch, penalty included; None where nothing is trained
    own      {id of a call's output: the gradient of the loss there}
    """

    seen: Observed
    heads: dict[str, Tensor]
    tape: Any
    target: Any
    weight: Any
    loss: Tensor | None = None
    own: dict[int, Tensor] = field(default_factory=dict)


def gathered(engine: Engine, parts: Sequence[Part], given: Pass) -> Tensors:
    """Output gradients of all calls of `parts` under the draws of this step, zeros where the clock wants none."""
    seen = given.seen
    parts = tuple(part for part in parts if part.whole or seen.calls.get(part.name))
    masks: Masks = {}
    shapes = {part.name: _shapes(seen.calls[part.name], seen.scopes, masks) for part in parts if not part.whole}
    calls = [call for part in parts if not part.whole for call in seen.calls[part.name]]
    outputs = [call.use.out for call in calls]
    half = [p.name for p in parts if any(c.use.out.dtype == tf.float16 for c in seen.calls.get(p.name, ()))]
    if half:
        raise ValueError(f"parts {half[:5]} are float16, whose gradients underflow: use the policy mixed_bfloat16")
    slopes = [_slopes(call) for call in calls]
    wholes = [part.variables["weight"] for part in parts if part.whole]
    count, g = _gradients(engine, given, [*outputs, *(v.value for v in wholes)])
    x = [None if call.use.x is None else widened(call.use.x) for call in calls]
    by = [None if call.use.by is None else widened(call.use.by) for call in calls]
    own = [given.own[id(out)] for out in outputs] if given.own else []
    return Tensors(parts, shapes, count, [mask for _, mask in masks.values()], x, slopes, by, g, own)


def wanted_own(engine: Engine, seen: Observed) -> list[Tensor]:
    """Outputs of calls where the gradient of the loss itself is of use to the step's rule."""
    if not engine.preconditioner.rule.wants_own or engine.objective.drawless(engine.fisher):
        return []
    return [call.use.out for part in engine.plan.parts for call in seen.calls.get(part.name, ())]


def _slopes(call: Call) -> list[Tensor]:
    """Of all factors by which a weight was changed on its way."""
    if not call.use.hot.changed:
        return []
    return [widened(factor.slope()) for path in call.use.hot.paths for factor in path]


def _shapes(calls: Sequence[Call], scopes: Scopes, masks: Masks) -> tuple[Shape, ...]:
    """What is known of the calls of one part, their masks noted."""
    found = []
    for call, within in zip(calls, noted(calls, scopes, masks), strict=True):
        together = call.scopes[0].start if call.scopes else -1
        hot = call.use.hot
        paths = tuple(tuple(factor.layout for factor in path) for path in hot.paths) if hot.changed else ()
        found.append(Shape(call.use.kind, call.turned, paths, within, together, call.of_inputs))
    return tuple(found)


def _gradients(engine: Engine, given: Pass, sources: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """`count` of Tensors, and gradients of each source under each draw."""
    values = list(given.heads.values())
    counts = {name: f.shape[0] for name, f in given.heads.items()}
    if len({size for size in counts.values() if size is not None}) > 1:
        raise ValueError(
            f"outputs have {counts} examples; need the same leading axis, (batch, ..., outputs): an output of each "
            f"position keeps its positions as an axis of its own"
        )
    kinds = [tf.float32 if f.dtype in HALF else f.dtype for f in values]
    targets = engine.objective.by_head(given.target, given.heads)
    weights = engine.objective.by_head(given.weight, given.heads)
    told = [*targets, *weights, *map(mask_of, values)]
    present = [x for x in told if x is not None]
    some = tuple(x is not None for x in told)

    def one(drawn: Sequence[Tensor]) -> list[Tensor]:
        cast = [tf.cast(v, f.dtype) for v, f in zip(drawn, values, strict=True)]
        found = given.tape.gradient(values, sources, output_gradients=cast)
        return [widened(tf.zeros_like(o) if g is None else g) for o, g in zip(sources, found, strict=True)]

    def wanted() -> list[Tensor]:
        ask = lambda *arrays: draw.drawn(engine, some, list(arrays))  # noqa: E731
        sizes = tf.concat([tf.shape(out) for out in sources], 0)
        leading = [examples(t) for t in given.seen.inputs if t.shape.rank]
        leading = tf.concat(leading, 0) if leading else tf.zeros(0, tf.int32)
        count, *drawn = tf.py_function(ask, [leading, sizes, *map(widened, values), *present], [tf.float64, *kinds])
        count = tf.ensure_shape(count, (None,))
        drawn = [tf.ensure_shape(v, (None, *f.shape)) for v, f in zip(drawn, values, strict=True)]
        signature = [tf.TensorSpec(o.shape, tf.float32 if o.dtype in HALF else o.dtype) for o in sources]
        if engine.objective.drawless(engine.fisher):
            return [count, *_none(sources)]
        return [count, *tf.map_fn(one, drawn, fn_output_signature=signature, parallel_iterations=1)]

    count, *g = _on_the_clock(engine, values[0], wanted, lambda: [tf.zeros(3, tf.float64), *_none(sources)])
    return count, g


def _none(sources: Sequence[Tensor]) -> list[Tensor]:
    """No draws of each."""
    kinds = [tf.float32 if o.dtype in HALF else o.dtype for o in sources]
    return [tf.zeros(tf.concat([[0], tf.shape(o)], 0), kind) for o, kind in zip(sources, kinds, strict=True)]


def _on_the_clock(engine: Engine, f: Tensor, wanted: Callable, unwanted: Callable) -> list[Tensor]:
    if engine.settings.clocks.update == 1:
        return wanted()
    one = tf.reshape(f, [-1])[:1]  # orders the question behind the step before, in graphs of several steps
    due = tf.py_function(lambda _: engine.preconditioner.wants_records(engine.state), [one], tf.bool)
    return tf.cond(tf.ensure_shape(due, ()), wanted, unwanted)
