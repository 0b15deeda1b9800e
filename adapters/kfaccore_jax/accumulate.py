"""Micro-batches: the statistics and gradients of k batches as those of one, then one step of the whole chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaccore import Block, Ids, Record, measured
from kfaccore_jax.mesh import promoting
from kfaccore_jax.present import matrices, seen
from kfaccore_jax.probing import unless_tried
from kfaccore_jax.records import Drawn, check_one, widened
from kfaccore_jax.replicas import share_of
from kfaccore_jax.state import Fresh, KFACState, restored, state_of
from kfaccore_jax.transform import Transformation
from kfaccore_jax.trees import register

if TYPE_CHECKING:
    import optax


class AccumulateState(NamedTuple):
    """Micro-batches seen since the last step, their gradients times n, their Stats, the sum of n; the state of `tx`."""

    seen: Any
    grads: Any
    stats: dict[str, Any]
    share: Any
    inner: Any

    def __reduce__(self) -> tuple:
        return restored, (AccumulateState, *self)


def accumulate(tx: optax.GradientTransformationExtraArgs, k: int) -> optax.GradientTransformationExtraArgs:
    """One step of `tx`, `kfac(plan)` or a chain with it, for every k calls of `update`; updates are zero in between.

    Statistics of the records are measured and added call by call, so that no record waits; gradients, each the mean
    over its own micro-batch, are averaged with the records' n as weights, or equally where no records are given. The
    k-th call steps as the whole batch would, on draws that are independent between micro-batches. Clocks and schedules
    count steps, not calls. Records must be given at all k calls or at none.

    Rows that all examples share (positions embedded once, leaves without a layer) are measured a micro-batch at a time:
    the same in expectation.

    optax.MultiSteps cannot do this: it keeps the state of `tx` only when it steps, and hands it the records of the last
    micro-batch. Raises ValueError for a `tx` without kfac, and for steps and methods that need the rows themselves.
    """
    import optax

    rules = list(_found(tx.update, set()))
    if len(rules) != 1:
        raise ValueError(f"accumulate needs a transformation with one kfac(plan) in it; this one has {len(rules)}")
    if k < 1:
        raise ValueError(f"accumulate got k={k}; need at least one micro-batch a step")
    rule = rules[0]
    if rule.step.needs_records or rule.given.network is not None:
        raise ValueError(
            f"{rule.step if rule.step.needs_records else rule.given.network} needs the rows of the whole batch at its "
            f"step, and accumulate keeps sums; hand update the records of all micro-batches, records=[first, ...]"
        )
    within = optax.with_extra_args_support(tx)

    whole = _Accumulation(rule, within, k)
    init = unless_tried(whole.init, within.init)
    return optax.GradientTransformationExtraArgs(init, unless_tried(whole.update, within.update))


@dataclass(frozen=True, eq=False)
class _Accumulation:
    """The rule within, the chain it stands in, and how many micro-batches make a step."""

    rule: Transformation
    within: optax.GradientTransformationExtraArgs
    k: int

    @promoting
    def init(self, params: Any) -> AccumulateState:
        inner = self.within.init(params)
        # n * g overflows or stalls in half precision
        zeros = jax.tree.map(lambda x: widened(jnp.zeros_like(x)), params)
        wide = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        stats = _empty(self.rule, state_of(inner), jnp.zeros((), wide))
        share = jnp.zeros((), jnp.result_type(float))
        return AccumulateState(jnp.zeros((), jnp.int32), zeros, stats, share, inner)

    @promoting
    def update(
        self,
        grads: Any,
        state: AccumulateState,
        params: Any = None,
        *,
        records: Mapping[str, Any] | None,
        fresh: Fresh = None,
        **extra: Any,
    ) -> tuple[Any, AccumulateState]:
        check_one(records)
        n = jnp.asarray(share_of(records), state.share.dtype)
        sums = _mapped(
            lambda g, total: total if g is None else total + jnp.asarray(n, total.dtype) * g, grads, state.grads
        )
        stats = _added(self.rule, state, records, grads, fresh)
        share = state.share + n

        def stepped() -> tuple[Any, Any]:
            mean = _mapped(_over(share), grads, sums)
            fisher = records.fisher if isinstance(records, Drawn) else None
            given = None if records is None else Drawn(stats, fisher, share)
            idle = (
                False if given is not None and not stats else fresh
            )  # no method measures, none has anything to refresh
            return self.within.update(mean, state.inner, params, records=given, fresh=idle, **extra)

        def waited() -> tuple[Any, Any]:
            return jax.tree.map(jnp.zeros_like, grads), state.inner

        last = state.seen + 1 == self.k
        moves, inner = jax.lax.cond(last, stepped, waited)

        def emptied(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.where(last, jnp.zeros_like(x), x), tree)

        seen = jnp.where(last, 0, state.seen + 1)
        return moves, AccumulateState(seen, emptied(sums), emptied(stats), emptied(share), inner)


def _found(part: Any, seen: set[int]) -> Iterator[Transformation]:
    """The transformations of `kfac` that a function, or what it closes over, calls."""
    if id(part) in seen:
        return
    seen.add(id(part))
    owner = getattr(part, "__self__", None)
    if isinstance(owner, Transformation):
        if id(owner) not in seen:  # a wrapper closes over init and update of one
            seen.add(id(owner))
            yield owner
        return
    inner = list(part) if isinstance(part, tuple | list) else list(part.values()) if isinstance(part, dict) else []
    inner += [cell.cell_contents for cell in getattr(part, "__closure__", None) or () if _filled(cell)]
    inner += [owner] if owner is not None and not isinstance(owner, type) else []
    for one in inner:
        if callable(one) or isinstance(one, tuple | list | dict):
            yield from _found(one, seen)


def _over(share: Any) -> Any:
    """(newest gradient, sum) -> the mean; integers have no gradient, and a leaf without one now does not move."""

    def mean(g: Any, x: Any) -> Any:
        if g is None:
            return None
        return jnp.asarray(x / jnp.asarray(share, x.dtype), g.dtype) if jnp.issubdtype(g.dtype, jnp.inexact) else g

    return mean


def _mapped(function: Any, grads: Any, sums: Any) -> Any:
    """function(gradient or None, sum) for each leaf."""
    return jax.tree.map(function, grads, sums, is_leaf=lambda g: g is None)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 asked whether it is there
    except ValueError:
        return False
    return True


def _empty(rule: Transformation, state: KFACState, like: Any) -> dict[str, Any]:
    """Stats of nothing for every block that is measured; ValueError where a method needs rows at its step."""
    blocks = dict(state.core.blocks)
    rule.check_sums(blocks, like)
    core = rule.core(blocks)
    idle = core.assigned.unmeasured(blocks, state.core.layers)
    found = {}
    for name in blocks.keys() - idle:
        shapes = jax.eval_shape(lambda name=name: register(measured(core, state.core, name, _row(blocks[name], like))))
        found[name] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return {name: found[name] for name in blocks if name in found}


def _row(block: Block, like: Any) -> Record:
    """A record of one row that fits a block."""
    a: Any = jnp.zeros((block.blocks, 1, 1, block.d_in), like.dtype)
    if block.diagonal_in and block.blocks == 1:
        a = Ids(jnp.zeros((1, 1), jnp.int32), block.d_in)
    return Record(a, jnp.zeros((1, block.blocks, 1, 1, block.d_out), like.dtype), 1.0)


def _added(rule: Transformation, state: AccumulateState, records: Any, grads: Any, fresh: Fresh) -> Any:
    """The Stats with those of one micro-batch, where the step to come will use them."""
    if records is None:
        return state.stats
    core_state = state_of(state.inner).core
    blocks = dict(core_state.blocks)
    core = rule.core(blocks)
    grads = seen(rule.plan, grads, blocks)
    given = rule.given_records(records, grads, blocks)
    missing = sorted((state.stats.keys() & matrices(rule.plan, grads, blocks).keys()) - given.keys())
    if missing:
        raise ValueError(f"update got no records of {missing}; give the records of Captured.records, of all layers")

    def sums() -> dict[str, Any]:
        found = {}
        for name, before in state.stats.items():
            if name not in given:  # without a gradient: frozen
                found[name] = before
                continue
            new = register(measured(core, core_state, name, given[name]))
            new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, before)
            found[name] = jax.tree.map(jnp.add, before, new)
        return found

    due = rule.due(core, core_state, given, fresh, given).measuring(given)
    if isinstance(due, bool):
        return sums() if due else state.stats
    return jax.lax.cond(due, sums, lambda: state.stats)
