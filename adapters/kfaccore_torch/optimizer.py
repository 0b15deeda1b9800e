"""One object that takes the whole step: forward, backward, direction, update, and the look back at the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore.layers import Linear
from kfaccore_torch.bridge import detached, ordered, to_core
from kfaccore_torch.capture import Call, Capture
from kfaccore_torch.masks import Told
from kfaccore_torch.observe import Observed
from kfaccore_torch.places import Place, Together
from kfaccore_torch.plan import unwrapped
from kfaccore_torch.records import called
from kfaccore_torch.report import Coverage
from kfaccore_torch.rows import output_rows, rows
from kfaccore_torch.step import Batch, Engine, Settings


class Optimizer:
    """Trains a model by K-FAC; by default it sets its own rate, momentum and damping.

        optimizer = Optimizer(model, nn.CrossEntropyLoss())
        for x, y in data:
            loss = optimizer.step(x, y)

    core       a kfaccore.Preconditioner with the step wanted; default KFAC() with SelfTuning()
    rest       parameters -> a torch optimizer, for parameters that are not covered; without it they are an error
    settings   fields of `Settings`

    `.grad` of covered parameters stays None: where a batch has fewer rows than a layer is wide, autograd is asked for
    the output gradients alone and the direction is built from them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        core: kf.Preconditioner | None = None,
        rest: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        **settings: Any,
    ) -> None:
        core = core or kf.Preconditioner(kf.KFAC(), step=kf.SelfTuning(), donate=True)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError("Optimizer sums gradients over ranks itself: give it the module without the wrapper")
        self.model = model
        self.engine = Engine(model, loss, core, Settings(**settings))
        self._make_rest = rest
        self.rest: torch.optim.Optimizer | None = None
        self._follow_rest()

    def _follow_rest(self) -> None:
        """The optimizer of what is not covered, over the parameters that the plan leaves it now."""
        plan, old = self.engine.plan, self.rest
        if plan.rest and self._make_rest is None:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in plan.uncovered.items())
            raise ValueError(f"these parameters are not covered; pass rest=torch.optim.Adam for them\n{reasons}")
        self.rest = self._make_rest(plan.rest.values()) if self._make_rest and plan.rest else None
        if old is not None and self.rest is not None:
            self.rest.state.update({p: old.state[p] for p in plan.rest.values() if p in old.state})

    @property
    def info(self) -> kf.Info | None:
        """What the last step did; `info.step` has rate, momentum, damping and reduction ratio."""
        return self.engine.info

    def report(self) -> Coverage:
        """Which parameters are covered, how, at what size; print it."""
        return self.engine.report()

    def step(
        self,
        inputs: Any,
        target: Any,
        mask: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        masks: Mapping[str, torch.Tensor] | None = None,
        examples: Any = None,
    ) -> float:
        """One update on a batch; the loss before it, penalty included.

        inputs   a tensor, a tuple of positional or a dict of keyword arguments of the model
        mask     (batch, positions), true where a position exists
        ids      (batch,) places of the examples in the dataset, for methods that remember examples
        masks, examples   as `Preconditioner.capture` takes them
        """
        engine, l2 = self.engine, self.engine.core.schedules.l2
        if engine.replan():
            self._follow_rest()
        judged = engine.core.rule.judges
        random = _random_state(engine.device) if judged else ()
        told = Told(mask, masks or {}, examples)
        with torch.enable_grad():
            with engine.captured() as seen:
                f = called(self.model, inputs)
            heads = engine.objective.heads(f)
            if any(head.dtype == torch.float16 for head in heads):
                raise ValueError(
                    "the prediction is float16, whose gradients underflow: need bfloat16, or Preconditioner"
                )
            value = engine.objective.value(f, target)
            batch = Batch(f, target, told, ids)
            n = engine.share(batch)
            if n <= 0 and engine.core.comm.world == 1:
                raise ValueError(f"no step was taken: {engine.void(batch)}; skip such a batch")
            if engine.objective.total:
                n /= engine.core.comm.world  # one sum over all ranks
            records, observed = (None, None)
            if n <= 0:  # the other ranks have examples, and wait for this one
                value = sum(head.sum() for head in heads) * 0.0
                records = {} if engine.due else None
            elif engine.due:
                records, observed = engine.records(seen, batch, 0, n)
            with ordered(engine.namespace, engine.device):
                grads, rest = self._gradients(value, seen, observed, batch, l2)
        if records is not None:
            engine.check_seen(records, grads)
            if engine.core.comm.world > 1:
                missing = grads.keys() - records.keys()
                records |= {name: engine.absent(name, n or 1e-30) for name in missing}
        before, grads, rest = self._summed(float(value.detach()), grads, rest, n)
        before += self._penalty(l2)
        with torch.no_grad(), ordered(engine.namespace, engine.device):
            updates = engine.step({name: [r] for name, r in records.items()} if records else None, grads)
            moves = self._moves(updates)
            old = [p.detach().clone() for p, _ in moves] if judged else []
            for p, move in moves:
                p.sub_(move)

            def place(share: float) -> None:
                for (p, move), kept in zip(moves, old, strict=True):
                    p.copy_(kept - share * move if share else kept)

            def loss() -> float:
                with _replayed(self.model, random, engine.device):
                    value = float(engine.objective.value(called(self.model, inputs), target))
                return self._mean(value, n) + self._penalty(l2)

            _, engine.state = engine.core.judge(engine.state, before, place, loss)
        if self.rest is not None:
            for p, g in zip(engine.plan.rest.values(), rest, strict=True):
                p.grad = g
            self.rest.step()
            self.rest.zero_grad()
        return before

    def _gradients(
        self, value: torch.Tensor, seen: Capture, observed: Observed | None, batch: Batch, l2: float
    ) -> tuple[dict[str, Any], tuple]:
        """The core's gradients of covered layers, Factored where that is cheaper, and those of the rest."""
        engine = self.engine
        layers = engine.plan.layers
        whole = bool(l2) or engine.core.comm.world > 1
        resting = kf.own_gradients(engine.core) and not engine.due  # every weight gradient is then made of given rows
        if resting:
            heads = engine.objective.heads(batch.f)
            observed = engine.observer.look(seen, layers, heads, batch.told)
        calls = _placed(seen, observed)
        edges = {n: c[0] for n, c in calls.items() if resting or (not whole and _factors(layers[n].kind, c))}
        odd = [n for n in edges if resting and (len(calls[n]) > 1 or not isinstance(layers[n].kind, Linear))]
        if odd:
            raise ValueError(f"layers {odd} are not linear layers called once: give them another method than FNGD")
        dense = [(name, role, p) for name in layers if name not in edges for role, p in layers[name].parameters.items()]
        wanted = [c.edge for c, _ in edges.values()] + [p for *_, p in dense] + list(engine.plan.rest.values())
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        grads: dict[str, Any] = {}
        for (name, (call, place)), g in zip(edges.items(), found[: len(edges)], strict=True):
            if g is not None:
                a = rows(layers[name], call, place, engine.namespace)
                g = to_core(output_rows(layers[name], call, detached(g), place), engine.namespace)
                if resting:
                    ids = None if batch.ids is None else to_core(batch.ids, engine.namespace)
                    g = kf.weighted(engine.core, engine.state, {name: g}, ids)[name]
                grads[name] = kf.Factored(a, g, 1.0)
        rest = found[len(edges) + len(dense) :]
        found = found[len(edges) :]
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for (name, role, p), g in zip(dense, found[: len(dense)], strict=True):
            if g is not None:
                tensors.setdefault(name, {})[role] = g + l2 * p.detach() if l2 else g
        for name, given in tensors.items():
            if len(given) == len(layers[name].parameters):
                grads[name] = engine.matrix(layers[name], given)
        return grads, rest

    def _summed(self, value: float, grads: dict, rest: tuple, n: float) -> tuple[float, dict, tuple]:
        """Loss and gradients of the global batch: means over ranks by their shares n of it."""
        engine = self.engine
        comm, layers = engine.core.comm, engine.plan.layers
        if comm.world == 1:
            return value, grads, rest
        present = [float(name in grads) for name in layers]  # ranks that differ must not meet in a sum
        n, value = self._weighed(n, value)
        total = comm.all_reduce([torch.tensor([n, value, *present], dtype=torch.float64)])[0].tolist()
        whole = 1.0 if engine.objective.total else total[0]
        odd = [name for name, count in zip(layers, total[2:], strict=True) if 0 < count < comm.world]
        if odd:
            error = ValueError(f"layers {odd} take part in this step on some ranks only; need the same on all")
            engine.leave_word(error)
            raise error
        scaled = {name: grads[name] * (n / whole) for name in layers if name in grads}
        pairs = zip(engine.plan.rest.values(), rest, strict=True)
        others = [torch.zeros_like(p) if g is None else g * (n / whole) for p, g in pairs]
        with ordered(engine.namespace, engine.device):
            grads, others = comm.all_reduce([scaled, others])
        return total[1] / whole, grads, tuple(others)

    def _mean(self, value: float, n: float) -> float:
        """A loss of the global batch, from this rank's and its share n."""
        if self.engine.core.comm.world == 1:
            return value
        found = self.engine.core.comm.all_reduce([torch.tensor(self._weighed(n, value), dtype=torch.float64)])
        n, total = found[0].tolist()
        return total if self.engine.objective.total else total / n

    def _weighed(self, n: float, value: float) -> tuple[float, float]:
        """What a rank's loss weighs in that of all, and the loss times it; sums are added as they are."""
        if self.engine.objective.total:
            return 1.0, value
        return n, n * value if n else 0.0

    def _penalty(self, l2: float) -> float:
        if not l2:
            return 0.0
        covered = (p for layer in self.engine.plan.layers.values() for p in layer.parameters.values())
        return 0.5 * l2 * sum(float((p.detach() ** 2).sum()) for p in covered)

    def _moves(self, updates: dict[str, Any]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """What to subtract from each parameter: update + alpha weight_decay parameter."""
        engine, found = self.engine, []
        told = engine.info.step if engine.info else {}
        shrink = float(told["alpha"]) * engine.core.schedules.weight_decay
        for name, matrix in updates.items():
            layer = engine.plan.layers[name]
            for role, x in engine.tensors(layer, matrix).items():
                p = layer.parameters[role]
                found.append((p, x + shrink * p.detach() if shrink else x))
        return found

    def save(self, path: Any, **meta: Any) -> None:
        """Covered parameters and state, without that of `rest`, in one file that every adapter of kfaccore reads."""
        self.engine.save(path, **meta)

    def load(self, path: Any) -> None:
        """Continue from a file of any adapter; ValueError, and no change, if it is another model's."""
        self.engine.load(path)

    def state_dict(self) -> dict[str, Any]:
        """For torch.save; resumes bit for bit on any device."""
        rest = {} if self.rest is None else {"rest": self.rest.state_dict()}
        return self.engine.state_dict() | rest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; ValueError, and no change, if it is another model's."""
        if (self.rest is not None) != ("rest" in state):
            raise ValueError("one of the state and this optimizer has parameters outside K-FAC and the other has not")
        self.engine.load_state_dict(state)
        if self.rest is not None:
            self.rest.load_state_dict(state["rest"])


def _placed(seen: Capture, observed: Observed | None) -> dict[str, list[tuple[Call, Place]]]:
    """The calls of each layer and where their rows stand; all together where nobody needs to know."""
    found: dict[str, list[tuple[Call, Place]]] = {}
    if observed is None:
        return {name: [(call, Together(call.rows)) for call in calls] for name, calls in seen.calls.items()}
    for (name, call), place in zip(observed.calls, observed.places(False), strict=True):
        found.setdefault(name, []).append((call, place))
    return found


def _factors(kind: Any, calls: list[tuple[Call, Place]]) -> bool:
    """Whether applying inverses to the rows is cheaper than to the gradient: one call with fewer rows than width."""
    if not isinstance(kind, Linear) or len(calls) != 1:
        return False
    call, place = calls[0]
    return place.mask() is None and call.x.numel() // kind.d_in < max(kind.d_in, kind.d_out)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(model: nn.Module, random: tuple, device: torch.device) -> Iterator[None]:
    """The same dropout as in the step's own forward; running statistics are as they were afterwards."""
    buffers = [(b, b.detach().clone()) for b in unwrapped(model).buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], device)
        yield
    for buffer, kept in buffers:
        buffer.copy_(kept)
