"""One forward with zero probes: predictions, gradients, and records of any draws, inside or outside jit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Factored, Ids, Patches, Record
from kfaccore_jax.batch import examples
from kfaccore_jax.drawn import Drawn
from kfaccore_jax.layers import Layer
from kfaccore_jax.plan import Plan, evaluated, followed


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
    _shapes: dict[str, Any]
    _n: int

    def gradients(self, cotangent: Any) -> Any:
        """The gradient, a tree like params, of <cotangent, prediction>: pass the mean loss's gradient in it."""
        return self._pull(cotangent)[0]

    def output_gradients(self, draws: Any, one_by_one: bool = False) -> dict[str, Any]:
        """{call: gradients of its output} for draws (draws, *prediction.shape): no parameter gradient is formed.

        one_by_one   a loop over draws instead of vmap: less memory, and what JAX needs for grouped convolutions of
                     arrays that are spread over devices
        """
        if draws.shape[0] == 0:
            return {key: jnp.zeros((0, *y.shape), y.dtype) for key, y in self._shapes.items()}
        if draws.shape[0] == 1:
            return {key: g[None] for key, g in self._pull(draws[0])[1].items()}
        over = jax.lax.map if one_by_one else lambda f, xs: jax.vmap(f)(xs)
        return over(lambda draw: self._pull(draw)[1], draws)

    def records(
        self,
        draws: Any,
        n: Any,
        ids: Any = None,
        one_by_one: bool = False,
        fisher: Callable | None = None,
        cotangent: Any = None,
    ) -> Drawn:
        """{layer: Record} for draws of per-example losses (type2, monte_carlo, empirical, forward_only).

        n        the loss normaliser: the batch size for a mean over examples
        fisher   kfaccore's function that made the draws, so that a step which cannot use them says so
        cotangent   of the mean loss, as `gradients` takes it: SelfTuning() then leaves each example out of the model of
                    the direction it helped to make; under jit the pass is shared with `gradients`
        """
        g = self.output_gradients(draws, one_by_one)
        found = {layer.name: Record(*self._pair(layer, g), n, ids=ids) for layer in self.plan.layers}
        if cotangent is None:
            return Drawn(found, fisher)
        g = {key: x[None] * n for key, x in self._pull(cotangent)[1].items()}
        own = {layer.name: Record(*self._pair(layer, g), n, ids=ids) for layer in self.plan.layers}
        return Drawn(found, fisher, own)

    def factored(self, cotangent: Any) -> dict[str, Factored]:
        """Gradients of <cotangent, prediction> as g^T a, not multiplied out, of the layers where that makes the
        preconditioner cheaper; under jit the pass is shared with `gradients` of the same cotangent."""
        g = {key: x[None] for key, x in self._pull(cotangent)[1].items()}
        found = {}
        for layer in self.plan.layers:
            block = layer.block
            a, g_layer = self._pair(layer, g)
            if not isinstance(a, Ids | Patches) and a.shape[1] * a.shape[2] < max(block.d_in, block.d_out):
                found[layer.name] = Factored(a, g_layer[0], 1.0)
        return found

    def _pair(self, layer: Layer, g: Mapping[str, Any]) -> tuple[Any, Any]:
        """a and g of a layer, its calls joined on the shared axis."""
        pairs = []
        for key in layer.calls:
            call = self.plan.calls[key]
            x = self._data.get(key)
            found = widened(call.gradients(g[key], x, self._n))
            a = call.inputs(x, found, self._n, layer.lone)
            if isinstance(a, Patches) and layer.bias is not None and layer.factor != 1.0:
                a = a.unfold()
            if not isinstance(a, Ids | Patches):
                a = jnp.asarray(a, found.dtype)
                if layer.bias is not None:
                    a = jnp.concatenate([a, jnp.full_like(a[..., :1], layer.factor)], -1)
            elif isinstance(a, Patches):
                a = Patches(jnp.asarray(a.image, found.dtype), a.window, layer.bias is not None)
            pairs.append((a, found))
        return reduce(_joined, pairs)


def _joined(first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any]:
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


def capture(plan: Plan, params: Any, *args: Any) -> Captured:
    """Run `plan.apply(params, *args)` once, keeping what records need; the batch size may differ from the plan's."""
    n = examples(args, plan.batched)
    leaves, structure = jax.tree.flatten(params)
    live = [i for i, x in enumerate(leaves) if followed(x)]
    shapes = _probes(plan, params, args)

    def forward(floats: list, probes: dict) -> tuple[Any, tuple]:
        full = list(leaves)
        for i, x in zip(live, floats, strict=True):
            full[i] = x
        tree = jax.tree.unflatten(structure, full)
        pred, aux, walk, _ = evaluated(plan.apply, tree, args, plan.has_aux, plan.explicit, probes)
        return pred, (aux, walk.data)

    zeros = {key: jnp.zeros(y.shape, y.dtype) for key, y in shapes.items()}
    pred, pull, (aux, data) = jax.vjp(forward, [leaves[i] for i in live], zeros, has_aux=True)

    def both(cotangent: Any) -> tuple[Any, dict]:
        floats, g = pull(cotangent.astype(pred.dtype))
        full = [jnp.zeros_like(x) for x in leaves]
        for i, x in zip(live, floats, strict=True):
            full[i] = x
        return jax.tree.unflatten(structure, full), g

    return Captured(plan, pred, aux, params, both, data, shapes, n)


def _probes(plan: Plan, params: Any, args: tuple) -> dict[str, Any]:
    """Shapes of the outputs of the calls at this batch; ValueError if they are not the plan's calls."""
    found: dict[str, Any] = {}

    def abstract(params: Any, args: tuple) -> None:
        walk = evaluated(plan.apply, params, args, plan.has_aux, plan.explicit, None)[2]
        found.update(walk.outputs)

    jax.eval_shape(abstract, params, args)
    if found.keys() != plan.calls.keys():
        raise ValueError("apply runs other layers than when it was planned; make a plan for these arguments")
    return found
