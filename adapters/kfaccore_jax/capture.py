"""One forward with zero probes: predictions, gradients, and records of any draws, inside or outside jit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Factored, Ids, Patches, Record
from kfaccore_jax.agreement import check_calls, of_other_number, probed
from kfaccore_jax.batch import examples, strong
from kfaccore_jax.evaluate import evaluated
from kfaccore_jax.mesh import Shape, differing, spread, zeros
from kfaccore_jax.names import check_arrays, named
from kfaccore_jax.plan import Plan
from kfaccore_jax.positions import Longer, marks, masks_of
from kfaccore_jax.records import Drawn, Pair, pairs, widened
from kfaccore_jax.signs import independent, signed

Pull = Callable[[Any], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Captured:
    """A prediction and its pullback; lives within one trace.

    prediction, aux   what apply gave
    """

    plan: Plan
    prediction: Any
    aux: Any
    params: Any
    _pull: Any
    _data: dict[str, Any]
    _shapes: dict[str, Shape]
    _n: int
    _args: tuple

    def gradients(self, cotangent: Any) -> Any:
        """The gradient, a tree like params, of <cotangent, prediction>: pass the mean loss's gradient in it."""
        return self._pull(cotangent)[0]

    def output_gradients(self, draws: Any, one_by_one: bool = False) -> dict[str, Any]:
        """{call: gradients of its output} for draws (draws, *prediction.shape): no parameter gradient is formed.

        one_by_one   a loop over draws instead of vmap: less memory, and what JAX needs for grouped convolutions of
                     arrays that are spread over devices
        """
        return self._pulled(draws, one_by_one)[1]

    def _pulled(self, draws: Any, one_by_one: bool) -> tuple[Any, dict[str, Any]]:
        """Gradients of params and of the outputs of calls, draws first."""
        count = jax.tree.leaves(draws)[0].shape[0]
        if count == 0:
            none = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), self.params)
            return none, {key: jnp.zeros((0, *y.shape), y.dtype) for key, y in self._shapes.items()}
        if count == 1:
            found = self._pull(jax.tree.map(lambda draw: draw[0], draws))
            return jax.tree.map(lambda x: x[None], found)
        over = jax.lax.map if one_by_one else lambda f, xs: jax.vmap(f)(xs)
        return over(self._pull, draws)

    def records(
        self,
        draws: Any,
        n: Any,
        ids: Any = None,
        one_by_one: bool = False,
        fisher: Callable | None = None,
        mask: Any = None,
        cotangent: Any = None,
    ) -> Drawn:
        """{layer: Record} for draws of per-example losses (type2, monte_carlo, empirical, forward_only).

        n        the loss normaliser: the batch size for a mean over examples, the positions that count for a mean over
                 positions
        fisher   kfaccore's function that made the draws, so that a step which cannot use them says so
        mask     (batch, *positions), True or 1 where a position exists: padding then enters no factor. Which rows of a
                 layer it means is seen from the model at another length; where that cannot be, or positions of several
                 arrays do not go together, a source's and a target's, give {layer: (batch, rows)}.
                 The loss's own mask is the draws' matter: type2(loss, f, mask=mask)
        cotangent   of the mean loss, as `gradients` takes it: SelfTuning() then leaves each example out of the model of
                 the direction it helped to make; under jit the pass is shared with `gradients`
        """
        args = [self._args[i] for i in self.plan.batched]
        draws, free = independent(draws, self.prediction, args, self._n, fisher)
        floats, g = self._pulled(draws, one_by_one)
        rest: dict[str, Record] = {}
        if self.plan.shared:
            apart = g
            if not free:
                floats, apart = self._pulled(signed(draws, self.prediction, args, self._n), one_by_one)
            g |= {key: apart[key] for key, call in self.plan.calls.items() if call.batch is None or call.mixed}
            rest = self._rest(floats, n)
        found = self._pairs(g)
        alone = {layer.name for layer in self.plan.layers if layer.own}
        masks = self._masks(mask, jax.tree.leaves(draws)[0].shape[0])
        records = {
            name: Record(a, g, n, masks.get(name), ids if name in alone else None) for name, (a, g) in found.items()
        }
        own = {} if cotangent is None else self._own(cotangent, n, masks, alone)
        return Drawn(records, fisher, rest=rest, own=own)

    def _pairs(self, g: Mapping[str, Any]) -> dict[str, Pair]:
        """{layer: (a, g)} from the gradients of outputs of calls."""
        return pairs(self.plan, self._data, g, self._n, self._spec)

    def _own(self, cotangent: Any, n: Any, masks: Mapping[str, Any], apart: set[str]) -> dict[str, Record]:
        """The rows of layers whose examples have rows of their own, with the loss's own gradients."""
        g = {key: widened(x)[None] * n for key, x in self._pull(cotangent)[1].items()}
        found = self._pairs(g)
        return {name: Record(*pair, n, masks.get(name)) for name, pair in found.items() if name in apart}

    def _masks(self, mask: Any, draws: int) -> Mapping[str, Any]:
        """{layer: (batch, rows)} of the layers whose rows have positions."""
        if mask is None or isinstance(mask, Mapping):
            unknown = sorted(set(mask or {}) - set(self.plan.blocks))
            if unknown:
                raise ValueError(f"mask has layers {unknown} that the plan has not; it has {sorted(self.plan.blocks)}")
            given = (mask or {}).items()
            return {name: x if x is None else marks(x, f"mask of layer {name!r}") for name, x in given}
        mask = marks(mask)
        if mask.ndim < 2 or mask.shape[0] != self._n:
            raise ValueError(f"mask has shape {mask.shape}; need ({self._n}, *positions), True where a position exists")
        return self._masked(mask, draws)

    def _masked(self, mask: Any, draws: int) -> dict[str, Any]:
        """`_masks` of an array, seen from the model at twice the length."""
        longer = Longer.of(self.plan, self.params, self._args, self._shapes, tuple(mask.shape[1:]))
        return masks_of(self.plan, mask, longer, draws)

    def _rest(self, floats: Any, n: Any) -> dict[str, Record]:
        """Records of leaves without a layer: one row for the whole batch, a = 1, g the gradient of the draw."""
        leaves = named(floats)
        found = {}
        for name in self.plan.uncovered:
            g = widened(leaves[name])
            g = g.reshape(g.shape[0], 1, 1, 1, -1)
            found[name] = Record(jnp.ones((1, 1, 1, 1), g.dtype), g, n)
        return found

    @property
    def _spec(self) -> Any:
        """Axes of an explicit mesh that the examples are spread over."""
        spec = spread(jax.tree.leaves(self.prediction)[0])
        return spec[0] if spec else None

    def factored(self, cotangent: Any) -> dict[str, Factored]:
        """Gradients of <cotangent, prediction> as g^T a, not multiplied out, of the layers where that makes the
        preconditioner cheaper; under jit the pass is shared with `gradients` of the same cotangent."""
        g = {key: x[None] for key, x in self._pull(cotangent)[1].items()}
        found = {}
        for name, (a, g_layer) in self._pairs(g).items():
            block = self.plan.blocks[name]
            if not isinstance(a, Ids | Patches) and a.shape[1] * a.shape[2] < max(block.d_in, block.d_out):
                found[name] = Factored(a, g_layer[0], 1.0)
        return found


