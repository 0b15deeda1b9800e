"""`kfaccore prune`: accuracy against the share of weights that are kept, for four ways to choose and to make up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kfaccore.cli.fail import fail, or_fail
from kfaccore.cli.results import text
from kfaccore.cli.trained import Trained, accuracy, interrupted, mean_eigenvalues, needs_classes, read

POINTS = 6
Params = dict[str, Any]


def prune(
    run: Annotated[Path, typer.Argument(help="A folder of `kfaccore train --out`, of a classifier.")],
    share: Annotated[float, typer.Option(help="Of the weights, to take out at the end.")] = 0.9,
    precision: Annotated[float, typer.Option(help="Of the prior over the examples; 0: 1e-3 mean eigenvalues.")] = 0.0,
    method: Annotated[str, typer.Option(help="kfac, ekfac, tekfac, diagonal, ...")] = "ekfac",
    plot: Annotated[bool, typer.Option("--plot", help="RUN/prune.png: accuracy against the share kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Evaluation accuracy without retraining: magnitude, OBD, OBS with its compensation, EigenDamage (modes)."""
    chosen = read(run)
    needs_classes(chosen, "prune")
    if not 0 < share < 1:
        fail(f"--share is {share}; need a number between 0 and 1")
    if not 0 <= precision < float("inf"):
        fail(f"--precision is {precision}; need a finite number >= 0")
    try:
        found = _found(chosen, share, precision, method)
    except KeyboardInterrupt:
        interrupted()
    if as_json:
        typer.echo(text(found))
    else:
        _show(found)
    if plot:
        from kfaccore.cli.pictures import pruning

        target = chosen.folder / "prune.png"
        with or_fail():
            pruning(found, target)
        typer.echo(f"picture: {target}", err=as_json)


def _found(chosen: Trained, share: float, precision: float, method: str) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    from kfaccore import Posterior
    from kfaccore.posterior import damage, modes, weights

    train, held = chosen.task.load()
    curvature = chosen.curvature(train, method)
    prior = {name: precision or 1e-3 * value for name, value in mean_eigenvalues(curvature).items()}
    try:
        P = Posterior(chosen.params, curvature, prior)
    except ValueError as error:
        fail(str(error))
    size = {name: abs(W) for name, W in chosen.params.items()}
    unconverged = 0

    def compensated(gone: Params) -> Params:
        nonlocal unconverged
        theta, codes = _given(P, gone)
        unconverged += sum(bool(code.any()) for code in codes.values())
        return theta

    ways: dict[str, tuple[Params, Callable[[Params], Params]]] = {
        "magnitude": (size, lambda gone: _zeroed(chosen.params, gone)),
        "OBD": (damage(P), lambda gone: _zeroed(chosen.params, gone)),
        "OBS": (weights(P), compensated),
        "EigenDamage": (modes(P), lambda gone: _without_modes(P, gone)),
    }
    shares = [float(x) for x in np.linspace(0, share, POINTS)]
    found: dict[str, list[float]] = {}
    console = Console(stderr=True)
    for name, (saliency, pruned) in track(
        ways.items(), "pruning", console=console, disable=not console.is_terminal, transient=True
    ):
        rows = [chosen.logits(held[0], pruned(_lowest(saliency, x))) for x in shares]
        found[name] = [accuracy(f, held[1]) for f in rows]
    meta = {"task": chosen.meta["task"], "method": method, "kept": [1 - x for x in shares]}
    return {**meta, "accuracy": found, "unconverged": unconverged}


def _lowest(saliency: Params, share: float) -> Params:
    """Masks of the share of all entries that are lowest."""
    every = np.concatenate([np.ravel(x) for x in saliency.values()])
    order = np.argsort(np.argsort(every, kind="stable"), kind="stable")
    gone = order < round(share * len(every))
    ends = np.cumsum([x.size for x in saliency.values()])[:-1]
    parts = np.split(gone, ends)
    return {name: part.reshape(x.shape) for (name, x), part in zip(saliency.items(), parts, strict=True)}


def _zeroed(params: Params, gone: Params) -> Params:
    return {name: np.where(gone[name], np.zeros_like(W), W) for name, W in params.items()}


def _given(P: Any, gone: Params) -> tuple[Params, Params]:
    from kfaccore.linalg.cg import CG, Residual
    from kfaccore.posterior import given

    return given(P, 0.0, gone, CG(Residual(1e-3), 300))


def _without_modes(P: Any, gone: Params) -> Params:
    found = {}
    for name, basis in P.curvature.layers.items():
        W = P.mean[name]
        share = basis.into(W.reshape(basis.shape))
        found[name] = basis.back(np.where(gone[name], np.zeros_like(share), share)).reshape(W.shape)
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kept", *found["accuracy"], title="accuracy, not retrained")
    for number, kept in enumerate(found["kept"]):
        table.add_row(f"{100 * kept:.3g}%", *(f"{row[number]:.3f}" for row in found["accuracy"].values()))
    console = Console()
    console.print(f"{found['task']}, curvature by {found['method']}")
    console.print(table)
    if found["unconverged"]:
        console.print(f"{found['unconverged']} compensations stopped at their limit (UNCONVERGED)")
