"""Scores on disk: a file for each block of them until all are there, so that a run that was stopped goes on.

A block is found again by what it was computed from, so that another posterior, other queries or other batches never
mix with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kfaccore.written import written
from kfaccore.xp.arrays import Array, to_host


class Blocks:
    """Blocks of scores beside the .npy `path`, in the folder `path`.parts.

    Raises ValueError for a path that is no .npy.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if self.path.suffix != ".npy":
            raise ValueError(f"out is {str(path)!r}; need the name of an .npy")
        self.folder = self.path.with_name(self.path.name + ".parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[list[Path]] = []  # of each group of queries, by batch

    def group(self) -> None:
        """What comes next are the blocks of another group of queries."""
        self.rows.append([])

    def put(self, key: str, made: Callable[[], Array]) -> None:
        """The next block of the group (draws * queries, examples, ...): what was made from `key` before, or `made`."""
        place = self.folder / f"{len(self.rows) - 1}-{len(self.rows[-1])}-{key}.npy"
        if not place.exists():
            block = to_host(made())
            with written(place) as temporary, open(temporary, "wb") as file:
                np.save(file, block)
        self.rows[-1].append(place)

    def joined(self, draws: int) -> np.ndarray:
        """All scores, draws outermost, in `path` and read from there; the blocks are gone."""
        shapes = [[np.load(place, mmap_mode="r").shape for place in row] for row in self.rows]
        queries = [row[0][0] // draws for row in shapes]
        examples = [shape[1] for shape in shapes[0]]
        whole = (draws, sum(queries), sum(examples), *shapes[0][0][2:])
        flat = (draws * whole[1], *whole[2:])
        with written(self.path) as temporary:
            out = np.lib.format.open_memmap(temporary, "w+", np.load(self.rows[0][0], mmap_mode="r").dtype, flat)
            view = out.reshape(whole)
            start = 0
            for row, count in zip(self.rows, queries, strict=True):
                at = 0
                for place, width in zip(row, examples, strict=True):
                    block = np.load(place)
                    view[:, start : start + count, at : at + width] = block.reshape(draws, count, *block.shape[1:])
                    at += width
                start += count
            out.flush()
            del view, out  # the file is closed before it takes its name
        shutil.rmtree(self.folder)
        return np.load(self.path, mmap_mode="r")
