"""The two faces of a step: an optax transformation, and one jitted function for a whole loop.

`update(grads, state, params, *, records, fresh=None, damping=None, factored=None, value=None, value_fn=None,
whole=None, nonnegative=None)`:

records    {layer: Record} of this batch, or None to leave the statistics alone
fresh      True or False: whether inverses are refreshed, decided outside jit. As a static argument two programs are
           compiled; as an ordinary one, an array within, one program that has both (lax.cond), in about half the time
           and no slower a step. None: decided inside by `clocks` and the step count, one program too
damping    a number in place of the scheduled one
factored   {layer: Factored} in place of those layers' gradients
value, value_fn   for a step that judges: the batch's loss, and the function of `params` it is of
whole      for a step that judges where optax.masked or optax.partition hides leaves of `params`: all of them, as
           value_fn takes them
nonnegative   whether the loss cannot be below 0: False where only its differences count, as of a policy gradient; None
           believes it until a value shows otherwise

SelfTuning() sets its own rate, momentum and damping: only optax.scale(-1.0) comes after it. It needs records at
every step, though statistics move on the clock, and value_fn is called once, at params minus the update. A step
taken back is a zero update; `state.core.motion` has alpha and mu, and tells why. Its restart flag lives on the
device and decides inside jit, with lax.cond, over `clocks` and `fresh`: fresh=False leaves the refresh to that
flag alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from kfaccore import (
    KFAC,
    Bernoulli,
    Clocks,
    Code,
    Diagonal,
    Fixed,
    Gaussian,
    Identity,
    Joint,
    Method,
    Preconditioner,
    Schedules,
    SelfTuning,
    SharedDamping,
    SoftmaxCrossEntropy,
    Tridiagonal,
    TwoLevel,
    empirical,
    monte_carlo,
)
from kfaccore_jax.capture import capture
from kfaccore_jax.grafting import check_decay, rule_of
from kfaccore_jax.judge import added
from kfaccore_jax.mesh import promoting
from kfaccore_jax.names import named
from kfaccore_jax.plan import Plan
from kfaccore_jax.probing import check_downhill, signed_alone, tried
from kfaccore_jax.records import widened
from kfaccore_jax.state import counts_of
from kfaccore_jax.transform import Transformation
from kfaccore_jax.trees import lending

if TYPE_CHECKING:
    import optax

Loss = SoftmaxCrossEntropy | Bernoulli | Gaussian


def kfac(
    plan: Plan,
    methods: Method | Mapping[str, Method] | None = None,
    clocks: Clocks = Clocks(),  # noqa: B008 frozen
    schedules: Schedules = Schedules(),  # noqa: B008 frozen
    step: Any = Fixed(),  # noqa: B008 frozen
    core: Preconditioner | None = None,
    *,
    network: TwoLevel | Tridiagonal | SharedDamping | None = None,
    widest: int = 8192,
    axis_name: str | tuple[str, ...] | None = None,
    uncovered: Method | None = None,
    rest: optax.GradientTransformation | None = None,
    graft: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Turns gradients into directions of their sign; rate and momentum come after it in an optax chain.

    `update(grads, state, params, records=, value=, value_fn=, fresh=)` takes the batch's records, or [first, second] of
    micro-batches (gradient, loss and value_fn are then means over all of them), for rules that judge their step the
    loss and a function of params that computes it, and whether to refresh where the clocks do not decide.

    methods, clocks, schedules, step, network and widest as in kfaccore.Preconditioner, or all of them at once as
    `core`; a schedule sees a traced step, as optax's do. The default method is KFAC(). Penalties of `schedules` are
    added here: gradients, value and value_fn are those of the loss without them.

    axis_name  names of the axes (shard_map, pmap) over which each device has its own part of the batch: statistics,
               sums, gradients and losses are averaged over them by the records' n, so that the step is that of the
               whole batch; what was averaged already stays. (): each device trains a model of its own. Left out, an
               axis in force is refused
    uncovered  the method of leaves without a layer: Diagonal() measures them by the same draws, one row a batch;
               Identity(), the default but under a step that needs every parameter, keeps their gradient
    rest       an optax transformation for those leaves instead, which must keep the sign: optax.scale_by_adam()
    graft      an optax optimizer, of either sign, that gives layers its step's length (step is Fixed(rescale=Graft()))
               and moves leaves without a layer; what comes out has a gradient's sign: optax.scale(-1.0) follows

    Parameters that optax.masked or optax.partition hide are left out: of a layer with one of weight and bias hidden
    the other one is preconditioned by itself. optax.MultiSteps, which hands on the last micro-batch's records alone, is
    refused; `kfaccore_jax.accumulate` adds them up.
    """
    import optax

    if core is not None:
        beside = {"methods": (methods, None), "clocks": (clocks, Clocks()), "schedules": (schedules, Schedules())}
        _only(core, beside | {"step": (step, Fixed()), "network": (network, None), "widest": (widest, 8192)})
    else:
        methods = KFAC() if methods is None and network is None else methods
        core = Preconditioner(methods, clocks, schedules, network, rule_of(step, graft, rest), widest=widest)
    rule_of(core.rule, graft, rest)
    check_decay(core.schedules, graft)
    rule = Transformation(plan, core, _names(axis_name), _uncovered(core, uncovered, rest), rest, graft)
    return optax.GradientTransformationExtraArgs(*signed_alone(promoting(rule.init), promoting(lending(rule.update))))


