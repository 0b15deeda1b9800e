"""One training step: capture and gradients in TensorFlow, eager or in a graph; the core on NumPy inside py_function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorflow as tf

import kfaccore as kf
from kfaccore_tensorflow.bridge import HALF, to_numpy, to_tensor, widened
from kfaccore_tensorflow.kinds import own
from kfaccore_tensorflow.losses import Objective, count_draws, masked, objective
from kfaccore_tensorflow.plan import Part, coverage
from kfaccore_tensorflow.tap import Calls


@dataclass(frozen=True)
class Settings:
    """What preconditions and when.

    core               a kfaccore.Preconditioner, instead of method, clocks, schedules and step, which are then its
    method             one for all layers or a mapping from layer to method; clocks, schedules: as Preconditioner
    step               from directions to updates; SelfTuning() and LineSearch() also judge what was applied
    fisher, draws      kfaccore's monte_carlo (with so many draws), type2, empirical or forward_only
    seed               of the draws: the same seed and step give the same bits
    strict             refuse models with trainable variables that are not covered, instead of warning once
    """

    method: Any = kf.KFAC()  # noqa: RUF009 frozen
    clocks: kf.Clocks = kf.Clocks()  # noqa: RUF009 frozen
    schedules: kf.Schedules = kf.Schedules()  # noqa: RUF009 frozen
    step: Any = kf.Fixed()  # noqa: RUF009 frozen
    fisher: Callable = kf.monte_carlo
    draws: int = 1
    seed: int = 0
    strict: bool = False
    core: kf.Preconditioner | None = None

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


class Engine:
    """A model's plan, objective and preconditioner, and what changes: the core's `state` and the last `info`."""

    def __init__(self, model: Any, loss: Any, settings: Settings) -> None:
        self.plan = coverage(model, settings.strict)
        if self.plan.refused:
            listed = "; ".join(f"{name}: {reason}" for name, (_, reason) in self.plan.refused.items())
            warnings.warn(f"these layers keep plain gradients: {listed}. strict=True makes that an error", stacklevel=4)
        self.objective: Objective = objective(loss, settings.fisher)
        self.settings = settings
        self.preconditioner = settings.preconditioner()
        wide = any(v.dtype == "float64" for part in self.plan.parts for v in part.variables.values())
        self.state = self.preconditioner.init(self.plan.blocks(), np.zeros(1, "float64" if wide else "float32"))
        self.info: kf.Info | None = None

    def tree(self) -> dict[str, Any]:
        """{"params": {part: matrix, 2-D if there is one block}, "state": state}."""
        params = {}
        for part in self.plan.parts:
            matrix = part.matrix({role: to_numpy(v.value) for role, v in part.variables.items()})
            params[part.name] = matrix[0] if matrix.ndim == 3 and len(matrix) == 1 else matrix
        return {"params": params, "state": self.state}

    def replant(self, tree: dict[str, Any]) -> None:
        """The inverse of `tree`."""
        for part in self.plan.parts:
            for role, value in part.arrays(tree["params"][part.name]).items():
                part.variables[role].assign(to_tensor(value, part.variables[role].dtype))
        self.state = tree["state"]

    def penalty(self) -> Any:
        """l2/2 |theta|^2 over covered variables, part of the loss; 0 without l2."""
        l2 = self.settings.schedules.penalties([part.name for part in self.plan.parts], self.state.step)
        if not l2:
            return 0.0
        every = [(l2[part.name], v) for part in self.plan.parts for v in part.variables.values()]
        dtype = every[0][1].dtype
        return tf.add_n([0.5 * weight * tf.reduce_sum(tf.square(tf.cast(v, dtype))) for weight, v in every])

    def saved(self) -> bytes:
        """The state as one safetensors file."""
        with TemporaryDirectory() as folder:
            kf.save(Path(folder, "state"), self.state)
            return Path(folder, "state").read_bytes()

    def restore(self, saved: bytes) -> None:
        """Puts back what `saved` gave; ValueError when it is the state of other layers or settings."""
        with TemporaryDirectory() as folder:
            Path(folder, "state").write_bytes(saved)
            self.state = kf.load(Path(folder, "state"), like=self.state)

    def updates(
        self, tape: Any, calls: Calls, f: Any, data: tuple[Any, Any], variables: Sequence[Any], gradients: list[Any]
    ) -> list[Any]:
        """`gradients` of the loss with those of covered variables turned into the core's updates.

        f       the model's prediction, made inside the persistent `tape` and `tap`
        data    (target, sample weight or None)
        """
        place = {id(v): i for i, v in enumerate(variables)}
        self.plan.check(variables)
        given = {key for key, i in place.items() if gradients[i] is not None}
        used = [part for part in self.plan.parts if all(id(v) in given for v in part.variables.values())]
        used, count, tensors = self.captured(used, tape, calls, f, data)
        where = [place[id(v)] for part in used for v in part.variables.values()]
        grads = [widened(gradients[i]) for i in where]
        core = partial(self._core, used, [part.times(calls) for part in used])
        found = tf.py_function(core, [count, *tensors, *grads], [tf.float64, *(g.dtype for g in grads)])
        shrink = found.pop(0)
        new = list(gradients)
        for i, update in zip(where, found, strict=True):
            update = tf.ensure_shape(update, variables[i].shape)
            if self.settings.schedules.weight_decay:
                update += tf.cast(shrink, update.dtype) * tf.cast(variables[i], update.dtype)
            new[i] = tf.cast(update, gradients[i].dtype)
        return new

    def captured(
        self, parts: Sequence[Part], tape: Any, calls: Calls, f: Any, data: tuple[Any, Any]
    ) -> tuple[list[Part], Any, list[Any]]:
        """The parts the batch went through, (n, batch), and input and output gradients of their calls in turn."""
        _check_prediction(f)
        used = [part for part in parts if part.times(calls)]
        seen = [call for part in used for layer in part.layers for call in calls[id(layer)]]
        count, g = self._output_gradients(tape, f, data, [output for _, output in seen])
        pairs = zip((x for x, _ in seen), g, strict=True)
        return used, count, [widened(x) for pair in pairs for x in pair]

    def _output_gradients(self, tape: Any, f: Any, data: tuple[Any, Any], outputs: list[Any]) -> tuple[Any, list[Any]]:
        """(n, batch), and (draws, *o.shape) for each output o; zeros where the clock wants no records."""
        draws = count_draws(self.settings.fisher, self.settings.draws, tuple(f.shape))
        kind = tf.float32 if f.dtype in HALF else f.dtype
        given = [widened(f), *(x for x in (data[0], masked(f, data[1])) if x is not None)]

        def wanted() -> list[Any]:
            count, drawn = tf.py_function(self._draw, given, [tf.float64, kind])
            drawn = tf.cast(tf.reshape(drawn, tf.concat([[draws], tf.shape(f)], 0)), f.dtype)
            rows = [tape.gradient(f, outputs, output_gradients=drawn[i]) for i in range(draws)]
            zeros = [tf.zeros_like(o) for o in outputs]
            rows = [[z if g is None else g for z, g in zip(zeros, row, strict=True)] for row in rows]
            g = [tf.stack(list(r)) for r in zip(*rows, strict=True)] if rows else [z[None][:0] for z in zeros]
            return [tf.ensure_shape(count, (2,)), *g]

        def unwanted() -> list[Any]:
            return [tf.zeros(2, tf.float64), *(tf.zeros((draws, *o.shape[1:]), o.dtype)[:, None] for o in outputs)]

        if self.settings.clocks.update == 1:
            count, *g = wanted()
        else:
            one = tf.reshape(f, [-1])[:1]  # orders the question behind the step before, in graphs of several steps
            due = tf.py_function(lambda _: self.preconditioner.wants_records(self.state), [one], tf.bool)
            count, *g = tf.cond(tf.ensure_shape(due, ()), wanted, unwanted)
        return count, g

    def _draw(self, f: Any, y: Any, weight: Any = None) -> tuple[Any, Any]:
        """((n, batch), draws) of the batch, by the core."""
        f = to_numpy(f)
        y = to_numpy(y)
        rng = np.random.default_rng([self.settings.seed, self.state.step])
        weight = None if weight is None else to_numpy(weight)
        draws = self.objective.draws(self.settings.fisher, self.settings.draws, f, y, weight, rng)
        return to_tensor([self.objective.share(f, y), len(f)], tf.float64), to_tensor(draws, f.dtype)

    def _core(self, parts: list[Part], times: list[int], count: Any, *tensors: Any) -> list[Any]:
        """The factor of decoupled weight decay, then updates of the parts' variables.

        tensors   what `captured` gave, and the variables' gradients
        """
        arrays = iter([to_numpy(x) for x in tensors])
        records = unpacked(parts, times, to_numpy(count), arrays)
        grads = {part.name: part.matrix(dict(zip(part.variables, arrays, strict=False))) for part in parts}
        fisher = self.settings.fisher
        directions, self.state, self.info = self.preconditioner.step(self.state, records, grads, fisher)
        new = [part.arrays(own(directions[part.name])) for part in parts]
        shrink = float(self.info.step["alpha"]) * self.settings.schedules.weight_decay
        updates = [to_tensor(named[role]) for part, named in zip(parts, new, strict=True) for role in part.variables]
        return [to_tensor(shrink, tf.float64), *updates]


def unpacked(
    parts: Sequence[Part], times: Sequence[int], count: np.ndarray, arrays: Iterator[np.ndarray]
) -> dict[str, kf.Record] | None:
    """{name: Record} from what `captured` gave, the arrays used up; None where the clock wanted no records."""
    records = {}
    n, batch = (float(x) for x in count)
    for part, calls in zip(parts, times, strict=True):
        mine = list(islice(arrays, 2 * calls))
        if n > 0:
            found = record(part, list(zip(mine[::2], mine[1::2], strict=True)), n)
            if found.batch != batch:
                raise ValueError(f"layer {part.name!r} is called on {found.batch} rows of a batch of {batch:g}")
            records[part.name] = found
    return records or None


def record(part: Part, rows: list[tuple[np.ndarray, np.ndarray]], n: float) -> kf.Record:
    """The record of one part from (input, output gradients, draws first) of each of its calls, joined on shared."""
    found = []
    for x, gy in rows:
        some = gy if len(gy) else np.zeros((1, *gy.shape[1:]), gy.dtype)
        a, g = part.kind.rows(x, some)
        found.append(kf.Record(a, g[: len(gy)], n))
    if len({r.batch for r in found}) != 1:
        raise ValueError(f"layer {part.name!r} is called on {[r.batch for r in found]} rows; need one size")
    if len(found) == 1:
        return found[0]
    g = np.concatenate([r.g for r in found], axis=3)
    if isinstance(found[0].a, kf.Ids):
        index = np.concatenate([r.a.index for r in found], axis=1)
        return kf.Record(kf.Ids(index, found[0].a.size), g[:, 0], n)
    return kf.Record(np.concatenate([r.rows() for r in found], axis=2), g, n)


def _check_prediction(f: Any) -> None:
    if not tf.is_tensor(f) or f.shape.rank is None or f.shape.rank < 2:
        raise ValueError(f"the model returns {f!r}; need one tensor (batch, ..., outputs)")
    if any(size is None for size in f.shape[1:]):
        raise ValueError(f"the prediction has shape {f.shape}; all axes but the batch must be known")
