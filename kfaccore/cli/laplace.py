"""`kfaccore laplace`: the evidence of a run, the precisions that maximise it, and calibration before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kfaccore.cli.fail import fail, or_fail
from kfaccore.cli.results import text
from kfaccore.cli.trained import Trained, accuracy, batches, interrupted, needs_classes, read

BINS = 10


def laplace(
    run: Annotated[Path, typer.Argument(help="A folder of `kfaccore train --out`, of a classifier.")],
    precision: Annotated[float, typer.Option(help="Of the prior, before it is tuned.")] = 1.0,
    method: Annotated[str, typer.Option(help="kfac, ekfac, tekfac, diagonal, ...")] = "ekfac",
    plot: Annotated[bool, typer.Option("--plot", help="RUN/laplace.png: how often the confident are right.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Log evidence on the training data, precisions tuned a layer, and accuracy, log loss and calibration error on the
    evaluation data: of the parameters themselves, and of the posterior through the probit link."""
    chosen = read(run)
    needs_classes(chosen, "laplace")
    if not 0 < precision < float("inf"):
        fail(f"--precision is {precision}; need a positive number")
    train, held = chosen.task.load()
    try:
        found = _found(chosen, train, held, precision, method)
    except KeyboardInterrupt:
        interrupted()
    curves = found.pop("curves")
    if as_json:
        typer.echo(text(found))
    else:
        _show(found)
    if plot:
        from kfaccore.cli.pictures import reliability

        target = chosen.folder / "laplace.png"
        with or_fail():
            reliability(curves, found["task"], target)
        typer.echo(f"picture: {target}", err=as_json)


def _found(chosen: Trained, train: tuple, held: tuple, precision: float, method: str) -> dict[str, Any]:
    from kfaccore import Code, Posterior, evidence, tuned

    count = float(len(train[0]))
    curvature = chosen.curvature(train, method)
    loss = float(chosen.task.loss.value(chosen.logits(train[0]), train[1]))
    try:
        before = Posterior(chosen.params, curvature, precision, count)
    except ValueError as error:
        fail(str(error))
    after, codes = tuned(before)
    f = chosen.logits(held[0])
    kinds = {
        "parameters": _softmax(f),
        "before": _predicted(chosen, before, held),
        "after": _predicted(chosen, after, held),
    }
    named = {name: Code(int(code[0])).name for name, code in codes.items()}
    return {
        "task": chosen.meta["task"],
        "method": method,
        "evidence": {"before": float(evidence(before, loss)), "after": float(evidence(after, loss))},
        "precision": {name: float(p) for name, p in after.precision.items()},  # type: ignore[union-attr]
        "gamma": {name: float(g) for name, g in after.gamma().items()},
        "codes": named,
        "predictions": {kind: _figures(p, held[1]) for kind, p in kinds.items()},
        "curves": {kind: _curve(p, held[1]) for kind, p in kinds.items()},
    }


def _predicted(chosen: Trained, P: Any, held: tuple) -> np.ndarray:
    """Probabilities by the probit link, batch by batch."""
    from kfaccore.posterior import probit
    from kfaccore_numpy import outputs

    given = batches(*held)
    rows = zip(given, outputs(chosen.task.network, chosen.params, given), strict=True)
    return np.concatenate([np.asarray(probit(chosen.logits(x), P.covariance(r))) for (x, _), r in rows])


def _softmax(f: np.ndarray) -> np.ndarray:
    risen = np.exp(f - f.max(1, keepdims=True))
    return risen / risen.sum(1, keepdims=True)


def _figures(p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Accuracy, mean -log p of the label, expected calibration error."""
    own = np.maximum(p[np.arange(len(y)), y], np.finfo(np.float64).tiny)
    gaps = _curve(p, y)
    error = sum(share * abs(right - sure) for share, sure, right in zip(*gaps.values(), strict=True))
    return {"accuracy": accuracy(p, y), "log_loss": float(-np.log(own).mean()), "calibration_error": float(error)}


def _curve(p: np.ndarray, y: np.ndarray) -> dict[str, list[float]]:
    """Of each bin of confidence that has examples: their share, mean confidence, and how many are right."""
    sure = p.max(1)
    right = p.argmax(1) == y
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    found: dict[str, list[float]] = {"share": [], "confidence": [], "right": []}
    for number in np.unique(bins):
        inside = bins == number
        found["share"].append(float(inside.mean()))
        found["confidence"].append(float(sure[inside].mean()))
        found["right"].append(float(right[inside].mean()))
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    first = found["evidence"]
    console.print(f"{found['task']}, {found['method']}: log evidence {first['before']:.1f}, tuned {first['after']:.1f}")
    table = Table("layer", "precision", "parameters decided", "code", title="tuned precisions")
    for name, p in found["precision"].items():
        table.add_row(name, f"{p:.3g}", f"{found['gamma'][name]:.0f}", found["codes"][name])
    console.print(table)
    table = Table("prediction", "accuracy", "log loss", "calibration error", title="evaluation data")
    titles = {"parameters": "parameters alone", "before": "probit, prior as given", "after": "probit, prior tuned"}
    for kind, title in titles.items():
        row = found["predictions"][kind]
        table.add_row(title, f"{row['accuracy']:.3f}", f"{row['log_loss']:.3f}", f"{row['calibration_error']:.3f}")
    console.print(table)