def _names(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    return (axis_name,) if isinstance(axis_name, str) else None if axis_name is None else tuple(axis_name)


def _only(core: Preconditioner, beside: Mapping[str, tuple[Any, Any]]) -> None:
    """ValueError where something is given beside `core`, or core holds what does not run inside jit."""
    for name, (value, default) in beside.items():
        if value != default:
            raise ValueError(f"both core and {name} are given; give {name} to the Preconditioner")
    if core.comm.world > 1:
        raise ValueError("core has ranks, which do not run inside jit: take kfac(plan, axis_name=...)")


def _uncovered(core: Preconditioner, method: Method | None, rest: Any) -> Method:
    """The method of leaves without a layer; ValueError for what contradicts itself."""
    if not core.rule.traced:
        raise ValueError(
            f"step is {core.rule}, which does not run inside jit; kfac() takes Fixed(...) and SelfTuning(...)"
        )
    if rest is not None and method is not None:
        raise ValueError("both uncovered and rest are given; one of them has the leaves without a layer")
    if not core.rule.needs_records:
        return Identity() if method is None else method
    if rest is not None or method == Identity():
        raise ValueError(
            f"{core.rule} sets one rate for every parameter: leave out rest, and give uncovered=Diagonal()"
        )
    return Diagonal() if method is None else method


class Step:
    """One jitted function for a whole loop, with `init`; made by `step`."""

    def __init__(self, plan: Plan, loss: Loss | Joint, tx: optax.GradientTransformationExtraArgs, draws: int) -> None:
        self.plan = plan
        self.loss = loss
        self.tx = tx
        self.draws = draws
        self._tried = tried(tx)
        self._run = jax.jit(self._step, donate_argnums=(0, 1))

    def init(self, params: Any) -> Any:
        """The state of the transformation. ValueError for parameters that cannot be given away, one array twice; of
        what a state has once more, as optimizers that remember where they began have, it gets a copy."""
        seen: dict[int, str] = {}
        for name, x in named(params).items():
            if seen.setdefault(id(x), name) != name:
                raise ValueError(
                    f"params has one array as {seen[id(x)]} and as {name}, and a step gives its arrays away: copy it, "
                    f"jnp.array(x), or keep a tied parameter under one name"
                )

        def once(x: Any) -> Any:
            if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
                return x
            given = id(x) in seen
            seen[id(x)] = ""
            return x.copy() if given else x

        return jax.tree.map(once, self.tx.init(params))

    def __call__(self, params: Any, opt_state: Any, batch: tuple[Any, ...], key: Any) -> tuple[Any, Any, dict]:
        """(params, opt_state, metrics) after one batch: (*args of apply, target). `params` and `opt_state` are given
        away; metrics are {name: 0-d array}: loss, and code/NAME, how often each code has come up; beside them `aux` as
        apply gave it, of a plan with has_aux."""
        return self._run(params, opt_state, batch, key)

    def _step(self, params: Any, opt_state: Any, batch: tuple[Any, ...], key: Any) -> tuple[Any, Any, dict]:
        *args, target = batch
        check_downhill(self._tried, params)
        captured = capture(self.plan, params, *args)
        f = jax.tree.map(widened, captured.prediction)  # bfloat16 has 128 uniform numbers to draw labels by
        n = self.loss.normaliser(f, target)
        draws = monte_carlo(self.loss, f, self._noise(f, key), target)
        value = self.loss.value(f, target) / n
        slope = jax.tree.map(lambda v: v[0] / n, empirical(self.loss, f, target))
        records = captured.records(draws, n, fisher=monte_carlo, cotangent=slope)

        def value_fn(params: Any) -> Any:
            out = self.plan.apply(params, *args)
            return self.loss.value(out[0] if self.plan.has_aux else out, target) / n

        given = {"records": records, "value": value, "value_fn": value_fn, "whole": params}
        given["nonnegative"] = self.loss.nonnegative
        moves, opt_state = self.tx.update(captured.gradients(slope), opt_state, params, **given)
        counts = {f"code/{code.name}": x for code, x in zip(Code, counts_of(opt_state), strict=True)}
        aux = {"aux": captured.aux} if self.plan.has_aux else {}
        return added(params, moves), opt_state, {"loss": value, **counts, **aux}

    def _noise(self, f: Any, key: Any) -> Any:
        """What `monte_carlo` takes, head by head from one key."""
        if isinstance(self.loss, Joint):
            keys = jax.random.split(key, len(self.loss.losses))
            heads = zip(keys, self.loss.losses, strict=True)
            return {head: _noise(loss, f[head], key, self.draws) for key, (head, loss) in heads}
        return _noise(self.loss, f, key, self.draws)


def step(
    plan: Plan,
    loss: Loss | Joint,
    tx: optax.GradientTransformationExtraArgs | None = None,
    draws: int = 1,
) -> Step:
    """A jitted (params, opt_state, batch, key) -> (params, opt_state, metrics) of sampled labels; `.init(params)` gives
    the state, batch is (*args of apply, target). Under has_aux metrics["aux"] is what apply gave beside the prediction,
    at the parameters before the step: the state of BatchNorm, which the next batch's args then hold.

    loss    SoftmaxCrossEntropy(), Bernoulli(), Gaussian() or a Joint of them, averaged as its `normaliser` says
    tx      a chain with kfac(plan), refused where it goes up a gradient; the default sets its own rate, momentum and
            damping: optax.chain(kfac(plan, step=SelfTuning()), optax.scale(-1.0))
    draws   labels sampled an example
    """
    import optax

    if draws < 1:
        raise ValueError(f"step got draws={draws}; need at least one sampled label an example")
    if tx is None:
        tx = optax.chain(kfac(plan, step=SelfTuning()), optax.scale(-1.0))
    return Step(plan, loss, optax.with_extra_args_support(tx), draws)


def _noise(loss: object, f: Any, key: Any, draws: int) -> Any:
    if isinstance(loss, Gaussian):
        return jax.random.normal(key, (draws, *f.shape), f.dtype)
    shape = f.shape[:-1] if isinstance(loss, SoftmaxCrossEntropy) else f.shape
    return jax.random.uniform(key, (draws, *shape), f.dtype)
