"""What a saved run holds: pairs of factors, one at a time, and what the file says of itself; damage is a ValueError."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

FACTORS = ("A", "G", "weight")


class Contents:
    """A file of `save` that holds a state; factors are read when they are asked for.

    Raises what `Opened` does, and ValueError for metadata of the wrong kinds.
    """

    def __init__(self, path: Path) -> None:
        from kfaccore.io import Opened

        self.file = Opened(path)
        self.path = path
        self.meta = self.file.meta
        for key in ("damping", "blocks", "clocks", "uncovered"):
            if not isinstance(self.meta.get(key, {}), Mapping):
                raise ValueError(f"{path} has damaged metadata: {key} is no object")
        if not isinstance(self.meta.get("terms", []), list):
            raise ValueError(f"{path} has damaged metadata: terms is no list")
        self._folders = self._found()

    def pairs(self) -> list[tuple[str, str]]:
        """(title, layer) of every pair of factors: a layer, or each of its loss terms."""
        return [(title, layer) for title, (layer, _) in self._folders.items()]

    def factors(self, title: str) -> dict[str, np.ndarray]:
        """{"A": mean, "G": mean}, (blocks, d, d) or diagonal (blocks, d)."""
        _, folder = self._folders[title]
        weight = self.file[f"{folder}/weight"].astype(np.float64)
        found = {}
        for name in ("A", "G"):
            x = self.file[f"{folder}/{name}"].astype(np.float64)
            square = x.ndim == 2 or (x.ndim == 3 and x.shape[1] == x.shape[2])
            if not square or weight.shape != x.shape[:1] or not x.size:
                raise ValueError(
                    f"{self.path}: factor {name} of {title!r} has shape {x.shape} and its weight {weight.shape}; need "
                    f"(blocks, d, d) or (blocks, d), and (blocks,)"
                )
            found[name] = x / np.where(weight > 0, weight, 1.0).reshape(-1, *(1,) * (x.ndim - 1))
        return found

    def damping(self, layer: str) -> float | None:
        """In force when the file was written, if it says so."""
        value = self.meta.get("damping", {}).get(layer)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def covered(self) -> int:
        """Parameters of the layers that have factors."""
        layers = {layer for _, layer in self.pairs()}
        return sum(int(np.prod(self._shape(layer))) for layer in layers)

    def held(self) -> int:
        """All parameters that the file holds."""
        return sum(int(np.prod(self.file.shape(name))) for name in self.file.names if name.startswith("params/"))

    def _shape(self, layer: str) -> tuple[int, ...]:
        name = f"params/{layer}"
        if name in self.file.names:
            return self.file.shape(name)
        title = next(title for title, found in self.pairs() if found == layer)
        _, folder = self._folders[title]
        A = self.file.shape(f"{folder}/A")
        return A[0], self.file.shape(f"{folder}/G")[-1], A[-1]

    def _found(self) -> dict[str, tuple[str, str]]:
        """{title: (layer, folder)}, in the order of the metadata."""
        names = set(self.file.names)
        folders = [name.removesuffix("/weight") for name in self.file.names if name.endswith("/weight")]
        folders = [folder for folder in folders if all(f"{folder}/{leaf}" in names for leaf in FACTORS)]
        found = dict(self._titled(folder) for folder in sorted(folders))
        order = {layer: place for place, layer in enumerate(self.meta.get("blocks", {}))}
        return dict(sorted(found.items(), key=lambda item: order.get(item[1][0], len(order))))

    def _titled(self, folder: str) -> tuple[str, tuple[str, str]]:
        for prefix in ("state/network/layers/", "state/layers/"):
            if folder.startswith(prefix):
                layer, _, term = folder.removeprefix(prefix).partition("/terms/")
                return self._term(layer, term), (layer, folder)
        return folder, (folder, folder)

    def _term(self, layer: str, term: str) -> str:
        terms = self.meta.get("terms", [])
        if not term:
            return layer
        place = int(term) if term.isdigit() else len(terms)
        return f"{layer} {terms[place] if place < len(terms) else term}"


def told(meta: Mapping[str, object], covered: int) -> Iterator[str]:
    """Lines about the model and the run: what the file knows, then what it does not."""
    total = meta.get("parameters")
    if isinstance(total, int) and total > 0:
        yield f"{covered / total:.0%} of the parameters are covered by Kronecker factors: {covered:,} of {total:,}"
    else:
        yield f"{covered:,} parameters are covered by Kronecker factors; the file does not say how many there are"
    clocks = meta.get("clocks", {})
    if isinstance(clocks, Mapping) and clocks:
        every = ", ".join(f"{name} every {steps} steps" for name, steps in clocks.items() if name != "staggered")
        yield f"clocks: {every}{', staggered' if clocks.get('staggered') else ''}"
    uncovered = meta.get("uncovered")
    for name, why in uncovered.items() if isinstance(uncovered, Mapping) else ():
        count, reason = why if isinstance(why, list) and len(why) == 2 else ("?", why)
        yield f"not covered: {name} ({count}): {reason}"
    missing = [key for key in ("model", "parameters", "uncovered", "damping", "clocks") if key not in meta]
    if missing:
        yield f"the file does not have: {', '.join(missing)}"
