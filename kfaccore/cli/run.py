"""One call of `train`: runs every method on the same task and seed, and writes what it saw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kfaccore import Info, Preconditioner, __version__, describe, load, save
from kfaccore.cli import resumed
from kfaccore.cli.pause import Pause
from kfaccore.cli.results import Writers, put_text
from kfaccore.cli.tuning import sharing_of, tuning

if TYPE_CHECKING:
    from kfaccore_numpy import Tuned

EVALUATIONS = 40  # points of a curve
CURVE = ("step", "seconds", "loss")


class Run:
    """Curves of each method: evaluated loss at steps and training seconds, and what its steps tell of the noise of
    their batches; the first method's state is kept."""

    def __init__(self, name: str, task: Any, steps: int, seed: int, xp: Any) -> None:
        self.name = name
        self.task = task
        self.steps = steps
        self.seed = seed
        self.xp = xp
        self.data, self.evaluation = [tuple(xp.asarray(part) for part in pair) for pair in task.load()]
        self.curves: dict[str, dict[str, list]] = {}
        self.codes: dict[str, dict[str, int]] = {}
        self.spent: dict[str, float] = {}  # seconds of a method before it was resumed
        self.tuned: dict[str, list[Tuned]] = {}  # what `--tune-l2` found, of each method
        self.kept: tuple[Any, Any, Any] | None = None  # optimiser, params, state of the first method

    def train(self, name: str, optimiser: Any, resume: Path | None, quiet: bool) -> None:
        """Run `optimiser`, with a progress bar on standard error unless `quiet`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from kfaccore_numpy import Online

        rng = np.random.default_rng(self.seed)
        params = self.task.network.init(rng, lambda w: self.xp.asarray(w, dtype=np.float32))
        state = None
        start = 0
        if resume is not None:
            params, state, start = self._resumed(resume, name, optimiser, params)
        else:
            self.curves[name] = {key: [] for key in CURVE}
            self.codes[name] = {}
        every = max(1, self.steps // EVALUATIONS)
        columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(
            *columns, TextColumn("loss {task.fields[loss]:.4g}"), console=Console(stderr=True), disable=quiet
        )
        if isinstance(optimiser, Online):
            self.tuned[name] = optimiser.found
        row = bar.add_task(name, total=self.steps, completed=start, loss=math.nan)
        pause = Pause()
        progress = None
        try:
            with bar, np.errstate(all="ignore"), pause:
                for progress in self._steps(optimiser, params, state, start):
                    self._note(name, optimiser, progress)
                    if progress.step % every == 0 or progress.step == self.steps or not math.isfinite(progress.loss):
                        bar.update(row, loss=self._look(name, progress))
                    bar.advance(row)
                    if not math.isfinite(progress.loss):
                        return
                    pause.between()
        except KeyboardInterrupt:
            if pause.torn and self.kept is not None and self.kept[0] is optimiser:
                self.kept = None
            elif progress is not None and self.curves[name]["step"][-1:] != [progress.step]:
                self._look(name, progress)
            raise

    def _note(self, name: str, optimiser: Any, progress: Any) -> None:
        """Codes, and what is to be saved."""
        if self.kept is None or self.kept[0] is optimiser:
            self.kept = (optimiser, progress.params, progress.state)
        codes = self.codes[name]
        for code, count in progress.info.counts().items() if progress.info else ():
            codes[code.name] = codes.get(code.name, 0) + count

    def _look(self, name: str, progress: Any) -> float:
        """A point of the curve; its loss is returned."""
        from kfaccore_numpy import mean_loss

        value = mean_loss(self.task.network, progress.params, self.evaluation, self.task.loss)
        seconds = progress.seconds + self.spent.get(name, 0.0)
        point = {"step": progress.step, "seconds": seconds, "loss": value}
        for key, number in (point | _noise(progress.info)).items():
            self.curves[name].setdefault(key, []).append(number)
        return value

    def _steps(self, optimiser: Any, params: Any, state: Any, start: int) -> Iterator[Any]:
        """Progress of the steps from `start` on."""
        from kfaccore_numpy import Online, fit

        options = {"steps": self.steps, "seed": self.seed, "state": state, "start": start}
        if isinstance(optimiser, Online):
            return optimiser.fit(params, self.data, **options)
        return fit(self.task.network, params, self.data, self.task.loss, optimiser, batch=self.task.batch, **options)

    def summary(self) -> dict[str, Any]:
        """What run.json holds."""
        rows = []
        for name, curve in self.curves.items():
            losses = curve["loss"] or [float("nan")]
            last = {key: (curve[key] or [0])[-1] for key in ("step", "seconds")}
            finite = [value for value in losses if math.isfinite(value)]
            best = min(finite) if finite else float("nan")
            rows.append({"method": name, **last, "final": losses[-1], "best": best, "codes": self.codes[name]})
        meta = {"task": self.name, "seed": self.seed, "batch": self.task.batch, "version": __version__}
        tuned = {name: [asdict(one) for one in found] for name, found in self.tuned.items()}
        return {**meta, "methods": rows, "curves": self.curves, **({"tuned": tuned} if tuned else {})}

    def writers(self) -> Writers:
        """How run.json, run.safetensors and curves.png are written, whatever was reached."""
        from kfaccore.cli.plot import curves

        found = {"run.json": put_text(self.summary())}
        if self.kept is not None:
            found["run.safetensors"] = self._save
        if self.curves:
            found["curves.png"] = lambda path: curves(self.curves, self.name, path, self.task.batch)
        return found

    def show(self, out: Path | None) -> None:
        """The table, and where the files are."""
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "method", "steps", "seconds", "final loss", "best loss", "codes", title=f"{self.name}, seed {self.seed}"
        )
        for row in self.summary()["methods"]:
            codes = ", ".join(f"{count} {code}" for code, count in row["codes"].items())
            figures = (f"{row['seconds']:.2f}", f"{row['final']:.4f}", f"{row['best']:.4f}")
            table.add_row(row["method"], str(row["step"]), *figures, codes)
        console = Console()
        console.print(table)
        for name, found in self.tuned.items():
            console.print(tuning(name, found))
        if out is not None:
            console.print(", ".join(str(path) for path in sorted(out.iterdir())), soft_wrap=True)

    def diverged(self) -> str:
        """Why a method's last figure is no number, or nothing."""
        found = all(math.isfinite(row["final"]) for row in self.summary()["methods"])
        return "" if found else "its loss is not finite"

    def _save(self, path: Path) -> None:
        from kfaccore_numpy import Online

        optimiser, params, state = self.kept  # type: ignore[misc]
        tree: dict[str, Any] = {"params": params}
        meta: dict[str, Any] = {"task": self.name, "method": next(iter(self.curves)), "seed": self.seed}
        if isinstance(optimiser, Online):
            meta["l2"] = optimiser.l2
            optimiser = optimiser.optimiser
        if isinstance(optimiser, Preconditioner):
            tree["state"] = state
            size = sum(int(np.prod(matrix.shape)) for matrix in params.values())
            meta |= {"sharing": sharing_of(optimiser), "penalties": _penalties(optimiser, "l2" in meta)}
            meta = describe(optimiser, state, type(self.task.network).__name__, size, {}) | meta
        save(path, tree, **meta)

    def _resumed(self, path: Path, name: str, optimiser: Any, params: Any) -> tuple[Any, Any, int]:
        from kfaccore_numpy import Online

        tuned = isinstance(optimiser, Online)
        if not tuned and not isinstance(optimiser, Preconditioner):
            raise ValueError(f"--resume continues a preconditioned method, not {name}")
        meta = resumed.told(path, self.name, name, self.seed)
        l2 = resumed.penalties(path, meta, tuned, self.task.network.blocks())
        if tuned:
            optimiser.begin(l2)
            optimiser = optimiser.optimiser
        resumed.same_sharing(path, meta, sharing_of(optimiser))
        resumed.same_penalties(path, meta, _penalties(optimiser, tuned))
        fresh = optimiser.init(self.task.network.blocks(), next(iter(params.values())))
        tree = load(path, like={"params": params, "state": fresh})
        start = resumed.start(path, tree["state"].step, self.steps)
        self.curves[name], self.codes[name], self.spent[name] = resumed.past(path, name, CURVE, start)
        return tree["params"], tree["state"], start


def _penalties(optimiser: Preconditioner, tuned: bool) -> dict[str, Any]:
    """What was given as a number: an l2 that is tuned is not."""
    found: dict[str, Any] = {"weight_decay": optimiser.schedules.weight_decay}
    return found if tuned else found | {"l2": optimiser.schedules.l2}


def _noise(info: Info | None) -> dict[str, float | None]:
    """rho and critical_batch of a step that knows them; None where the batch shows no gradient beyond its noise."""
    told = {} if info is None else info.step
    found = {key: float(told[key]) for key in ("rho", "critical_batch") if key in told}
    return {key: x if math.isfinite(x) else None for key, x in found.items()}  # JSON has no infinity
