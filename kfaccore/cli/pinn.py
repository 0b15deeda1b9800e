"""`kfaccore train` on a differential equation: relative and absolute L2 errors, a table, a picture."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from kfaccore import Preconditioner, __version__, describe, load, save
from kfaccore.cli import resumed
from kfaccore.cli.fail import fail
from kfaccore.cli.pause import Pause, stopped
from kfaccore.cli.results import Writers, end, put_text

EVALUATIONS = 60  # of the error, over a run
POINTS = 9000  # held out
CURVE = ("step", "seconds", "loss", "relative", "absolute")


class PINNRun:
    """Curves of each method: both errors on held-out points, at steps and training seconds."""

    def __init__(self, name: str, task: Any, steps: int, seed: int) -> None:
        self.name = name
        self.task = task
        self.steps = steps
        self.seed = seed
        self.pinn = task.pinn()
        self.held_out = self.pinn.problem.inside(np.random.default_rng([seed, 7]), POINTS)
        self.curves: dict[str, dict[str, list]] = {}
        self.codes: dict[str, dict[str, int]] = {}
        self.kept: tuple[Any, Any, Any] | None = None  # solver, params, Progress of the first method
        self.spent: dict[str, float] = {}  # seconds of a method before it was resumed
        self.params: dict[str, Any] = {}

    def train(self, name: str, solver: Any, resume: Path | None, quiet: bool) -> None:
        """Run `solver`, with a progress bar on standard error unless `quiet`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from kfaccore_numpy.equations.train import LBFGS, fit

        params = self.pinn.init(self.seed)
        state = None
        start = 0
        if resume is not None:
            params, state, start = self._resumed(resume, name, solver, params)
        else:
            self.curves[name] = {key: [] for key in CURVE}
            self.codes[name] = {}
        columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("relative L2 {task.fields[error]:.3g}")
        bar = Progress(*columns, text, console=Console(stderr=True), disable=quiet)
        batches = self.pinn.batches(*self.task.counts, self.task.every, self.seed, start)
        options = {"rows": self.task.rows, "state": state, "start": start}
        pause = Pause()
        whole = isinstance(solver, LBFGS)
        row = bar.add_task(name, total=self.steps, completed=start, error=math.nan)
        progress: Any = None
        try:
            with bar, np.errstate(all="ignore"), nullcontext() if whole else pause:
                for progress in fit(self.pinn, params, batches, solver, self.steps, **options):
                    self._note(name, solver, params, progress)
                    if progress.step % max(1, self.steps // EVALUATIONS) == 0 or not math.isfinite(progress.loss):
                        bar.update(row, error=self._look(name, progress))
                    bar.update(row, completed=progress.step)
                    if not math.isfinite(progress.loss):
                        return
                    pause.between()
                self._last(name, progress)
        except KeyboardInterrupt:
            if pause.torn and self.kept is not None and self.kept[0] is solver:
                self.kept = None
            else:
                self._last(name, progress)
            raise

    def summary(self) -> dict[str, Any]:
        """What run.json holds."""
        rows = []
        for name, curve in self.curves.items():
            last = {key: (values or [math.nan])[-1] for key, values in curve.items()}
            best = min((v for v in curve["relative"] if math.isfinite(v)), default=math.nan)
            rows.append({"method": name, **last, "best": best, "codes": self.codes[name]})
        interior, boundary = self.task.counts
        sizes = {"interior": interior, "boundary": boundary, "widths": list(self.task.widths)}
        return {
            "task": self.name,
            "seed": self.seed,
            **sizes,
            "version": __version__,
            "methods": rows,
            "curves": self.curves,
        }

    def writers(self) -> Writers:
        """How run.json, run.safetensors and curves.png are written, whatever was reached."""
        found = {"run.json": put_text(self.summary())}
        if self.kept is not None:
            found["run.safetensors"] = self._save
        if self.params:
            found["curves.png"] = self._draw
        return found

    def show(self, out: Path | None) -> None:
        """The table, and where the files are."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.name}, seed {self.seed}: L2 errors on {POINTS} held-out points")
        for head in ("method", "steps", "seconds", "relative", "absolute", "best rel."):
            table.add_column(head, no_wrap=True)
        table.add_column("codes")
        for row in self.summary()["methods"]:
            codes = ", ".join(f"{count} {code}" for code, count in row["codes"].items())
            figures = (f"{row[key]:.2e}" for key in ("relative", "absolute", "best"))
            table.add_row(row["method"], str(row["step"]), f"{row['seconds']:.2f}", *figures, codes)
        console = Console()
        console.print(table)
        if out is not None:
            console.print(", ".join(str(path) for path in sorted(out.iterdir())), soft_wrap=True)

    def diverged(self) -> str:
        """Why a method's last figure is no number, or nothing."""
        found = all(math.isfinite(row["relative"]) for row in self.summary()["methods"])
        return "" if found else "its error is not finite"

    def _note(self, name: str, solver: Any, params: Any, progress: Any) -> None:
        """Codes, and what is to be saved."""
        self.params[name] = params
        if self.kept is None or self.kept[0] is solver:
            self.kept = (solver, params, progress)
        for code, count in _counts(progress.info):
            self.codes[name][code] = self.codes[name].get(code, 0) + count

    def _last(self, name: str, progress: Any) -> None:
        """The errors where a run ends, unless they are there."""
        if progress is not None and self.curves[name]["step"][-1:] != [progress.step]:
            self._look(name, progress)

    def _look(self, name: str, progress: Any) -> float:
        """Append both errors; the relative one is returned."""
        relative, absolute = self.pinn.errors(progress.params, self.held_out)
        seconds = progress.seconds + self.spent.get(name, 0.0)
        found = (progress.step, seconds, progress.loss, relative, absolute)
        for key, value in zip(CURVE, found, strict=True):
            self.curves[name][key].append(value)
        return relative

    def _draw(self, path: Path) -> None:
        from kfaccore.cli.plot import solution

        name = next(iter(self.params))
        solution(self.pinn, self.params[name], self.curves, f"{self.name}, {name}", path)

    def _save(self, path: Path) -> None:
        solver, params, progress = self.kept  # type: ignore[misc]
        tree: dict[str, Any] = {"params": params}
        meta: dict[str, Any] = {"task": self.name, "method": next(iter(self.curves)), "seed": self.seed}
        if isinstance(solver, Preconditioner):
            size = sum(int(np.prod(matrix.shape)) for matrix in params.values())
            meta = describe(solver, progress.state, type(self.pinn).__name__, size, {}) | meta
            meta["terms"] = [term.name for term in self.pinn.problem.terms]
        if progress.state is not None:
            tree["state"] = progress.state
            meta["step"] = progress.step
        save(path, tree, **meta)

    def _resumed(self, path: Path, name: str, solver: Any, params: Any) -> tuple[Any, Any, int]:
        """(params, state, steps taken) of a saved run; ValueError when it is not one of this task, method and seed."""
        from kfaccore_numpy.equations.train import LBFGS, initial_state

        if isinstance(solver, LBFGS):
            raise ValueError(f"--resume continues a run that keeps a state, which {name} does not")
        meta = resumed.told(path, self.name, name, self.seed)
        start = resumed.start(path, meta.get("step"), self.steps)
        tree = load(path, like={"params": params, "state": initial_state(self.pinn, params, solver)})
        self.curves[name], self.codes[name], self.spent[name] = resumed.past(path, name, CURVE, start)
        return tree["params"], tree["state"], start


def _counts(info: Any) -> list[tuple[str, int]]:
    """Codes of one step by name, of a Preconditioner's Info or of Gauss-Newton's."""
    from kfaccore import Code

    if info is None:
        return []
    if isinstance(info, dict):
        return [(Code(int(code)).name, 1) for code in info["code"]]
    return [(code.name, count) for code, count in info.counts().items()]


def train_pinn(
    name: str, methods: list[str], steps: int, seed: int, out: Path | None, resume: Path | None, as_json: bool
) -> None:
    """Train every method on the problem `name` from the same start and batches, and report."""
    from kfaccore_numpy.equations.tasks import PINN_TASKS, SOLVERS

    task = PINN_TASKS[name]
    for method in methods:
        if method not in SOLVERS:
            fail(f"no method {method!r} for {name}; there are {', '.join(SOLVERS)}")
    trial = PINNRun(name, task, steps or task.steps, seed)
    code = 0
    try:
        for index, method in enumerate(methods):
            trial.train(method, task.solver(method), resume if index == 0 else None, quiet=as_json)
    except KeyboardInterrupt as error:
        code = stopped(error)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    end(trial, out, as_json, code)
