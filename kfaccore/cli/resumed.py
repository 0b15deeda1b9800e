"""What a run may go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kfaccore import metadata


def told(path: Path, task: str, method: str, seed: int) -> dict[str, Any]:
    """Metadata of a saved run; ValueError where it is one of another task, method or seed."""
    meta = metadata(path)
    if (meta.get("task"), meta.get("method")) != (task, method):
        raise ValueError(f"{path} is a run of {meta.get('method')} on {meta.get('task')}, not {method} on {task}")
    if meta.get("seed") != seed:
        raise ValueError(f"{path} is a run of --seed {meta.get('seed')}; --seed is {seed}")
    return meta


def start(path: Path, taken: object, steps: int) -> int:
    """The steps it has taken; ValueError where none is left of `steps`."""
    if not isinstance(taken, int) or taken < 0:
        raise ValueError(f"{path} has taken {taken!r} steps; need a whole number")
    if taken >= steps:
        raise ValueError(
            f"nothing is left to do: {path} has taken {taken} steps already; --steps is {steps}, need more"
        )
    return taken
