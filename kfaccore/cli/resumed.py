"""What a run may go on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from kfaccore import metadata


def told(path: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    """Metadata of a saved run; ValueError where it is one of another task, method or seed."""
    meta = metadata(path)
    if (meta.get("task"), meta.get("method")) != (task, method):
        raise ValueError(f"{path} is a run of {meta.get('method')} on {meta.get('task')}, not {method} on {task}")
    if meta.get("seed") != seed:
        raise ValueError(f"{path} is a run of --seed {meta.get('seed')}; --seed is {seed}")
    return meta


def penalties(path: Path, meta: Mapping[str, Any], tuned: bool, layers: Iterable[str]) -> dict[str, float]:
    """The l2 of each layer that a run with `--tune-l2` had reached, empty for other runs; ValueError where the run was
    tuned and this one is not, or the other way about, or where the file says it wrongly."""
    l2 = meta.get("l2")
    if (l2 is not None) != tuned:
        raise ValueError(f"{path} is a run {'without' if tuned else 'with'} --tune-l2: it goes on as it began")
    if not tuned:
        return {}
    numbers = isinstance(l2, Mapping) and all(isinstance(x, float) and 0 < x < math.inf for x in l2.values())
    if not isinstance(l2, Mapping) or not numbers or set(l2) != set(layers):
        raise ValueError(f"{path} has damaged metadata: l2 is {l2!r}; need a positive number for each layer")
    return dict(l2)


def same_sharing(path: Path, meta: Mapping[str, Any], sharing: str) -> None:
    """ValueError where the run shared positions otherwise; files of before sharing was chosen do not say."""
    if meta.get("sharing", sharing) != sharing:
        raise ValueError(f"{path} is a run of --sharing {meta['sharing']}, not {sharing}")


def same_penalties(path: Path, meta: Mapping[str, Any], given: Mapping[str, float]) -> None:
    """ValueError where the run had another l2 or weight decay; files of before they were written do not say."""
    had = meta.get("penalties", {})
    if not isinstance(had, Mapping):
        raise ValueError(f"{path} has damaged metadata: penalties is {had!r}; need a number by name")
    for name, value in given.items():
        if had.get(name, value) != value:
            option = name.replace("_", "-")
            raise ValueError(f"{path} is a run of --{option} {had[name]}, not {value}: it goes on as it began")


def past(path: Path, method: str, keys: Sequence[str], taken: int) -> tuple[dict[str, list], dict[str, int], float]:
    """(curve, codes, seconds) of a method up to the step `taken` that the run's file holds, from the run.json beside
    it; empty ones and 0, which is said, where there is none of this run. The file itself holds no seconds, so that
    equal runs write equal files."""
    beside = path.with_name("run.json")
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
        curve: dict[str, list[Any]] = {
            key: [math.nan if x is None and key in keys else x for x in values]
            for key, values in told["curves"][method].items()
        }
        codes = next(row["codes"] for row in told["methods"] if row["method"] == method)
        if curve["step"][-1] == taken and set(keys) <= set(curve):
            return curve, dict(codes), float(curve["seconds"][-1])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration):
        pass  # no file, or another's
    typer.echo(f"hint: no curve of this run in {beside}: its steps and seconds count from here on", err=True)
    return {key: [] for key in keys}, {}, 0.0


def start(path: Path, taken: object, steps: int) -> int:
    """The steps it has taken; ValueError where none is left of `steps`."""
    if not isinstance(taken, int) or taken < 0:
        raise ValueError(f"{path} has taken {taken!r} steps; need a whole number")
    if taken >= steps:
        raise ValueError(
            f"nothing is left to do: {path} has taken {taken} steps already; --steps is {steps}, need more"
        )
    return taken
