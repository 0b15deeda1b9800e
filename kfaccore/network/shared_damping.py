"""SharedDamping: damping of a network's dense layers in units of its largest convolution.

Layers whose method has `damping=Adaptive(floor)`, the convolutions, are damped by damping lambda_l, with lambda_l =
max(tr F_l, floor) / size_l; the others by damping beta, with beta the largest lambda_l of the inverses in use. Without
this the two kinds answer to different scales of one number.

Source: Gao et al. 2020 (2011.13609, equation 3.5), 2021 (2011.10741) for TKFAC, whose trace is the same.
Cost: that of the block methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

from kfaccore import tree
from kfaccore.damping import Adaptive
from kfaccore.method import Block, Method, Unit, declares
from kfaccore.method import State as LayerState
from kfaccore.methods import TEKFAC, TKFAC
from kfaccore.network.each import Each, Hypers, NetworkSolution, joined
from kfaccore.record import Factored, Record
from kfaccore.xp.arrays import Array, namespace, place


@dataclass(frozen=True)
class State:
    """The block method's state of every layer, and beta (1,): 1 before the first refresh."""

    layers: dict[str, LayerState]
    beta: Array
    sizes: tuple[tuple[str, int], ...] = tree.static(default=())


@dataclass(frozen=True)
class SharedDamping(Each[State]):
    """TKFAC or TEKFAC, dense layers damped in units of the largest convolution: damping times the largest lambda_l.

    lambda_l = max(tr F_l, floor) / (d_out d_in) of layers whose method has damping=Adaptive(floor), the convolutions,
    which are damped by their own. ValueError where no layer has. Gao et al. 2020, arxiv.org/abs/2011.13609.

    method   TKFAC | TEKFAC, or a mapping from layer to one of them; Adaptive damping tells which are convolutions
    """

    method: Method | Mapping[str, Method] = field(default=TKFAC(damping=Adaptive()))

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        for name in blocks:
            self._unit_of(name)
        if not any(self._adapts(name) for name in blocks):
            raise ValueError(f"no layer of {list(blocks)} has damping=Adaptive(); need it on the convolutions")
        layers = {name: self._of(name).init(block, like) for name, block in blocks.items()}
        sizes = tuple((name, block.d_out * block.d_in) for name, block in blocks.items())
        return State(layers, namespace(like).ones((1,), **place(like)), sizes)

    def refresh(self, state: State, hypers: Hypers) -> State:
        new = self._refreshed({name: x for name, x in state.layers.items() if self._adapts(name)}, hypers)
        xp = namespace(state.beta)
        beta = reduce(xp.maximum, (xp.max(self._unit_of(name).unit(x), keepdims=True) for name, x in new.items()))
        state = replace(state, beta=xp.astype(beta, state.beta.dtype))
        others = {name: x for name, x in state.layers.items() if name not in new}
        new |= self._refreshed(others, self._damped(state, hypers))
        return replace(state, layers={name: new[name] for name in state.layers})

    def solve(
        self,
        state: State,
        grads: Mapping[str, Array | Factored],
        hypers: Hypers,
        records: Mapping[str, Record] | None = None,
    ) -> NetworkSolution:
        """`direction`, `code` and `state` as the block methods', on dicts; info: beta."""
        hypers = self._damped(state, hypers)
        found = {name: self._of(name).solve(state.layers[name], grad, hypers[name]) for name, grad in grads.items()}
        return joined(state, found, {"beta": state.beta})

    def _damped(self, state: State, hypers: Hypers) -> Hypers:
        """The damping of dense layers times beta."""
        found = {}
        for name, hyper in hypers.items():
            found[name] = hyper if self._adapts(name) else replace(hyper, damping=hyper.damping * state.beta[0])
        return found

    def _unit_of(self, name: str) -> Unit:
        """The method of a layer; ValueError for one without damping of its own."""
        method = self._of(name)
        if declares(method, Unit):
            return method
        raise ValueError(f"layer {name!r}: {type(method).__name__} has no damping of its own: use TKFAC or TEKFAC")

    def _adapts(self, name: str) -> bool:
        method = self._of(name)
        return isinstance(method, TKFAC | TEKFAC) and isinstance(method.damping, Adaptive)
