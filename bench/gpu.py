"""What does a K-FAC step cost on a GPU, over SGD in the same run?

Each network is trained by SGD with momentum, alone and behind a `Preconditioner`; a cycle of six steps has a refresh,
two more updates and three plain steps. Device-busy time is the sum of what torch's profiler saw on the device; eager
time is the wall's, the device idle before and after. 10/100 and 1/10 are put together from the parts. Without a GPU the
networks are small, run on the CPU, and nothing is claimed.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import gc
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from gpu_models import Case, cases
from gpu_parts import errors, idle, inverses, norms
from report import Claim, at_most, finish, parser
from torch.profiler import ProfilerActivity, profile

import kfaccore as kf
import kfaccore_torch as kt

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KINDS = ("refresh", "plain", "update", "plain", "update", "plain")  # of a cycle
GIB = 2**30
# as constants: it covers convolutions and dense layers, and a run of it takes longer than all of this
PEER = "kfac-pytorch, H200, 2026-11-26"
PEER_WALLS = (
    ("ResNet-50 float32", "10/100", 2.1),
    ("ResNet-50 float32", "1/10", 7.2),
    ("transformer float32", "10/100", 1.56),
    ("transformer float32", "1/10", 3.7),
)


@dataclass
class Seen:
    """Of one kind of step: milliseconds on the wall and busy on the device, kernels, copies to the host, peak bytes."""

    wall: float
    busy: float
    kernels: int
    reads: int
    peak: float
    top: list[tuple[str, float, int]]


class Run:
    """A training loop whose steps are taken one by one."""

    def __init__(self, case: Case, namespace: str | None, **settings: Any) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.model().to(DEVICE)
        x, y = case.batch()
        self.x = x.to(DEVICE)
        self.y = y.to(DEVICE)
        if case.half and x.ndim == 4:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.x = self.x.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9)
        self.pre = None
        if namespace:
            skip = case.skip if case.norms else (*case.skip, *norms(self.model))
            core = kf.Preconditioner(kf.KFAC(), kf.Clocks(2, len(KINDS)), donate=True)
            settings = {"skip": skip, "namespace": namespace, "precision": case.precision, **settings}
            self.pre = kt.Preconditioner(self.model, case.loss, core, **settings)

    def step(self) -> None:
        """One of SGD, or the next of the cycle."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.case.half):
            if self.pre is None:
                self.case.loss(self.model(self.x), self.y).backward()
            else:
                with self.pre.capture():
                    f = self.model(self.x)
                loss = self.pre.loss(f, self.y)
                del f
                loss.backward()
                self.pre.step()
        self.optimizer.step()


@contextmanager
def products(case: Case) -> Iterator[None]:
    """Dense products as the case has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.matmul else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fresh() -> None:
    """Nothing of a run before is left on the device."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def timed(run: Run) -> float:
    """Milliseconds of one step on the wall."""
    idle()
    start = time.perf_counter()
    run.step()
    idle()
    return 1e3 * (time.perf_counter() - start)


def profiled(run: Run) -> tuple[float, int, int, list[tuple[str, float, int]]]:
    """(busy milliseconds, kernels, copies to the host, what took longest) of one step."""
    idle()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        run.step()
        idle()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in found.events() or ():
        if "CUDA" in str(event.device_type):
            spent[event.name] += event.time_range.elapsed_us() / 1e3
            count[event.name] += 1
    reads = sum(n for name, n in count.items() if name.startswith("Memcpy DtoH"))
    kernels = sum(n for name, n in count.items() if not name.startswith(("Memcpy", "Memset")))
    return spent.total(), kernels, reads, [(name, ms, count[name]) for name, ms in spent.most_common(12)]


def measured(run: Run, kinds: tuple[str, ...], cycles: int) -> dict[str, Seen]:
    """By kind of step, after a cycle that is not counted."""
    for _ in kinds:
        run.step()
    walls = defaultdict(list)
    peaks: dict[str, float] = {}
    for _ in range(cycles):
        for kind in kinds:
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            walls[kind].append(timed(run))
            peaks[kind] = torch.cuda.max_memory_allocated() / GIB if GPU else 0.0
    found = {}
    for kind in kinds:
        busy, kernels, reads, top = profiled(run) if GPU else (0.0, 0, 0, [])
        found[kind] = Seen(median(walls[kind]), busy, kernels, reads, peaks[kind], top)
    return found


def mixed(plain: float, update: float, refresh: float, every: int, refreshes: int) -> float:
    """The mean step with an update every `every` steps and a refresh every `refreshes`."""
    return plain + (update - plain) / every + (refresh - update) / refreshes