def capture(plan: Plan, params: Any, *args: Any) -> Captured:
    """Run `plan.apply(params, *args)` once, keeping what records need; the batch size may differ from the plan's."""
    check_arrays(params)
    n = examples(args, plan.batched)
    params = strong(params)
    args = strong(args)
    leaves, structure = jax.tree.flatten(differing(params, args))  # gradients are each device's own
    live = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]  # complex ones have no layer
    try:
        shapes = probed(plan, jax.tree.unflatten(structure, leaves), args, n)
    except ValueError as error:
        return _otherwise(plan, params, args, n, error)

    def forward(floats: list, probes: dict) -> tuple[Any, tuple]:
        full = list(leaves)
        for i, x in zip(live, floats, strict=True):
            full[i] = x
        tree = jax.tree.unflatten(structure, full)
        given = plan.known, frozenset(), plan.lifts
        pred, aux, walk, _ = evaluated(plan.apply, tree, args, plan.has_aux, plan.explicit, probes, *given)
        check_calls(plan, walk.calls, n)
        return pred, (aux, walk.data)

    probes = zeros(shapes, (params, args))
    pred, pull, (aux, data) = jax.vjp(forward, [leaves[i] for i in live], probes, has_aux=True)

    @remembered
    def both(cotangent: Any) -> tuple[Any, dict]:
        floats, g = pull(jax.tree.map(lambda c, f: jnp.asarray(c, f.dtype), cotangent, pred))
        full = [jnp.zeros_like(x) for x in leaves]
        for i, x in zip(live, floats, strict=True):
            full[i] = x
        return jax.tree.unflatten(structure, full), g

    return Captured(plan, pred, aux, params, both, data, shapes, n, args)


def _otherwise(plan: Plan, params: Any, args: tuple, n: int, error: ValueError) -> Captured:
    """The capture of a batch that runs other equations than the plan's, by way of more examples, some of them again."""
    from kfaccore_jax.single import again, fewer

    if plan.explicit or n == plan.count or (n > 1 and not of_other_number(plan, params, args)):
        raise error
    more = 2 if n == 1 else plan.count if n < plan.count else 2 * plan.count
    if more <= n:
        raise ValueError(
            f"{error}; at {n} examples it has other layers than at {plan.count}, as an einsum of three arrays takes "
            f"first what is smaller: write it as products of two, or plan with as many examples as a batch has"
        ) from error
    if plan.coupled:
        raise ValueError(
            f"{error}: a batch of {n} is written as other equations, and here outputs depend on other examples of the "
            f"batch; leave such a batch out, or give it {more} examples"
        ) from error
    filled = (jax.tree.map(lambda x: again(x, more), x) if i in plan.batched else x for i, x in enumerate(args))
    return fewer(capture(plan, params, *filled), params, args, n)


def remembered(pull: Pull) -> Pull:
    """`pull` that is traced once for one cotangent, whoever asks for it."""
    kept: list[tuple[list[Any], Any]] = []

    def again(cotangent: Any) -> tuple[Any, dict]:
        leaves = jax.tree.leaves(cotangent)
        for given, found in kept:
            if len(given) == len(leaves) and all(map(is_, given, leaves)):
                return found
        found = pull(cotangent)
        if all(isinstance(x, jax.core.Tracer) for x in leaves):  # nothing outlives a trace
            kept.append((leaves, found))
        return found

    return again
