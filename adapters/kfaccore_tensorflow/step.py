"""What every training step shares: the plan, the core preconditioner and its state; capture and gradients in a
TensorFlow graph, the core on NumPy inside py_function, which calls nothing of TensorFlow's but constants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow import draw
from kfaccore_tensorflow.bridge import to_numpy, to_tensor, widened
from kfaccore_tensorflow.heads import objective
from kfaccore_tensorflow.matrices import of_plan, put
from kfaccore_tensorflow.owners import Owners
from kfaccore_tensorflow.penalty import penalty, weights
from kfaccore_tensorflow.plan import Part, Plan
from kfaccore_tensorflow.rest import spanned
from kfaccore_tensorflow.resume import restored, saved
from kfaccore_tensorflow.tensors import Pass, Tensors, gathered

LATER = (1, 101, 1009, 10007, 1000003)  # steps at which it is asked whether a method rests


@dataclass(frozen=True)
class Settings:
    """What preconditions and when.

    core               a kfaccore.Preconditioner, instead of method, clocks, schedules and step, which are then its
    method             one for all layers or a mapping from layer to method; clocks, schedules: as Preconditioner
    step               from directions to updates; SelfTuning() and LineSearch() also judge what was applied
    fisher, draws      kfaccore's monte_carlo (with so many draws), type2, empirical or forward_only; by default
                       monte_carlo, or empirical for methods that take the loss's own gradients, such as FNGD
    seed               of the draws: the same seed and step give the same bits
    strict             refuse models with trainable variables that are not covered, instead of warning once
    uncovered          the method of variables that are not covered, kfaccore.Diagonal(): read as a row that all
                       examples share. By default they keep plain gradients, but for steps that judge what they did,
                       which need all variables
    """

    method: Any = kf.KFAC()  # noqa: RUF009 frozen
    clocks: kf.Clocks = kf.Clocks()  # noqa: RUF009 frozen
    schedules: kf.Schedules = kf.Schedules()  # noqa: RUF009 frozen
    step: Any = kf.Fixed()  # noqa: RUF009 frozen
    fisher: Callable | None = None
    draws: int = 1
    seed: int = 0
    strict: bool = False
    core: kf.Preconditioner | None = None
    uncovered: kf.Diagonal | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; need at least 1")
        if self.core is None:
            return
        if not isinstance(self.core, kf.Preconditioner):
            raise TypeError(f"core is {self.core!r}; need a kfaccore.Preconditioner, or give method=")
        method = self.core.methods if self.core.network is None else self.core.network
        own = {"method": method, "clocks": self.core.clocks, "schedules": self.core.schedules, "step": self.core.rule}
        for name, value in own.items():
            if getattr(self, name) not in (value, getattr(Settings, name)):
                raise ValueError(f"both core and {name} are given; give {name} to the Preconditioner")
            object.__setattr__(self, name, value)

    def preconditioner(self) -> kf.Preconditioner:
        """The core's; it may reuse the buffers of the state it is given, which only the engine holds."""
        if self.core is not None:
            return self.core
        return kf.Preconditioner(self.method, self.clocks, self.schedules, step=self.step, donate=True)

    def drawn(self) -> Callable:
        """The Fisher in use; ValueError where a method cannot take the one that was asked for."""
        core = self.preconditioner()
        own = kf.own_gradients(core)
        if own and self.fisher not in (None, kf.empirical):
            method = core.network or core.methods
            raise ValueError(f"{method} takes the loss's own gradients: pass fisher=kfaccore.empirical")
        return self.fisher or (kf.empirical if own else kf.monte_carlo)


