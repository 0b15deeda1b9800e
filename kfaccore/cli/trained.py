"""What `influence`, `laplace` and `prune` share: a run of `train --out`, data, and a curvature with a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kfaccore.cli.fail import INTERRUPTED, fail
from kfaccore.record.npz import Npz

if TYPE_CHECKING:
    from kfaccore.posterior import Curvature
    from kfaccore.record import Record
    from kfaccore.xp.arrays import Array

BATCH = 256
UNPACKED = 1 << 30  # bytes that the arrays of a compressed .npz may take


@dataclass(frozen=True)
class Trained:
    """The task of a run, its trained parameters, and what its file says."""

    folder: Path
    task: Any
    params: dict[str, Any]
    meta: dict[str, Any]

    @property
    def classes(self) -> bool:
        """Whether predictions are logits of classes."""
        from kfaccore import SoftmaxCrossEntropy

        return isinstance(self.task.loss, SoftmaxCrossEntropy)

    def logits(self, x: np.ndarray, params: Mapping[str, Array] | None = None) -> np.ndarray:
        """The prediction (batch, outputs)."""
        chosen = self.params if params is None else params
        return np.concatenate([self.task.network.forward(chosen, part)[0] for part, _ in batches(x, x)])

    def stream(self, data: tuple[np.ndarray, np.ndarray], fisher: Callable) -> Iterable[Mapping[str, Record]]:
        """Records of the run's loss on `data`."""
        from kfaccore_numpy import Stream

        return Stream(self.task.network, self.params, self.task.loss, Bar("records", batches(*data)), fisher)

    def curvature(self, data: tuple[np.ndarray, np.ndarray], method: str) -> Curvature:
        """The curvature of the mean loss on `data`, exact in the labels (type2)."""
        from kfaccore import fit, type2
        from kfaccore.methods import CATALOGUE

        if method not in CATALOGUE:
            fail(f"--method is {method!r}; there are {', '.join(CATALOGUE)}")
        try:
            return fit(CATALOGUE[method](), self.stream(data, type2))
        except ValueError as error:
            return fail(f"--method {method}: {error}")


@dataclass(frozen=True)
class Bar:
    """`batches` with a bar on standard error, where that is a terminal."""

    title: str
    batches: list[tuple[np.ndarray, np.ndarray]]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hidden = not console.is_terminal
        yield from track(self.batches, self.title, console=console, disable=hidden, transient=True)


def read(run: Path) -> Trained:
    """The run in a folder of `train --out`, or exit 2."""
    from kfaccore import load, metadata
    from kfaccore_numpy import TASKS

    file = run / "run.safetensors" if run.is_dir() else run
    if run.is_dir() and not file.exists():
        fail(f"{run} is a folder without run.safetensors; need one of `kfaccore train --out`")
    try:
        tree = load(file)
        meta = metadata(file)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    task = TASKS.get(str(meta.get("task")))
    if task is None:
        what = (
            f"is a run of {meta['task']!r}"
            if "task" in meta
            else "is no run of `kfaccore train --out`: it names no task"
        )
        fail(f"{file} {what}; need one of {', '.join(TASKS)}")
    wanted = task.network.init(np.random.default_rng(0), np.asarray)
    held = tree.get("params") if isinstance(tree, Mapping) else None
    held = held if isinstance(held, Mapping) else {}
    for name, like in wanted.items():
        x = held.get(name)
        if not isinstance(x, np.ndarray) or x.shape != like.shape or x.dtype.kind != "f":
            fail(f"{file} holds no parameters of {meta['task']}: {name} has to be an array of floats {like.shape}")
    return Trained(file.parent, task, {name: held[name] for name in wanted}, meta)


def examples(option: str, file: Path, run: Trained) -> tuple[np.ndarray, np.ndarray]:
    """x and y of an .npz that fit the run's network, or exit 2."""
    try:
        found = Npz(file, UNPACKED)
        x = found["x"]
        y = found["y"]
    except (OSError, ValueError) as error:
        fail(f"{option} {file}: {error}; need an .npz of x and y")
    inputs = run.task.network.inputs
    if x.shape[1:] != inputs or len(x) != len(y) or not len(x):
        fail(f"{option} {file}: x has shape {x.shape} and y {y.shape}; need (count, *{inputs}) and as many labels")
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":  # a cast would drop an imaginary part, and cannot read text
            fail(f"{option} {file}: {name} has dtype {array.dtype}; need real numbers")
    first = next(iter(run.params.values()))
    x = x.astype(first.dtype)
    bad = np.asarray(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
    if bad.any():
        fail(f"{option} {file}: x of examples {_some(bad)} holds values that are not finite; leave these out")
    outputs = run.logits(x[:1]).shape[1:]
    if run.classes:
        _check_labels(f"{option} {file}", y, outputs[0])
        return x, y
    if y.shape[1:] != outputs or not np.isfinite(y).all():
        fail(f"{option} {file}: y has shape {y.shape}; need the network's outputs (count, *{outputs}), all finite")
    return x, y.astype(first.dtype)


def _check_labels(where: str, y: np.ndarray, classes: int) -> None:
    """Exit 2 unless y are labels of the network's classes."""
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        fail(f"{where}: y has dtype {y.dtype}, shape {y.shape}; need integer labels (count,)")
    bad = (y < 0) | (y >= classes)
    if bad.any():
        fail(f"{where}: y of examples {_some(bad)} is {y[bad][0]}; need labels from 0 to {classes - 1}")


def _some(bad: np.ndarray) -> str:
    """The places of the first few."""
    places = np.flatnonzero(bad)
    return ", ".join(map(str, places[:5])) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def batches(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """`BATCH` examples at a time."""
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]


def mean_eigenvalues(curvature: Curvature) -> dict[str, float]:
    """Of each layer."""
    from kfaccore.xp.arrays import to_host

    return {name: float(to_host(basis.values).mean()) for name, basis in curvature.layers.items()}


def accuracy(logits: np.ndarray, y: np.ndarray) -> float:
    """The share of examples whose label has the largest logit."""
    return float((logits.argmax(1) == y).mean())


def needs_classes(run: Trained, verb: str) -> None:
    """Exit 2 for a task without labels."""
    if not run.classes:
        fail(f"{verb} needs a classifier, such as digits-classifier; {run.meta['task']} has no labels")


def interrupted() -> NoReturn:
    """How Ctrl-C ends a verb."""
    fail("interrupted", INTERRUPTED)
