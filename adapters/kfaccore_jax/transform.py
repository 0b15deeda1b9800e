"""K-FAC as an optax transformation: records come in as an extra argument, the state is a tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaccore import KFAC, Block, Clocks, Code, Due, Factored, Fixed, Identity, Preconditioner, Record, Schedules
from kfaccore_jax.drawn import Drawn
from kfaccore_jax.layers import named
from kfaccore_jax.plan import Plan, followed
from kfaccore_jax.trees import register

if TYPE_CHECKING:
    import optax


class KFACState(NamedTuple):
    """The Preconditioner's state, the code of each block after the last step, and how often each code came up."""

    core: Any
    codes: dict[str, Any]
    counts: Any


def kfac(
    plan: Plan,
    methods: Any = KFAC(),  # noqa: B008 frozen
    clocks: Clocks = Clocks(),  # noqa: B008 frozen
    schedules: Schedules = Schedules(),  # noqa: B008 frozen
    step: Any = Fixed(),  # noqa: B008 frozen
    core: Preconditioner | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turns gradients into directions of their sign; rate and momentum come after it in an optax chain.

    `update(grads, state, params, *, records, fresh=None, damping=None, factored=None, value=None, value_fn=None)`:

    records    {layer: Record} of this batch, or None to leave the statistics alone
    fresh      True or False: whether inverses are refreshed, decided outside jit (a static argument: two compiled
               variants); None: decided inside by `clocks` and the step count, with lax.cond
    damping    a number in place of the scheduled one
    factored   {layer: Factored} in place of those layers' gradients
    value, value_fn   for a step that judges: the batch's loss, and the function of `params` it is of

    SelfTuning() sets its own rate, momentum and damping: only optax.scale(-1.0) comes after it. It needs records at
    every step, though statistics move on the clock, and value_fn is called once, at params minus the update. A step
    taken back is a zero update; `state.core.motion` has alpha and mu, and tells why. Its restart flag lives on the
    device and decides inside jit, with lax.cond, over `clocks` and `fresh`: fresh=False leaves the refresh to that
    flag alone. All leaves must have a layer.

    methods, clocks, schedules and step as in kfaccore.Preconditioner, or all of them at once as `core`; a schedule sees
    a traced step, as optax's do. Leaves without a layer keep their gradient. Layers of masked leaves are left out.
    """
    import optax

    if core is not None:
        beside = {"methods": (methods, KFAC()), "clocks": (clocks, Clocks()), "schedules": (schedules, Schedules())}
        _only(core, beside | {"step": (step, Fixed())})
    core = core or Preconditioner(methods, clocks, schedules, step=step)
    if not core.rule.traced:
        raise ValueError(
            f"step is {core.rule}, which does not run inside jit; kfac() takes Fixed(...) and SelfTuning(...)"
        )
    rule = _Transformation(plan, core)
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)  # pyright: ignore[reportArgumentType]


def _only(core: Preconditioner, beside: Mapping[str, tuple[Any, Any]]) -> None:
    """ValueError where something is given beside `core`, or core holds what does not run inside jit."""
    for name, (value, default) in beside.items():
        if value != default:
            raise ValueError(f"both core and {name} are given; give {name} to the Preconditioner")
    if core.network is not None or core.comm.world > 1:
        raise ValueError("core has a network-level method or ranks, neither of which runs inside jit")


@dataclass(frozen=True, eq=False)
class _Transformation:
    """What `kfac` was given, and its two functions."""

    plan: Plan
    given: Preconditioner

    @property
    def step(self) -> Any:
        """The rule of the step."""
        return self.given.rule

    def init(self, params: Any) -> KFACState:
        plan, leaves = self.plan, [x for x in jax.tree.leaves(params) if followed(x)]
        blocks = _blocks(plan, params)
        alone = sorted(set(blocks) - set(plan.blocks)) if self.step.needs_records else []
        if alone:
            raise ValueError(
                f"{self.step} finds no rate for leaves without a layer, {alone}; give them to optax.partition"
            )
        like = jnp.zeros((), jnp.promote_types(jnp.result_type(*leaves), jnp.float32))
        core = register(self.core(blocks).init(blocks, like))
        codes = {name: jnp.full((b.blocks,), int(Code.IDENTITY), jnp.int32) for name, b in blocks.items()}
        core = replace(core, step=jnp.asarray(0), motion=_arrays(core.motion))
        return KFACState(core, codes, jnp.zeros(len(Code), jnp.int32))

    def core(self, blocks: Mapping[str, Block]) -> Preconditioner:
        """The core's, for these layers."""
        given = self.given
        methods = _methods(given.methods, self.plan, blocks)
        shape = {"widest": given.widest, "stacked": given.stacked}
        return Preconditioner(methods, given.clocks, given.schedules, step=given.rule, **shape)

    def update(
        self,
        grads: Any,
        state: KFACState,
        params: Any = None,
        *,
        records: Mapping[str, Record] | None,
        fresh: bool | None = None,
        damping: Any = None,
        factored: Mapping[str, Factored] | None = None,
        value: Any = None,
        value_fn: Callable[[Any], Any] | None = None,
        **extra: Any,
    ) -> tuple[Any, KFACState]:
        plan = self.plan
        blocks = dict(state.core.blocks)
        given = {name: record for name, record in (records or {}).items() if name in blocks}
        if self.step.needs_records and not given:
            raise ValueError(f"update got no records, which {self.step} needs at every step")
        if fresh is None and self.given.clocks.update == 1 and not given:
            raise ValueError("update got no records, and clocks.update is 1; pass fresh=False for a step without them")
        if self.step.judges and (damping is not None or value is None or value_fn is None or params is None):
            raise ValueError(f"{self.step} needs params, value=loss and value_fn=function of params, and no damping")
        core = self.core(blocks)
        due = self.due(core, state.core, given, fresh)
        matrices = _matrices(plan, grads, blocks)
        matrices |= {name: x for name, x in (factored or {}).items() if name in blocks}
        fisher = records.fisher if isinstance(records, Drawn) else None
        directions, after, info = core.do(due, state.core, given, matrices, fisher, damping)
        seen = jnp.concatenate([jnp.reshape(code, (-1,)) for code in info.codes.values()])
        counts = state.counts + jnp.sum(seen[:, None] == jnp.arange(len(Code)), 0, dtype=jnp.int32)
        moves = _tree(plan, grads, directions)
        motion = after.motion
        if value_fn is not None and self.step.judges:
            moves, motion = _judged(self.step, state.core.motion, motion, moves, value, value_fn, params)
        return moves, KFACState(replace(after, motion=motion), dict(info.codes), counts)

    def due(self, core: Preconditioner, state: Any, records: Mapping[str, Record], fresh: bool | None) -> Due:
        """What the clocks say, traced; decided outside jit for `fresh` steps, but that a rule's own statistics stay on
        the clock while it is given records at every step."""
        clocks = core.due(state)
        decided = fresh is not None and not self.step.needs_records
        update = bool(records) if decided else clocks.update if records else False
        return Due(update, clocks.refresh if fresh is None else fresh)


def _judged(
    rule: Any, before: Any, motion: Any, moves: Any, value: Any, value_fn: Callable, params: Any
) -> tuple[Any, Any]:
    """The update, or zeros where the loss of its own batch speaks against it, and the motion that follows."""
    import optax

    after = value_fn(optax.apply_updates(params, jax.tree.map(jnp.negative, moves)))
    share, motion = rule.judge(motion, 1.0, jnp.asarray(value), jnp.asarray(after))
    motion = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), register(motion), before)
    return jax.tree.map(lambda x: jnp.where(share > 0, x, jnp.zeros_like(x)), moves), motion


