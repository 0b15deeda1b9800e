"""The Fisher operator of all layers of a fitted state: block-diagonal, one `LayerOperator` a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kfaccore.analysis.fitted import on_host
from kfaccore.analysis.operator import Figure, LayerOperator, effective_rank, exported
from kfaccore.method import Block, Method, State
from kfaccore.options import by_layer
from kfaccore.xp.arrays import Array, is_tracer, namespace, to_host

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class NetworkOperator:
    """All layers as one block-diagonal operator; vectors are {layer: array}, or flat in the order of `layers`."""

    layers: Mapping[str, LayerOperator]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers.values())

    def damped(self, damping: float | Array | Mapping[str, float | Array]) -> NetworkOperator:
        """The same operator with another damping; eigenvectors that were found are kept."""
        own = {name: damping[name] if isinstance(damping, Mapping) else damping for name in self.layers}
        return NetworkOperator(
            {name: replace(layer, damping=_number(own[name])) for name, layer in self.layers.items()}
        )

    def matvec(self, v: Mapping[str, Array]) -> dict[str, Array]:
        return {name: layer.matvec(v[name]) for name, layer in self.layers.items()}

    def solve(self, v: Mapping[str, Array]) -> dict[str, Array]:
        return {name: layer.solve(v[name]) for name, layer in self.layers.items()}

    def trace(self) -> Figure:
        return sum(layer.trace() for layer in self.layers.values())

    def logdet(self) -> Figure:
        """Sum over layers."""
        return sum(layer.logdet() for layer in self.layers.values())

    def eigvalsh(self) -> Array:
        """All eigenvalues of all layers, ascending."""
        values = [layer.eigvalsh() for layer in self.layers.values()]
        xp = namespace(*values)
        return xp.sort(xp.concat(values))

    def effective_rank(self) -> Figure:
        """Of the joint spectrum, without damping."""
        values = [layer.found.basis.values for layer in self.layers.values()]
        xp = namespace(*values)
        return effective_rank(xp.concat([xp.reshape(x, (-1,)) for x in values]))

    def effective_dimension(self) -> Figure:
        """Sum over layers."""
        return sum(layer.effective_dimension() for layer in self.layers.values())

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """A flat vector as {layer: (blocks, d_out, d_in)}."""
        ends = np.cumsum([layer.size for layer in self.layers.values()])[:-1]
        parts = np.split(flat, ends)
        return {name: part.reshape(self.layers[name].shape) for name, part in zip(self.layers, parts, strict=True)}

    def join(self, v: Mapping[str, Array]) -> np.ndarray:
        """{layer: array} as a flat vector."""
        return np.concatenate([np.ravel(to_host(v[name])) for name in self.layers])

    def linear_operator(self) -> LinearOperator:
        """For SciPy, on flat vectors."""
        return exported(self.size, lambda flat: self.join(self.matvec(self.split(flat))))


def operator(
    methods: Method | Mapping[str, Method],
    states: Mapping[str, State],
    blocks: Mapping[str, Block],
    damping: float | Array | Mapping[str, float | Array] = 0.0,
    limit: int = 2048,
) -> NetworkOperator:
    """The operator of fitted states: `operator(pre.methods, state.layers, dict(state.blocks), damping)`.

    methods, damping   one for all layers, or a mapping from layer; arrays of the states may live anywhere
    """
    by_layer(states=states, blocks=blocks)
    layers = {}
    for name, state in states.items():
        method = methods[name] if isinstance(methods, Mapping) else methods
        own = damping[name] if isinstance(damping, Mapping) else damping
        layers[name] = LayerOperator(method, on_host(state), blocks[name], _number(own), limit)
    return NetworkOperator(layers)


def _number(damping: float | Array) -> float | Array:
    return damping if is_tracer(damping) else float(damping)
