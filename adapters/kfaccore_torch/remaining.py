"""The optimizer of the parameters that are not covered: one object for the whole run, whose groups follow the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kfaccore_torch.grafting import check_alone, finite
from kfaccore_torch.plan import Plan

Made = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Remaining:
    """What `make` makes of the parameters that a plan leaves over.

    It is made once, so that rates, groups and moments that a schedule or its owner changed stay: a parameter that is
    frozen stays in its group, one that joins comes to where `make` would have it, one that is covered leaves.

    optimizer   None where there is nothing for it
    """

    def __init__(self, make: Made | None) -> None:
        self.make = make
        self.optimizer: torch.optim.Optimizer | None = None
        self._named: dict[str, nn.Parameter] = {}  # what it has of the model

    def follow(self, plan: Plan) -> None:
        """Take what the plan leaves over now; ValueError for that without a `make`."""
        if plan.rest and self.make is None and plan.seen:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in plan.uncovered.items())
            raise ValueError(f"these parameters are not covered; pass rest=torch.optim.Adam for them\n{reasons}")
        if self.make is None:
            return
        now = {name: p for name, p, _ in plan.made_of}
        names = {id(p): name for name, p in reversed(now.items())}
        covered = {id(p) for layer in plan.layers.values() for p in layer.parameters.values()}
        stays = {names[id(p)]: p for p in self._named.values() if id(p) in names}  # whatever they are called now
        gone = {name: p for name, p in self._named.items() if id(p) not in names}
        instead = {name: now[name] for name in gone if name in now and name not in stays}
        new = {id(p): p for p in stays.values()} | {id(p): instead.get(name) for name, p in gone.items()}
        stays |= instead
        self._exchange({key: p if p is not None and id(p) not in covered else None for key, p in new.items()})
        self._named = {name: p for name, p in stays.items() if id(p) not in covered}
        self._join({name: p for name, p in plan.rest.items() if name not in self._named})

    def _exchange(self, new: Mapping[int, nn.Parameter | None]) -> None:
        """Put parameters in the place of others, by id, or leave these out; one in the place of another begins without
        moments."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            found = [new.get(id(p), p) for p in group["params"]]
            for p, other in zip(group["params"], found, strict=True):
                if other is not p:
                    self.optimizer.state.pop(p, None)
            group["params"][:] = [p for p in found if p is not None]
        if not any(group["params"] for group in self.optimizer.param_groups):
            self.optimizer = None

    def _join(self, fresh: Mapping[str, nn.Parameter]) -> None:
        if not fresh or self.make is None:
            return
        if self.optimizer is None:
            made = self.make(fresh.values())
            check_alone(made)
            self.optimizer = made
            self._named = {**self._named, **fresh}
            return
        self._named = {**self._named, **fresh}
        groups = self.optimizer.param_groups
        if len(groups) == 1:
            groups[0]["params"] += fresh.values()
            return
        for i, group in enumerate(self.make(list(self._named.values())).param_groups):  # says where each would be
            ours = [p for p in group["params"] if any(p is x for x in fresh.values())]
            if i < len(groups):
                groups[i]["params"] += ours
            elif ours:
                self.optimizer.add_param_group({**group, "params": ours})

    def step(self, plan: Plan, grads: Sequence[torch.Tensor]) -> None:
        """One step with the gradients of what the plan leaves over; whatever else is there stays as it is."""
        if self.optimizer is None:
            return
        frozen = [p for name, p in self._named.items() if name not in plan.rest]
        aside = [p.grad for p in frozen]
        for p in frozen:
            p.grad = None
        for p, g in zip(plan.rest.values(), grads, strict=True):
            p.grad = g
        try:
            if finite(grads):  # else a moment would keep it; the core moves nothing either
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
            for p, g in zip(frozen, aside, strict=True):
                p.grad = g

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and whose each entry is; copies, as K-FAC's part is, that stay as training goes on."""
        found = {} if self.optimizer is None else {"rest": copy.deepcopy(self.optimizer.state_dict())}
        return found if self.make is None else {**found, "rest_names": self._labels()}

    def load_state_dict(self, state: Mapping[str, Any], plan: Plan) -> None:
        """Continue from `state_dict`, as far as it has the parameters that the plan leaves over: frozen ones wait in
        their groups, those that were frozen then begin anew. ValueError for a state of others."""
        names = state.get("rest_names")
        listed = self.optimizer is not None if names is None else any(names)
        if listed != ("rest" in state):
            raise ValueError("one of state and optimizer has parameters outside K-FAC and the other has not")
        if names is None and self.optimizer is not None:  # of before: in order
            self.optimizer.load_state_dict(copy.deepcopy(state["rest"]))  # which it would write to
        if names is None or "rest" not in state:
            return
        self._wait(names, plan)
        assert self.optimizer is not None
        saved = copy.deepcopy(state["rest"])  # whose tensors the optimizer would take, and write to
        have = [len(group["params"]) for group in saved["param_groups"]]
        need = list(map(len, names))
        if have != need or len(self._labels()) != len(need):
            raise ValueError(
                f"the state's `rest` has parameter groups of {have} parameters, named as {need}, and the optimizer "
                f"here has {len(self._labels())} groups: give the same `rest` as then"
            )
        place = {}
        for group, labels in zip(saved["param_groups"], names, strict=True):
            place.update(zip(labels, group["params"], strict=True))
        free = iter(range(len(place), len(place) + sum(map(len, self._labels()))))
        groups = [
            {**group, "params": [place[label] if label in place else next(free) for label in labels]}
            for group, labels in zip(saved["param_groups"], self._labels(), strict=True)
        ]
        here = {i for group in groups for i in group["params"]}
        entries = {i: entry for i, entry in saved["state"].items() if i in here}
        self.optimizer.load_state_dict({**saved, "state": entries, "param_groups": groups})

    @contextmanager
    def unless_damaged(self) -> Iterator[None]:
        """The old optimizer, with the groups it had, if loading fails inside."""
        before = self.optimizer
        named = self._named
        groups = [] if before is None else [(group, list(group["params"])) for group in before.param_groups]
        moments = {} if before is None else dict(before.state)
        try:
            yield
        except Exception:
            self.optimizer = before
            self._named = named
            if before is not None:
                before.param_groups[:] = [group for group, _ in groups]
                before.state.clear()
                before.state.update(moments)
            for group, parameters in groups:
                group["params"][:] = parameters
            raise

    def _wait(self, names: Sequence[Sequence[str]], plan: Plan) -> None:
        """Parameters of a state that are frozen here, in the groups that they were in."""
        now = {name: p for name, p, _ in plan.made_of}
        covered = {path for layer in plan.layers.values() for path in layer.paths.values()}
        absent = [name for group in names for name in group if not name.startswith("#") and name not in now]
        if absent:
            raise ValueError(f"the state is of another model: its `rest` has {absent[:5]}, which are not here")
        waiting = {
            n: now[n] for group in names for n in group if n in now and n not in self._named and n not in covered
        }
        if self.optimizer is None:
            self._join(waiting)
            return
        self._named = {**self._named, **waiting}
        for group, labels in zip(self.optimizer.param_groups, names, strict=False):
            group["params"] += [waiting[name] for name in labels if name in waiting]

    def _labels(self) -> list[list[str]]:
        """Names of the parameters, group by group; numbers of those that are none of the model's."""
        names = {id(p): name for name, p in self._named.items()}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [[names.get(id(p), f"#{i}.{j}") for j, p in enumerate(g["params"])] for i, g in enumerate(groups)]