def _arrays(motion: Any) -> Any:
    """A rule's numbers as arrays, floats in the widest dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(type(x))) if isinstance(x, int | float) else x, motion)


def _present(plan: Plan, leaves: Mapping[str, Any]) -> list:
    """Layers all of whose leaves are there."""
    return [layer for layer in plan.layers if all(part.leaf in leaves for part in layer.parts)]


def _blocks(plan: Plan, params: Any) -> dict[str, Block]:
    """Of the layers whose leaves are in `params`, and of leaves without a layer, one column each."""
    leaves = named(params)
    blocks = {layer.name: layer.block for layer in _present(plan, leaves)}
    owned = {part.leaf for layer in _present(plan, leaves) for part in layer.parts}
    rest = {k: x for k, x in leaves.items() if k not in owned and followed(x)}
    return blocks | {name: Block(x.size, 1) for name, x in rest.items()}


def _methods(methods: Any, plan: Plan, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """One a block; Identity for leaves without a layer."""
    layers = plan.blocks
    missing = sorted(set(blocks) & set(layers) - set(methods)) if isinstance(methods, Mapping) else []
    if missing:
        raise ValueError(f"methods has no entry for layers {missing}; give them one, Identity() to leave them alone")
    found = methods if isinstance(methods, Mapping) else dict.fromkeys(layers, methods)
    return {name: found[name] if name in layers else Identity() for name in blocks}


def _matrices(plan: Plan, grads: Any, blocks: Mapping[str, Block]) -> dict[str, Any]:
    leaves = named(grads)
    found = {layer.name: layer.matrix(leaves) for layer in _present(plan, leaves)}
    return found | {name: leaves[name].reshape(1, -1, 1) for name in blocks if name not in found}


def _tree(plan: Plan, grads: Any, directions: Mapping[str, Any]) -> Any:
    leaves = named(grads)
    names = list(leaves)
    for layer in _present(plan, leaves):
        leaves = layer.scatter(leaves, directions[layer.name])
    for name in set(directions) - set(plan.blocks):
        leaves[name] = directions[name].reshape(leaves[name].shape).astype(leaves[name].dtype)
    return jax.tree.unflatten(jax.tree.structure(grads), [leaves[name] for name in names])
