"""`kfaccore influence`: which training examples speak for and against a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kfaccore.cli.fail import fail, or_fail
from kfaccore.cli.results import text
from kfaccore.cli.trained import Trained, examples, interrupted, mean_eigenvalues, read


def influence(
    run: Annotated[Path, typer.Argument(help="A folder of `kfaccore train --out`.")],
    queries: Annotated[Path, typer.Option(help=".npz of x and y: the predictions to explain.")],
    train: Annotated[Path, typer.Option(help=".npz of x and y: the examples it was trained on.")],
    top: Annotated[int, typer.Option(min=1, help="Examples to show of either kind.")] = 10,
    method: Annotated[str, typer.Option(help="kfac, ekfac, tekfac, diagonal, ...")] = "ekfac",
    damping: Annotated[float, typer.Option(help="Absolute, l2 if any; 0: 0.1 mean eigenvalues a layer.")] = 0.0,
    memory: Annotated[int, typer.Option(min=1, help="MiB that the queries may take.")] = 1024,
    plot: Annotated[bool, typer.Option("--plot", help="RUN/influence.png: queries beside their examples.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """The effect of every example of TRAIN on the log odds of each label in QUERIES (minus the loss, without labels).

    The effect of an example is what its being there adds, to first order: minus the score, over the examples.
    """
    chosen = read(run)
    asked = examples("--queries", queries, chosen)
    data = examples("--train", train, chosen)
    if not 0 <= damping < float("inf"):
        fail(f"--damping is {damping}; need a finite number >= 0")
    try:
        found, dampings = _scores(chosen, asked, data, (method, damping, memory << 20))
    except KeyboardInterrupt:
        interrupted()
    effects = -found / len(data[0])
    rows = [_row(number, asked[1], data[1], line, top, chosen.classes) for number, line in enumerate(effects)]
    meta = {"task": chosen.meta["task"], "method": method, "damping": dampings, "train": len(data[0])}
    if as_json:
        typer.echo(text({**meta, "queries": rows}))
    else:
        _show(rows, meta)
    if plot:
        from kfaccore.cli.pictures import influence as draw

        target = chosen.folder / "influence.png"
        with or_fail():
            draw(rows, asked[0], data[0], target)
        typer.echo(f"picture: {target}", err=as_json)


def _scores(
    chosen: Trained, asked: tuple, data: tuple, how: tuple[str, float, int]
) -> tuple[np.ndarray, dict[str, float]]:
    """(Q, T), and the damping of each layer."""
    from kfaccore import Posterior, empirical, scores
    from kfaccore_numpy import margin, measured

    method, damping, memory = how
    curvature = chosen.curvature(data, method)
    dampings = {name: damping or 0.1 * value for name, value in mean_eigenvalues(curvature).items()}
    try:
        P = Posterior(chosen.params, curvature, dampings)
    except ValueError as error:
        fail(str(error))
    loss = chosen.task.loss
    gradient = margin if chosen.classes else lambda f, y: -loss.gradient(f, y)
    pulled = measured(chosen.task.network, chosen.params, gradient, [asked])
    stream = chosen.stream(data, empirical)
    return np.asarray(scores(P, next(iter(pulled)), stream, memory)), dampings


def _row(
    number: int, asked: np.ndarray, labels: np.ndarray, effects: np.ndarray, top: int, classes: bool
) -> dict[str, Any]:
    """The most helpful examples of one query, of positive effect, and the most harmful, of negative effect."""
    order = np.argsort(-effects)
    helpful = order[effects[order] > 0][:top]
    harmful = order[effects[order] < 0][::-1][:top]

    def listed(places: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"example": int(t), "effect": float(effects[t]), **({"label": int(labels[t])} if classes else {})}
            for t in places
        ]

    label = {"label": int(asked[number])} if classes else {}
    return {"query": number, **label, "helpful": listed(helpful), "harmful": listed(harmful)}


def _show(rows: list[dict[str, Any]], meta: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "query", "label", "", "example", "label", "effect", title=f"influence on {meta['task']} ({meta['method']})"
    )
    for row in rows:
        head = (str(row["query"]), str(row.get("label", "")))
        for kind in ("helpful", "harmful"):
            if not row[kind]:
                table.add_row(*head, kind, "none", "", "")
                head = ("", "")
            for place, found in enumerate(row[kind]):
                cells = (str(found["example"]), str(found.get("label", "")), f"{found['effect']:+.3g}")
                table.add_row(*head, "" if place else kind, *cells)
                head = ("", "")
        table.add_section()
    console = Console()
    console.print(table)
    console.print(
        f"effect: what the example's being among {meta['train']} adds to the query's log odds, to first order.",
        soft_wrap=True,
    )
