"""Training with penalties that the data choose: l2 a layer, tuned between rounds by the evidence.

Between two rounds theta is held, and each layer's precision p = count l2 goes to the maximiser of

    -loss - 1/2 sum over layers (log det(I + count F~ / p) + p |theta|^2),

F~ being the curvature that the preconditioner holds anyway (`kfaccore.tuned`): no pass over the data is added.
Source: Immer et al. 2021 (marginal-likelihood training), MacKay 1992.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kfaccore import Code, Curvature, Posterior, Preconditioner, evidence, tuned
from kfaccore_numpy.train import Progress, fit, initial_state, mean_loss

if TYPE_CHECKING:
    from kfaccore.method import State as Held
    from kfaccore.precondition.state import State
    from kfaccore.xp.arrays import Array
    from kfaccore_numpy.tasks import Task

START = 1e-4  # l2 where none is given: weak enough to leave the data the first word


@dataclass(frozen=True)
class Tuned:
    """What one tuning found.

    step       after so many updates
    l2         {layer: penalty of the mean loss} from then on
    evidence   the log evidence at those penalties
    codes      {layer: how the search ended}; a layer that is not OK keeps the penalty it had
    """

    step: int
    l2: dict[str, float]
    evidence: float
    codes: dict[str, str]


class Online:
    """A preconditioner whose l2 is tuned every `every` steps of `fit`; `found` lists every tuning, the last one last.

    l2   a number, or one a layer: where it starts, all positive
    """

    def __init__(self, optimiser: Preconditioner, task: Task, l2: float | Mapping[str, float], every: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; need at least 1 step between two tunings")
        self.optimiser = optimiser
        self.task = task
        self.every = every
        self.l2: dict[str, float] = {}
        self.found: list[Tuned] = []
        self.begin(l2)

    def begin(self, l2: float | Mapping[str, float]) -> None:
        """The penalties from here on: where a run starts, or goes on. ValueError for what is not positive."""
        names = list(self.task.network.blocks())
        given = dict(l2) if isinstance(l2, Mapping) else dict.fromkeys(names, l2)
        if set(given) != set(names) or not all(0 < value < float("inf") for value in given.values()):
            raise ValueError(f"l2 is {l2}; need a positive number, one or one for each of {names}")
        self.l2 = {name: float(value) for name, value in given.items()}
        self.optimiser = replace(self.optimiser, schedules=replace(self.optimiser.schedules, l2=self.l2))

    def fit(
        self,
        params: dict[str, Array],
        data: tuple[Array, Array],
        *,
        steps: int,
        seed: int = 0,
        state: State | None = None,
        start: int = 0,
    ) -> Iterator[Progress]:
        """As `kfaccore_numpy.fit`, step by step; between rounds the penalties move, and their seconds count.

        Resumed at `start` with its state and the l2 it had, a run continues bit for bit.
        ValueError before the first step for a method that says no curvature.
        """
        network = self.task.network
        held: State = initial_state(network, params, self.optimiser, data[0].shape[0]) if state is None else state
        self._curvature(held)  # a method that has none is refused before anything is trained
        seconds = 0.0
        while start < steps:
            end = min(steps, (start // self.every + 1) * self.every)
            options = {"batch": self.task.batch, "steps": end, "seed": seed, "state": held, "start": start}
            progress = None
            for progress in fit(network, params, data, self.task.loss, self.optimiser, **options):
                params = progress.params
                held = progress.state
                if progress.step < end or end == steps:
                    yield replace(progress, seconds=seconds + progress.seconds)
            if end < steps and progress is not None:
                begun = time.perf_counter()
                self.tune(end, params, data, held)
                seconds += progress.seconds + time.perf_counter() - begun
                yield replace(progress, seconds=seconds)
            start = end

    def tune(self, step: int, params: dict[str, Array], data: tuple[Array, Array], state: State) -> None:
        """Move the penalties to where the evidence, theta held, is largest."""
        count = float(data[0].shape[0])
        before = Posterior(params, self._curvature(state), {k: count * x for k, x in self.l2.items()}, count)
        after, codes = tuned(before)
        named = {name: Code(int(code[0])) for name, code in codes.items()}
        moved = {name: float(after.prior(name)) / count for name, code in named.items() if code == Code.OK}
        self.begin({**self.l2, **moved})
        held = replace(before, precision={k: count * x for k, x in self.l2.items()})
        loss = count * mean_loss(self.task.network, params, data, self.task.loss)
        told = {name: code.name for name, code in named.items()}
        self.found.append(Tuned(step, self.l2, float(evidence(held, loss)), told))

    def _curvature(self, state: State) -> Curvature:
        methods = self.optimiser.methods
        if methods is None:
            raise ValueError("a network-level method alone says no curvature layer by layer: give `methods`")
        layers: dict[str, Held] = dict(state.layers)
        return Curvature.of(methods, layers, dict(state.blocks))
