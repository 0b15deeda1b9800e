"""The Fisher operator of all layers of a fitted state: block-diagonal, one `LayerOperator` a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfaccore.analysis.operator import LayerOperator, exported, on_host
from kfaccore.analysis.spectrum import Spectrum
from kfaccore.method import Block, Method, State

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class NetworkOperator:
    """All layers as one block-diagonal operator; vectors are {layer: array}, or flat in the order of `layers`."""

    layers: Mapping[str, LayerOperator]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers.values())

    def matvec(self, v: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: layer.matvec(v[name]) for name, layer in self.layers.items()}

    def solve(self, v: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: layer.solve(v[name]) for name, layer in self.layers.items()}

    def trace(self) -> float:
        return sum(layer.trace() for layer in self.layers.values())

    def logdet(self) -> float:
        return sum(layer.logdet() for layer in self.layers.values())

    def eigvalsh(self) -> np.ndarray:
        """All eigenvalues of all layers, ascending."""
        return np.sort(np.concatenate([layer.eigvalsh() for layer in self.layers.values()]))

    def effective_rank(self) -> float:
        """Of the joint spectrum, without damping."""
        values = np.concatenate([layer.system.values.ravel() for layer in self.layers.values()])
        return Spectrum(np.maximum(np.sort(values), 0.0)).effective_rank

    def effective_dimension(self) -> float:
        return sum(layer.effective_dimension() for layer in self.layers.values())

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """A flat vector as {layer: (blocks, d_out, d_in)}."""
        ends = np.cumsum([layer.size for layer in self.layers.values()])[:-1]
        parts = np.split(flat, ends)
        return {name: part.reshape(self.layers[name].shape) for name, part in zip(self.layers, parts, strict=True)}

    def join(self, v: Mapping[str, np.ndarray]) -> np.ndarray:
        """{layer: array} as a flat vector."""
        return np.concatenate([np.ravel(v[name]) for name in self.layers])

    def linear_operator(self) -> LinearOperator:
        """For SciPy, on flat vectors."""
        return exported(self.size, lambda flat: self.join(self.matvec(self.split(flat))))


def operator(
    methods: Method | Mapping[str, Method],
    states: Mapping[str, State],
    blocks: Mapping[str, Block],
    damping: float | Mapping[str, float] = 0.0,
    limit: int = 2048,
) -> NetworkOperator:
    """The operator of fitted states: `operator(pre.methods, state.layers, dict(state.blocks), damping)`.

    methods, damping   one for all layers, or a mapping from layer; arrays of the states may live anywhere
    """
    layers = {}
    for name, state in states.items():
        method = methods[name] if isinstance(methods, Mapping) else methods
        own = float(damping[name] if isinstance(damping, Mapping) else damping)
        layers[name] = LayerOperator(method, on_host(state), blocks[name], own, limit)
    return NetworkOperator(layers)
