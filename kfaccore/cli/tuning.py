"""`train --tune-l2` and `--sharing`: what they make of a method, and what is shown of the penalties found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kfaccore.cli.fail import fail
from kfaccore.method import Method

if TYPE_CHECKING:
    from rich.table import Table

    from kfaccore import Preconditioner
    from kfaccore_numpy import SGD, Adam, Online, Task, Tuned


def shared(name: str, made: Callable[..., Method], sharing: str, tuned: bool) -> Method:
    """A method of the catalogue with `sharing`, a function of records. Where none is named it keeps its own, or is
    `tuned` and takes reduce for expand. Exit 2 for an unknown name and for a method without the choice."""
    from kfaccore import expand, reduce

    known = {"expand": expand, "reduce": reduce}
    if sharing and sharing not in known:
        fail(f"--sharing is {sharing!r}; there are {', '.join(known)}")
    own = vars(made()).get("sharing")
    if sharing and own is None:
        fail(f"--sharing {sharing}: {name} has no such choice")
    chosen = sharing or ("reduce" if tuned and own is expand else "")
    return made(sharing=known[chosen]) if chosen else made()


def sharing_of(optimiser: Preconditioner) -> str:
    """The name of the sharing of its method; empty where it has none."""
    chosen = vars(optimiser.methods).get("sharing")
    return chosen.__name__ if callable(chosen) else ""


def online(optimiser: Preconditioner | SGD | Adam, task: Task, l2: float) -> Preconditioner | SGD | Adam | Online:
    """The optimiser with its l2 tuned every epoch, a first-order one as it is; exit 2 where evidence means nothing."""
    from kfaccore import Preconditioner, SoftmaxCrossEntropy
    from kfaccore_numpy import Online
    from kfaccore_numpy.online import START

    if not isinstance(task.loss, SoftmaxCrossEntropy):
        fail("--tune-l2 needs a classifier, such as digits-classifier: a Gaussian's evidence needs its noise's size")
    if not isinstance(optimiser, Preconditioner):
        return optimiser
    count = len(task.load()[0][0])
    return Online(optimiser, task, l2 or START, every=-(-count // task.batch))


def tuning(name: str, found: list[Tuned]) -> Table | str:
    """The penalties of a method's last tuning, a line a layer."""
    from rich.table import Table

    if not found:
        return f"{name}: no epoch was finished, so no l2 was tuned"
    last = found[-1]
    kept = sum(code != "OK" for one in found for code in one.codes.values())
    title = f"{name}: l2 tuned {len(found)} times, log evidence {found[0].evidence:.1f} to {last.evidence:.1f}"
    table = Table("layer", "l2", "code", title=f"{title}, {kept} not found" if kept else title)
    for layer, value in last.l2.items():
        table.add_row(layer, f"{value:.3g}", last.codes[layer])
    return table
