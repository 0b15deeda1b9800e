"""`kfaccore train`: a task with a method, against tuned baselines; table, picture and one file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kfaccore.cli.fail import fail
from kfaccore.cli.pause import stopped
from kfaccore.cli.results import end, folder

TuneL2 = Annotated[
    bool, typer.Option("--tune-l2", help="l2 a layer by its evidence, every epoch, from --l2 (0: 1e-4) on.")
]
Sharing = Annotated[
    str, typer.Option(help="Positions that share weights: expand | reduce; default reduce with --tune-l2.")
]


def train(
    task: Annotated[str, typer.Argument(help="A task; an unknown name lists them.")],
    method: Annotated[str, typer.Option(help="kfac, ekfac, diagonal, ... (`kfaccore methods`)")] = "kfac",
    against: Annotated[str, typer.Option(help="Baselines at their tuned rates: adam,sgd")] = "",
    steps: Annotated[int, typer.Option(help="Updates; 0 for the task's own number.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialisation, batches and label draws.")] = 0,
    backend: Annotated[str, typer.Option(help="numpy or cupy")] = "numpy",
    step: Annotated[
        str,
        typer.Option(help="self-tuning (fngd: line-search) | line-search | fixed (rate 1, momentum 0.9, KL clip 1e-3)"),
    ] = "self-tuning",
    l2: Annotated[float, typer.Option(help="Penalty l2/2 |theta|^2 in the loss, its gradient and curvature.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled: rate x this x theta beside each update.")] = 0.0,
    tune_l2: TuneL2 = False,
    sharing: Sharing = "",
    out: Annotated[Path | None, typer.Option(help="Folder for run.json, run.safetensors, curves.png.")] = None,
    resume: Annotated[Path | None, typer.Option(help="run.safetensors of an earlier run of the same method.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print run.json and nothing else.")] = False,
) -> None:
    """Train TASK and compare it with tuned baselines."""
    from kfaccore.cli.run import Run

    if steps < 0:
        fail(f"--steps is {steps}; need a positive number, or 0 for the task's own")
    methods = [method, *filter(None, against.split(","))]
    penalties = {"l2": l2, "weight_decay": weight_decay}
    if _is_pinn(task):
        foreign = {"backend": backend != "numpy", "step": step != "self-tuning", "tune_l2": tune_l2, "sharing": sharing}
        foreign |= penalties
        _equation(task, methods, foreign, out, {"steps": steps, "seed": seed, "resume": resume, "as_json": as_json})
        return
    chosen = _task(task)
    _check(penalties)
    runs = _runs(methods, chosen, step, penalties, sharing, l2 if tune_l2 else None)
    xp = _backend(backend)
    if out is not None:
        folder(out)
    trial = Run(task, chosen, steps or chosen.steps, seed, xp)
    code = 0
    try:
        for index, (name, optimiser) in enumerate(runs):
            trial.train(name, optimiser, resume if index == 0 else None, quiet=as_json)
    except KeyboardInterrupt as error:
        code = stopped(error)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    _hint()
    end(trial, out, as_json, code)


def _hint() -> None:
    if not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & set(os.environ):
        typer.echo("hint: small networks train up to 10 times faster with OMP_NUM_THREADS=1", err=True)


def _check(penalties: dict[str, float]) -> None:
    for option, value in penalties.items():
        if not 0 <= value < math.inf:
            fail(f"--{option.replace('_', '-')} is {value}; need a finite number >= 0")


def _task(name: str) -> Any:
    from kfaccore_numpy import TASKS
    from kfaccore_numpy.equations.tasks import PINN_TASKS

    if name not in TASKS:
        fail(f"no task {name!r}; there are {', '.join([*TASKS, *PINN_TASKS])}")
    return TASKS[name]


def _is_pinn(name: str) -> bool:
    from kfaccore_numpy.equations.tasks import PINN_TASKS

    return name in PINN_TASKS


def _equation(
    task: str, methods: list[str], foreign: dict[str, Any], out: Path | None, options: dict[str, Any]
) -> None:
    """A differential equation: methods and figures of its own; `foreign` options must not be given."""
    from kfaccore.cli.pinn import train_pinn

    given = [f"--{name.replace('_', '-')}" for name, value in foreign.items() if value]
    if given:
        fail(f"{', '.join(given)}: not for {task}, a differential equation, whose methods set their own step")
    if out is not None:
        folder(out)
    train_pinn(task, ["pinn-kfac", *methods[1:]] if methods[0] == "kfac" else methods, out=out, **options)


def _runs(
    methods: list[str], task: Any, step: str, penalties: dict[str, float], sharing: str, tuned_from: float | None
) -> list[tuple[str, Any]]:
    """Each method with its optimiser; with `tuned_from`, their l2 is tuned from there on."""
    from kfaccore.cli.tuning import online

    runs = [_optimiser(name, task, step, penalties, sharing, tuned_from is not None) for name in methods]
    if tuned_from is None:
        return runs
    return [(name, online(optimiser, task, tuned_from)) for name, optimiser in runs]


def _optimiser(
    name: str, task: Any, step: str, penalties: dict[str, float], sharing: str, tuned: bool
) -> tuple[str, Any]:
    from kfaccore import Fixed, KLClip, LineSearch, Preconditioner, Schedules, SelfTuning
    from kfaccore.cli.tuning import shared
    from kfaccore.method import OwnGradients, declares
    from kfaccore.methods import CATALOGUE
    from kfaccore_numpy import SGD, Adam

    rules = {"self-tuning": SelfTuning(), "line-search": LineSearch(), "fixed": Fixed(1.0, 0.9, KLClip(1e-3))}
    if step not in rules:
        fail(f"--step is {step!r}; there are {', '.join(rules)}")
    if name in CATALOGUE:
        method = shared(name, CATALOGUE[name], sharing, tuned)
        empirical = declares(method, OwnGradients)  # which a quadratic model of the loss cannot be made of
        rule = rules["line-search" if empirical and step == "self-tuning" else step]
        return name, Preconditioner(method, schedules=Schedules(**penalties), step=rule, donate=True)
    if name in ("adam", "sgd"):
        return name, {"adam": Adam, "sgd": SGD}[name](task.rates[name], **penalties)
    return fail(f"no method {name!r}; there are {', '.join(CATALOGUE)}, adam, sgd")


def _backend(name: str) -> Any:
    if name == "numpy":
        import numpy as xp
    elif name == "cupy":
        try:
            import cupy as xp
        except ImportError:
            fail("no CuPy here: install kfaccore[cuda12] or kfaccore[cuda13]")
        if not xp.cuda.is_available():
            fail("CuPy is installed but finds no CUDA device")
    else:
        fail(f"--backend is {name!r}; there are numpy and cupy")
    return xp
