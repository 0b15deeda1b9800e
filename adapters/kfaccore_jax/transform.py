"""K-FAC as an optax transformation: records come in as an extra argument, the state is a tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfaccore import Block, Code, Due, Factored, Method, Preconditioner, Record, Serial
from kfaccore_jax.evaluate import followed
from kfaccore_jax.grafting import beside, grafted
from kfaccore_jax.judge import arrays, finitely, judged, losses_of, started, whole_mean
from kfaccore_jax.mesh import automatic, placed_like, specs_of
from kfaccore_jax.names import named
from kfaccore_jax.penalties import penalised, shrunk, sloped, weights
from kfaccore_jax.plan import Plan
from kfaccore_jax.present import blocks_of, check_halves, check_leaves, held, matrices, tree_of
from kfaccore_jax.records import Drawn, side_by_side
from kfaccore_jax.replicas import Axes, averaged, check_axes, in_force, share_of
from kfaccore_jax.state import Codes, Fresh, KFACState
from kfaccore_jax.trees import register
from kfaccore_jax.wrappers import check_given, check_seen, not_within_multisteps


@dataclass(frozen=True, eq=False)
class Transformation:
    """What `kfac` was given, and its two functions."""

    plan: Plan
    given: Preconditioner
    axes: tuple[str, ...] | None
    uncovered: Method
    rest: Any
    graft: Any = None

    @property
    def step(self) -> Any:
        """The rule of the step."""
        return self.given.rule

    def init(self, params: Any) -> KFACState:
        not_within_multisteps()
        check_leaves(self.plan, params)
        blocks = self.blocks(params)
        leaves = [x for x in jax.tree.leaves(params) if followed(x)]
        dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
        if self.axes:
            self.check_sums(blocks, jnp.zeros((), dtype))
        traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        core = register(self.core(blocks).init(blocks, jnp.zeros((), dtype)) if traced else self.made(blocks, dtype))
        order = tuple(name for stack in core.layers.stacks for name in stack)
        codes = register(Codes.start(blocks, order, int(Code.IDENTITY)))
        core = replace(core, step=jnp.asarray(0), motion=arrays(core.motion))
        rest = () if self.rest is None else started(self.rest, self.leaves_left(params))
        rest = rest if self.graft is None else self.graft.init(params)
        return placed_like(KFACState(core, codes, jnp.zeros(len(Code), jnp.int32), rest), params)

    def made(self, blocks: Mapping[str, Block], dtype: Any) -> Any:
        """The core's first state, made on the host: eager JAX would compile an operation for every shape in it."""
        core = self.core(blocks)
        core = replace(core, stacked=True if core.stacked is None else core.stacked)  # as JAX has it by itself
        like: Any = np.zeros((), dtype)
        found = register(core.init(blocks, like))
        return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, np.ndarray) else x, found)

    def check_sums(self, blocks: Mapping[str, Block], like: Any) -> None:
        """ValueError naming the method whose Stats do not add up over devices or micro-batches."""
        summed = self.core(blocks, Axes(("one", "other"), world=2))
        jax.eval_shape(lambda: summed.init(blocks, like).step)

    def blocks(self, params: Any) -> dict[str, Block]:
        """Of what the core preconditions: layers, and leaves without one unless `rest` has them."""
        blocks = blocks_of(self.plan, params)
        if self.rest is None:
            return blocks
        layers = {item.layer.name for item in held(self.plan, named(params))}
        return {name: block for name, block in blocks.items() if name in layers}

    def leaves_left(self, tree: Any) -> dict[str, Any]:
        """{leaf: array} of what `rest` has."""
        leaves = named(tree)
        owned = {part.leaf for item in held(self.plan, leaves) for part in item.layer.parts}
        return {name: x for name, x in leaves.items() if name not in owned and followed(x)}

    def core(self, blocks: Mapping[str, Block], comm: Any = None) -> Preconditioner:
        """The core's, for these layers."""
        given = self.given
        methods = _methods(given.methods, self.plan, blocks, self.uncovered)
        rule = given.rule
        if comm is None and self.axes:
            comm = Axes(self.axes)
            whole = Axes(self.axes, world=comm.devices) if in_force(self.axes) else comm
            rule = Preconditioner(methods, step=rule, comm=whole).rule  # the rule's sums go over the same axes
        numbers = {"widest": given.widest, "stacked": given.stacked}
        return Preconditioner(methods, given.clocks, given.schedules, given.network, rule, comm or Serial(), **numbers)

    def update(
        self,
        grads: Any,
        state: KFACState,
        params: Any = None,
        *,
        records: Mapping[str, Record] | Sequence[Mapping[str, Record]] | None,
        fresh: Fresh = None,
        damping: Any = None,
        factored: Mapping[str, Factored] | None = None,
        value: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        whole: Any = None,
        nonnegative: bool | None = None,
        **extra: Any,
    ) -> tuple[Any, KFACState]:
        check_axes(self.axes)
        records = side_by_side(records)
        blocks = dict(state.core.blocks)
        given = self.given_records(records, grads, blocks)
        self._wanting(given, fresh, damping, value, value_fn, params, whole)
        axes = Axes(self.axes) if self.axes else None
        share = share_of(records)
        grads = grads if axes is None else averaged(axes, grads, share, factored)
        core = self.core(blocks)
        schedules = core.schedules
        how = {"fisher": _fisher(records), "nonnegative": nonnegative}
        theta = weights(schedules, self.plan, params, blocks)
        if theta:
            value, value_fn = penalised(schedules, self.plan, blocks, theta, state.core.step, value, value_fn, whole)

        def stepped(grads: Any, before: Any, given: Any, factored: Any, damping: Any, told: Any, theta: Any) -> tuple:
            found = matrices(self.plan, grads, blocks) | factored
            found = sloped(schedules, found, theta, before.step) if theta else found
            due = self.due(core, before, given, fresh, found)
            directions, after, info = core.do(due, before, given, found, damping=damping, **how, **told)
            directions = shrunk(schedules, directions, theta, info.step["alpha"]) if theta else directions
            return tree_of(self.plan, grads, directions), register(after), state.codes.after(info)

        products = {} if schedules.penalised else {k: x for k, x in (factored or {}).items() if k in blocks}
        specs = specs_of(grads), specs_of(state.core), specs_of(state.codes)
        told = self._told(records, grads, value, axes, share)
        extra |= {} if value is None else {"value": whole_mean(value, axes, share)}
        taken, rest = self._grafted(blocks, grads, state.rest, params, extra, told)
        moves, after, codes = automatic(stepped, specs, grads, state.core, given, products, damping, told, theta)
        moves, rest = self._rest_moved(beside(self.plan, moves, taken), grads, rest, params, extra)
        if value_fn is not None and self.step.judges:
            losses = whole_mean(losses_of(moves, value, value_fn, params, whole), axes, share)
            moves, motion = judged(self.step, state.core.motion, after.motion, moves, losses)
            after = replace(after, motion=motion)
        return moves, KFACState(after, codes, state.counts + codes.counted, rest)

    def _grafted(
        self,
        blocks: Mapping[str, Block],
        grads: Any,
        state: Any,
        params: Any,
        extra: dict[str, Any],
        told: dict[str, Any],
    ) -> tuple[Any, Any]:
        """What `graft` would take, whose lengths the rule is told, and the state of it or of `rest`."""
        if self.graft is None:
            return None, state
        taken, told["lengths"], state = grafted(self.graft, self.plan, blocks, grads, state, params, extra)
        return taken, state

    def given_records(self, records: Mapping[str, Any] | None, grads: Any, blocks: Mapping[str, Block]) -> dict:
        """{block: what was measured} of the layers and leaves at hand."""
        check_halves(self.plan, grads, blocks)
        if isinstance(records, Drawn) and records.share is not None:
            moving = matrices(self.plan, grads, blocks)
            return {name: stats for name, stats in records.items() if name in moving}  # of `accumulate`, by block
        found = dict(records or {})
        here = {item.layer.name: item for item in held(self.plan, named(grads))}
        given = {name: item.record(found[item.full]) for name, item in here.items() if item.full in found}
        beside = records.rest if isinstance(records, Drawn) else {}
        given |= {name: record for name, record in beside.items() if name in blocks and name not in here}
        return {name: record for name, record in given.items() if name in blocks}

    def _told(self, records: Any, grads: Any, value: Any, axes: Any, share: Any) -> dict[str, Any]:
        """What a rule that looks at the loss is told of it: its value, and records of its own gradients, each
        device's."""
        if not self.step.needs_records and not self.step.judges:
            return {}
        own = records.own if isinstance(records, Drawn) else {}
        here = held(self.plan, named(grads))
        found = {item.layer.name: item.record(own[item.full]) for item in here if item.full in own}
        return {"loss": whole_mean(value, axes, share), "own": found}

    def _wanting(
        self, given: Mapping[str, Any], fresh: Fresh, damping: Any, value: Any, value_fn: Any, params: Any, whole: Any
    ) -> None:
        """ValueError where something is not there."""
        if self.step.needs_records and not given:
            raise ValueError(f"update got no records, which {self.step} needs at every step")
        if fresh is None and self.given.clocks.update == 1 and not given:
            raise ValueError("update got no records, and clocks.update is 1; pass fresh=False for a step without them")
        if self.step.judges and (damping is not None or value is None or value_fn is None or params is None):
            raise ValueError(f"{self.step} needs params, value=loss and value_fn=function of params, and no damping")
        if self.step.needs_records and value is None:
            raise ValueError(f"{self.step} needs value=, the loss of the batch before the step, at every step")
        if self.step.judges:
            check_seen(self.plan, params, whole)

    def _rest_moved(
        self, moves: Any, grads: Any, before: Any, params: Any, extra: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """The tree with what `rest` makes of the leaves it has, and its state."""
        if self.rest is None:
            return moves, before
        known = None if params is None else self.leaves_left(params)
        left = self.leaves_left(grads)
        check_given("rest", known or left, left)
        found, after = finitely(self.rest, left, before, known, extra)
        leaves = named(moves) | found
        return jax.tree.unflatten(jax.tree.structure(moves), list(leaves.values())), after

    def due(self, core: Preconditioner, state: Any, records: Mapping[str, Record], fresh: Fresh, of: Any) -> Due:
        """What the clocks say, traced, and which of the layers `of` missed them; decided outside jit for `fresh` steps,
        but that a rule's own statistics stay on the clock while it is given records at every step."""
        clocks = core.due(state, of)
        decided = fresh is not None and not self.step.needs_records
        update = bool(records) if decided else clocks.update if records else False
        return replace(clocks, update=update) if fresh is None else Due(update, fresh)


def _fisher(records: Any) -> Callable | None:
    """What made the draws, as far as they say."""
    return records.fisher if isinstance(records, Drawn) else None


def _methods(methods: Any, plan: Plan, blocks: Mapping[str, Block], uncovered: Method) -> Mapping[str, Method] | None:
    """One a block; `uncovered` for leaves without a layer. None where a network-level method has all of them."""
    if methods is None and set(blocks) <= set(plan.blocks):
        return None
    owners = {layer.name: layer.name for layer in plan.layers}
    owners |= {layer.bias.leaf: layer.name for layer in plan.layers if layer.bias and layer.bias.leaf in blocks}
    several = isinstance(methods, Mapping)
    missing = sorted({owners[name] for name in blocks if name in owners} - set(methods)) if several else []
    if missing:
        raise ValueError(f"methods has no entry for layers {missing}; give them one, Identity() to leave them alone")
    found = {}
    for name in blocks:
        if name not in owners:
            found[name] = uncovered
        elif methods is not None:
            found[name] = methods[owners[name]] if several else methods
    return found