class Engine:
    """A model's plan, objective and preconditioner, and what changes: the core's `state` and the last `info`.

    Without a plan the first traced step makes it.
    """

    def __init__(self, loss: Any, settings: Settings, plan: Plan | None = None, names: Sequence[str] = ()) -> None:
        self.settings = settings
        self.fisher = settings.drawn()
        self.objective: Any = objective(loss, self.fisher, names=names)
        self.preconditioner = settings.preconditioner()
        self.plan = Plan((), {})
        self.ready = False
        self.owners = Owners()
        self.l2: dict[str, Any] = {}  # of the step that is being traced
        self.signs = not kf.own_gradients(self.preconditioner)
        self.state: Any = None
        self.info: kf.Info | None = None
        self.plain: set[str] = set()  # variables that were named because only their gradients are known
        self.loose: list[str] = []  # operations whose draws a judge's pass does not repeat
        self.unseen: set[str] = set()  # parts that were named because a mask of theirs could not be laid
        self.padded = False  # whether padding that no mask tells of was named
        self.flat = False  # whether a prediction of more rows than inputs was named
        self.negative = False  # whether negative weights were named
        self.void = False  # whether nothing counted in the last batch
        if plan is not None:
            self.adopt(plan)

    @property
    def mixing(self) -> list[str]:
        """Parts whose rows move several examples, as far as batches have shown."""
        return self.owners.mixing

    def adopt(self, plan: Plan) -> None:
        """Take a plan for this model's, or see that it is the same; ValueError where it is not."""
        if self.ready:
            self.plan.same(plan)
            return
        if self.settings.strict:
            plan.strictly()
        uncovered = self.settings.uncovered or (kf.Diagonal() if self.settings.step.judges else None)
        if plan.refused and uncovered is not None:
            plan, self.preconditioner = spanned(plan, self.preconditioner, uncovered)
        if plan.refused:
            listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in plan.refused.items())
            message = f"these layers keep plain gradients: {listed}. strict=True makes that an error"
            warnings.warn(f"{message}, uncovered=kfaccore.Diagonal() gives them a diagonal", stacklevel=4)
        if not plan.parts:
            raise ValueError(f"no variable of this model is covered: {plan}")
        self.plan = plan
        wide = any(v.dtype == "float64" for part in plan.parts for v in part.variables.values())
        self.state = self.preconditioner.init(plan.blocks(), np.zeros(1, "float64" if wide else "float32"))
        resting = [k for k in LATER if self.preconditioner.resting(replace(self.state, step=k))]
        if resting:
            raise ValueError(
                f"{self.settings.method} shares coefficients between epochs, for which this shell has no gradients: "
                f"compute them at every step, steps=0"
            )
        self.ready = True

    def tree(self) -> dict[str, Any]:
        """{"params": {part: matrix, 2-D if there is one block}, "state": state}."""
        return {"params": of_plan(self.plan), "state": self.state}

    def replant(self, tree: dict[str, Any]) -> None:
        """The inverse of `tree`."""
        put([(part, np.asarray(tree["params"][part.name])) for part in self.plan.parts])
        self.state = tree["state"]

    def penalise(self) -> None:
        """Take the l2 of the step that is being traced."""
        self.l2 = weights(self)

    def penalty(self) -> Any:
        """l2/2 |theta|^2 over covered variables, part of the loss; 0 without l2."""
        return penalty(self, self.l2)

    def saved(self) -> bytes:
        """The state as one safetensors file."""
        return saved(self.state, [part.name for part in self.plan.parts])

    def restore(self, given: bytes) -> None:
        """Puts back what `saved` gave; ValueError when it is the state of other layers or settings."""
        self.state = restored(given, self.state, [part.name for part in self.plan.parts])

    def updates(self, given: Pass, variables: Sequence, gradients: list) -> list:
        """`gradients` of the loss of a forward pass with those of covered variables turned into the core's updates."""
        if given.loss is None:
            raise TypeError("updates need the loss of the batch; see Pass")
        place = {id(v): i for i, v in enumerate(variables)}
        self.plan.check(variables)
        used = {key for key, i in place.items() if gradients[i] is not None}
        read = {part.name for part in self.plan.parts if part.whole} | given.seen.calls.keys()
        parts = [p for p in self.plan.parts if p.name in read and all(id(v) in used for v in p.variables.values())]
        self._name(parts, [v for v, g in zip(variables, gradients, strict=True) if g is not None])
        tensors = gathered(self, parts, given)
        where = list(dict.fromkeys(place[id(v)] for part in parts for v in part.variables.values()))
        grads = [widened(gradients[i]) for i in where]
        core = partial(self._core, parts, tensors, [variables[i] for i in where])
        flat = [tf.cast(given.loss, tf.float64), *tensors.flat(), *grads]
        found = tf.py_function(core, flat, [tf.float64, *(g.dtype for g in grads)])
        shrink = found.pop(0)
        new = list(gradients)
        for i, update in zip(where, found, strict=True):
            update = tf.ensure_shape(update, variables[i].shape)
            if self.settings.schedules.weight_decay:
                update += tf.cast(shrink, update.dtype) * tf.cast(variables[i], update.dtype)
            new[i] = tf.cast(update, gradients[i].dtype)
        return new

    def _name(self, parts: list[Part], moved: list[Any]) -> None:
        """A warning of variables with a gradient that no draw of the prediction comes to; ValueError where it is strict
        or where the step judges what it did, which needs a curvature of all of them."""
        known = {id(v) for part in parts for v in part.variables.values()}
        known |= {id(v) for refused, _ in self.plan.refused.values() for v in refused}
        plain = [v.path for v in moved if id(v) not in known]
        if not plain:
            return
        message = (
            f"{plain} have a gradient of the loss and no curvature, since the prediction is not made of them: they "
            f"reach a loss of the model's own alone, as of add_loss. Let the model return what that loss is of, with a "
            f"loss for each output (kfaccore.Joint, or a dict), or freeze them"
        )
        if self.settings.strict or self.settings.step.judges:
            raise ValueError(message)
        if not self.plain >= set(plain):
            self.plain |= set(plain)
            warnings.warn(f"{message}. Until then they keep plain gradients", stacklevel=2)

    def _core(self, parts: list[Part], tensors: Tensors, variables: list, loss: Any, *flat: Any) -> list[Any]:
        """The factor of decoupled weight decay, then updates of the variables.

        flat   what `gathered` gave, and the variables' gradients
        """
        arrays = [to_numpy(x) for x in flat]
        count = len(arrays) - len(variables)
        taken = draw.recorded(self, tensors, arrays[:count])
        self.void = taken is None and self.preconditioner.wants_records(self.state)
        if self.void:  # every label is ignored: there is nothing to learn, and nothing to judge
            warnings.warn("a batch in which nothing counts was left out", stacklevel=2)
            return [to_tensor(0.0, tf.float64), *(to_tensor(np.zeros_like(g)) for g in arrays[count:])]
        gradients = dict(zip(map(id, variables), arrays[count:], strict=True))
        grads = {p.name: p.matrix({role: gradients[id(v)] for role, v in p.variables.items()}) for p in parts}
        directions = self._directions(taken, grads, float(loss))
        new = {id(v): np.zeros(tuple(v.shape), gradients[id(v)].dtype) for v in variables}
        for part in parts:
            for role, x in part.arrays(np.asarray(directions[part.name])).items():
                new[id(part.variables[role])] += x
        assert self.info is not None
        shrink = float(self.info.step["alpha"]) * self.settings.schedules.weight_decay
        return [to_tensor(shrink, tf.float64), *(to_tensor(x) for x in new.values())]

    def _directions(self, taken: draw.Taken | None, grads: dict[str, np.ndarray], loss: float) -> dict[str, Any]:
        records, own = (None, {}) if taken is None else (taken.drawn, taken.own)
        # of weights of both signs only differences count; what else the model adds to its loss is not known
        nonnegative = None if self.objective.core.nonnegative and not self.negative else False
        directions, self.state, self.info = self.preconditioner.step(
            self.state, records, grads, self.fisher, loss=loss, own=own, nonnegative=nonnegative
        )
        return directions