def ratios(found: dict[str, Seen], sgd: Seen, every: int, refreshes: int) -> tuple[float, float]:
    """(busy, wall) over SGD's."""
    parts = [found[kind] for kind in ("plain", "update", "refresh")]
    busy = mixed(*(part.busy for part in parts), every, refreshes) / max(sgd.busy, 1e-9)
    return busy, mixed(*(part.wall for part in parts), every, refreshes) / sgd.wall


def table(case: Case, namespaces: list[str], cycles: int, verbose: bool) -> tuple[list[list[Any]], list[Claim]]:
    """Rows and claims of one network."""
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    reached: dict[str, float] = {}
    with products(case):
        fresh()
        sgd = measured(Run(case, None), ("plain",), 3 * cycles)["plain"]
        rows.append([case.name, "SGD", "", sgd.wall, sgd.busy, sgd.kernels, sgd.reads, sgd.peak, "", ""])
        for namespace in namespaces:
            fresh()
            run = Run(case, namespace)
            found = measured(run, KINDS, cycles)
            state = sum(one.state for one in run.pre.memory().values()) / GIB if run.pre else 0.0
            often = ratios(found, sgd, 1, 10)
            seldom = ratios(found, sgd, 10, 100)
            for kind in ("plain", "update", "refresh"):
                x = found[kind]
                shown = [x.wall / sgd.wall, x.busy / max(sgd.busy, 1e-9), x.kernels - sgd.kernels, x.reads - sgd.reads]
                rows.append([case.name, namespace, kind, *shown, x.peak, "", ""])
                for name, ms, count in x.top if verbose else ():
                    print(f"    {case.name} {namespace} {kind}: {ms:.2f} ms {count} x {name[:90]}")
            rows.append([case.name, namespace, "10/100", seldom[1], seldom[0], "", "", "", state, ""])
            rows.append([case.name, namespace, "1/10", often[1], often[0], "", "", "", state, ""])
            reached[namespace] = seldom[0]
            if namespace == "cupy" and "torch" in reached:
                name = f"{case.name}, 10/100 of CuPy over torch's namespace, device busy"
                claims.append(at_most(name, seldom[0] / reached["torch"], 1.3))
            if namespace == "torch" and GPU and case.limits:
                claims += claimed(case, sgd, found, seldom, often, state)
            del run
    return rows, claims


def claimed(
    case: Case, sgd: Seen, found: dict[str, Seen], seldom: tuple[float, float], often: tuple[float, float], state: float
) -> list[Claim]:
    """What the torch namespace must reach."""
    limits = case.limits
    claims = [at_most(f"{case.name}, 10/100 over SGD, device busy", seldom[0], limits["10/100"])]
    if "wall" in limits:
        claims.append(at_most(f"{case.name}, 10/100 over SGD, wall", seldom[1], limits["wall"]))
    if "1/10" in limits:
        claims.append(at_most(f"{case.name}, 1/10 over SGD, device busy", often[0], limits["1/10"]))
    claims.append(
        at_most(f"{case.name}, kernels of a plain step over SGD's", found["plain"].kernels - sgd.kernels, 110)
    )
    for kind in ("plain", "update"):
        claims.append(at_most(f"{case.name}, host reads of {kind} over SGD's", found[kind].reads - sgd.reads, 0))
    peak = (found["update"].peak - state) / sgd.peak
    claims.append(at_most(f"{case.name}, peak of an update without state over SGD's", peak, 1.15))
    return claims


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="*", help="parts of names; all without it")
    options.add_argument("--namespaces", nargs="*", default=["torch", "cupy"] if GPU else ["torch", "numpy"])
    options.add_argument("--cycles", type=int, default=2)
    options.add_argument("--verbose", action="store_true", help="the kernels that take longest")
    given = options.parse_args()
    print(
        f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}" if GPU else "no device: small, on the CPU"
    )
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    for case in cases(small=not GPU):
        if given.cases and not any(part in case.name for part in given.cases):
            continue
        namespaces = [name for name in given.namespaces if name != "cupy" or case.cupy]
        more, told = table(case, namespaces, given.cycles, given.verbose)
        for row in more:
            print("   ", *(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row), file=sys.stderr)
        rows += more
        claims += told
    if not given.cases:
        more, told = inverses()
        rows += more
        claims += told if GPU else []
    for case in cases(small=not GPU):
        if case.accuracy and not given.cases:
            fresh()
            more, told = errors(case)
            rows += more
            claims += told if GPU else []
    rows += [[name, PEER, clocks, ratio, *[""] * 6] for name, clocks, ratio in PEER_WALLS]
    columns = ["network", "namespace", "step", "wall", "busy", "kernels", "host reads", "peak GiB", "state GiB", ""]
    finish("K-FAC over SGD on a GPU (SGD's rows in ms)", columns, rows, claims, given.json)


if __name__ == "__main__":
    main()
