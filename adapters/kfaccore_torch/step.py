"""What both shells share: the plan, the core preconditioner and its state, draws of labels, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.assembled import matrices, tensors
from kfaccore_torch.atomic import again, left
from kfaccore_torch.beside import Beside
from kfaccore_torch.bridge import ordered, to_core, to_torch
from kfaccore_torch.capture import Capture
from kfaccore_torch.compiled import eagerly, uncompiled
from kfaccore_torch.distributed import Distributed
from kfaccore_torch.draw import Batch, Drawn, drawn, measured
from kfaccore_torch.kept import keeping
from kfaccore_torch.kinds import Rest
from kfaccore_torch.launched import Launch
from kfaccore_torch.losses import objective
from kfaccore_torch.lost import Lost
from kfaccore_torch.observe import Observed, Observer
from kfaccore_torch.outputs import nothing
from kfaccore_torch.plan import modules, unwrapped
from kfaccore_torch.planning import Planning
from kfaccore_torch.precision import by_layer
from kfaccore_torch.separate import Separate
from kfaccore_torch.settings import Settings
from kfaccore_torch.settle import Layer
from kfaccore_torch.share import check_whole
from kfaccore_torch.unseen import completed, within


class Engine(Planning):
    """Plan, core and state of one model."""

    def __init__(self, model: nn.Module, loss: Any, core: kf.Preconditioner, settings: Settings) -> None:
        self.model = model
        self.given = core
        self.core = core
        self.settings = settings
        self.objective = keeping(objective(loss))
        self.observer = Observer()
        self.lost = Lost()
        self.mixing: set[str] = set()  # layers whose rows were seen to mix examples when they were last observed
        self._observed: set[str] = set()  # layers observed since the last step
        self.called: set[str] = set()  # layers seen in a forward since the last step
        self.beyond: set[str] = set()  # layers seen since the last step in a loss behind no prediction, or in a term
        self.plainly: set[str] = set()  # of these, layers that keep their plain gradients
        self.products: dict[str, str] = {}  # parameter -> how its product was made when it was last seen
        self._kept: tuple[Any, ...] = ()  # the batch of a step that failed after its statistics were taken
        self.new = False  # whether layers joined since the last step, which must not wait for the clocks
        if settings.draws_on < 1:
            check_whole(core)
        if kf.own_gradients(core) and settings.fisher is not kf.empirical:
            method = core.network or core.methods
            raise ValueError(f"{method} takes the loss's own gradients: pass fisher=kfaccore.empirical")
        self.plan = self._planned(modules(model, settings.skip))
        if not self.plan.trained:
            raise ValueError(f"no parameter of {type(unwrapped(model)).__name__} is covered: none is trained")
        self.stand()
        self._state: Any = None
        self._blocks = None
        self.beside = Beside(model, self.device)
        self._due: tuple[Any, kf.Preconditioner, bool] | None = None
        self._precision: tuple[Any, dict[str, str], dict[str, kf.Precision] | None] | None = None
        self.launch = Launch()
        self.separate = Separate()
        self._info: kf.Info | Callable[[], kf.Info] | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around work of the core: its place in the device's queue, and the precision of its products."""
        precision = self.settings.precision or self.observed_precision()
        with ordered(self.namespace, self.device), kf.precisely(precision):
            yield

    def observed_precision(self) -> dict[str, kf.Precision] | None:
        """By layer, as calls showed it."""
        seen = self.plan, self.products
        if self._precision is None or self._precision[0] is not seen[0] or self._precision[1] is not seen[1]:
            self._precision = (*seen, by_layer(self.plan.layers, self.products))
        return self._precision[2]

    @property
    def due(self) -> bool:
        """Whether the next step uses records; of one state it is asked once. Of a model without modules that are known
        a forward must tell what its layers are."""
        if not self.plan.seen and not self.plan.layers:
            return True
        if self._due is None or self._due[0] is not self.state or self._due[1] is not self.core:
            self._due = self.state, self.core, self.core.wants_records(self.state)
        return self.new or self._due[2]

    def share(self, batch: Batch, wait: bool = True) -> Any:
        """n of a batch, 0 where nothing in it counts; a number that stays on the device, NaN there, where the host need
        not know it and shall not `wait`."""
        needed = self.core.comm.world > 1 or self.namespace != "torch" or self.core.rule.wants_own
        here = all(f.device == self.device for f in self.objective.heads(batch.f))
        unread = self.objective.unread_share(batch.f, batch.target) if here and not (wait or needed) else None
        return self.objective.share(batch.f, batch.target) if unread is None else unread

    def void(self, batch: Batch) -> str:
        """Why nothing in a batch counts."""
        if any(0 in head.shape for head in self.objective.heads(batch.f)):
            return nothing(batch.f)
        return "all labels of the batch are ignored (ignore_index), so no example counts and n is 0"

    def records(self, seen: Capture, batch: Batch, turn: int, n: float, exact: bool = False, **how: Any) -> Drawn:
        """One record a layer that was called, and what was observed of the calls; see `draw.drawn`."""
        found = drawn(self, seen, batch, turn, n, exact, **how)
        self._noted(found.observed)
        return found

    def measured(self, seen: Capture, batch: Batch, turn: int, n: float, **how: Any) -> tuple[dict[str, Any], Observed]:
        """What waits for the step in the place of `records`: Stats, or copies of rows; see `draw.measured`."""
        found, observed = measured(self, seen, batch, turn, n, **how)
        self._noted(observed)
        return found, observed

    def _noted(self, observed: Observed) -> None:
        """What mixes examples: what is found takes the place of what was found before, and joins what else was found of
        the same step."""
        names = {name for name, _ in observed.calls}
        self.mixing = (self.mixing - (names - self._observed)) | observed.mixing
        self._observed |= names

    @uncompiled
    def met(self, term: Any, f: Any = None) -> Any:
        """A loss at the prediction `f`, or a term without one, as it is; layers that are in it by themselves are noted
        where the next step uses records."""
        if self.due and isinstance(term, torch.Tensor):
            self.beyond |= within(self, term, () if f is None else self.objective.heads(f))
        return term

    def forget(self) -> None:
        """What was seen since the last step."""
        self.called = set()
        self.beyond = set()

    def completed(self, records: Mapping[str, Any], grads: dict[str, Any], n: float, plainly: bool = False) -> tuple:
        """Records and gradients of one step; see `unseen.completed`."""
        return completed(self, records, grads, n, plainly)

    def matrix(self, layer: Layer, tensors: dict[str, torch.Tensor]) -> Any:
        """Tensors like a layer's parameters, by role -> its matrix in the core's namespace."""
        return layer.matrix({role: to_core(x, self.namespace) for role, x in tensors.items()})

    def matrices(self, given: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
        """`matrix` of many layers."""
        if self.namespace == "torch":
            return matrices(self.plan.layers, given)
        return {name: self.matrix(self.plan.layers[name], found) for name, found in given.items()}

    def tensors_of(self, given: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
        """`tensors` of many layers."""
        if self.namespace == "torch":
            return tensors(self.plan.layers, given)
        return {name: self.tensors(self.plan.layers[name], matrix) for name, matrix in given.items()}

    def step(
        self, records: dict[str, list[Any]] | None, grads: dict[str, Any], batch: tuple[Any, ...] = (), **beside: Any
    ) -> dict[str, Any]:
        """The core's step, with its loss, own and lengths; state and info move on.

        batch   what the records are of: taken again after a step that failed, its statistics are not counted again
        """
        due = again(self.core.due(self.state, grads), self._kept, batch)
        begun: list[Any] = []
        given = {"fisher": self.settings.fisher, "begun": begun, **beside}
        try:
            updates, self.state, info = self.core.do(due, self.state, records, grads, **given)
        except BaseException as error:
            if isinstance(error, Exception):
                self.leave_word(error)
            if begun and self.core.donate and due.measures:
                self.state, anew = left(self.core, self.state, begun, records or {}, error)
                self._kept = () if anew else batch
            raise
        self._kept = ()
        self.new = False
        self.forget()
        self._observed = set()
        self._info = self.marked(info, grads)
        return updates

    @property
    def info(self) -> kf.Info | None:
        """What the last step did."""
        self._info = self._info() if callable(self._info) else self._info
        return self._info

    def tell(self, made: Callable[[], kf.Info]) -> None:
        """How the information of the last step is made, if it is asked for."""
        self._info = made

    def __getstate__(self) -> dict[str, Any]:
        """Without what was recorded on a device."""
        return {**self.__dict__, "launch": Launch(), "_info": self.info, "_kept": ()}

    def marked(self, info: kf.Info, names: Iterable[str]) -> kf.Info:
        """With what is known of the layers here."""
        marks = {name: {**info.layers.get(name, {}), "mixes": np.asarray(True)} for name in self.mixing & set(names)}
        for name in marks:
            if isinstance(self.plan.layers[name].kind, Rest):
                marks[name]["diagonal"] = np.asarray(True)
        return replace(info, layers={**info.layers, **marks})

    def leave_word(self, error: Exception) -> None:
        """Other ranks, which may lose the connection before they know, can then say why this one stops."""
        if isinstance(self.core.comm, Distributed):
            self.core.comm.failed(error)

    def tensors(self, layer: Layer, matrix: Any) -> dict[str, torch.Tensor]:
        """The inverse of `matrix`."""
        return {role: to_torch(x, layer.parameters[role]) for role, x in layer.arrays(matrix).items()}

    def write(self, directions: Mapping[str, Any]) -> None:
        """Directions into `.grad`: whole parameters in one operation, parts of one each by itself."""
        into: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for name, found in self.tensors_of(directions).items():
            layer = self.plan.layers[name]
            for role, x in found.items():
                grad = layer.parameters[role].grad
                if layer.partial(role):
                    layer.write(role, grad, x)  # pyright: ignore[reportArgumentType]
                else:
                    into.append(grad)  # pyright: ignore[reportArgumentType]
                    values.append(x)
        if into:
            torch._foreach_copy_(into, values)

    @contextmanager
    def captured(self) -> Iterator[Capture]:
        """Calls inside are seen; compiled models run eagerly meanwhile, as a graph shows no calls."""
        seen = Capture(self.plan)
        with eagerly(), seen:
            yield seen
        self.follow(seen)
        self.called |= set(seen.calls)
        if seen.products != self.products:
            self.products = {**self.products, **seen.products}
