"""What `inspect` reads of a training step in a file of records: newton, gamma and the noise scale, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfaccore.cli.table import lines
from kfaccore.cli.trained import mean_eigenvalues
from kfaccore.xp.arrays import Array, from_host

if TYPE_CHECKING:
    from kfaccore.posterior import Reading
    from kfaccore.record import Record
    from kfaccore.record.stored import Stored

SHARE = 0.1  # of the layer's mean eigenvalue: the damping, as `compare` has it
HEADS = ("layer", "damping", "promised", "decided", "condition", "noise", "noise in L^-1")


class Step:
    """{layer: (damping, Reading)} of the layers whose records are of the loss's own gradients, and of the others why
    not; the curvature is EK-FAC's of the same records."""

    def __init__(self, stored: Stored, widest: int) -> None:
        self.found: dict[str, tuple[float, Reading]] = {}
        self.why: dict[str, str] = {}
        for name in stored:
            record = stored[name]
            trouble = _wide(record, widest) or self._read(name, record, stored)
            if trouble:
                self.why[name] = trouble

    def _read(self, name: str, record: Record, stored: Stored) -> str:
        from kfaccore import EKFAC, Posterior, fit
        from kfaccore.analysis.exact import hosted
        from kfaccore.analysis.own import not_own
        from kfaccore.posterior import reading

        host = hosted(record)
        grad = stored.finite_grad(name)
        trouble = not_own(host, grad)
        if trouble or grad is None:
            return trouble
        curvature = fit(EKFAC(), [{name: host}])
        damping = SHARE * mean_eigenvalues(curvature)[name]
        if not damping > 0:
            return "its curvature is zero"
        given: Array = from_host(grad.astype(host.g.dtype).reshape(curvature.layers[name].shape), host.g)
        P = Posterior({name: 0 * given}, curvature, damping)
        self.found[name] = damping, reading(P, {name: host}, {name: given})[name]
        return ""

    def to_dict(self) -> dict[str, dict[str, object]]:
        """{layer: figures, or why there are none}."""
        told: dict[str, dict[str, object]] = {name: {"why": why} for name, why in self.why.items()}
        for name, (damping, of) in self.found.items():
            kinds = {"plain": of.noise.plain, "natural": of.noise.natural}
            told[name] = {"damping": damping, "newton": of.newton, "gamma": of.gamma, "noise": kinds}
            told[name] |= {"trace": of.trace, "top": of.top, "condition": of.condition}
        return told

    def text(self) -> list[str]:
        """A table of the layers read, a line for each reason why others were not."""
        shown = []
        if self.found:
            cells = [(name, *_cells(damping, of)) for name, (damping, of) in self.found.items()]
            shown += ["", "a step on these records, damping a tenth of the mean eigenvalue, curvature of EK-FAC:"]
            shown += lines(HEADS, cells)
        for why in dict.fromkeys(self.why.values()):
            names = [name for name, other in self.why.items() if other == why]
            whom = (
                "any layer" if len(names) > 1 and not self.found and len(names) == len(self.why) else ", ".join(names)
            )
            shown.append(f"no reading of {whom}: {why}")
        return shown


def _wide(record: Record, widest: int) -> str:
    side = max(record.d_in, record.d_out)
    return f"a side of {side} is wider than {widest}: --full" if side > widest else ""


def _cells(damping: float, of: Reading) -> tuple[str, ...]:
    """The decrease promised is half of newton; noise beyond what the batch shows is a word."""
    noise = ["all noise" if x == float("inf") else f"{x:.3g}" for x in of.noise]
    return f"{damping:.1e}", f"{of.newton / 2:.3g}", f"{of.gamma:.1f}", f"{of.condition:.1e}", *noise
