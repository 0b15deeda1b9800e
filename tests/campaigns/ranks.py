"""Ranks: processes that train one model are killed, or given something else than the others.

`python tests/campaigns/ranks.py [--count N] [--seed S]`. What is promised: where a rank is killed, before a collective
or inside it, every survivor stops and its report names that rank and no other; ranks that begin with other parameters,
layers, clocks, dtypes, numbers or methods are all told which of them differ; shares of any sizes give every rank the
bits of the others, and the numbers of one process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt
from campaigns.ending import ended, options

STEPS = 4
SECONDS = 120  # after which a rank counts as hung
Body = Callable[[int, int], str]


def together(world: int, body: Body) -> list[str]:
    """`body(rank, world)` on forked ranks; what each returned, the text of its error, or "killed" or "hung"."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(Path(folder), rank, world, body) for rank in range(world)]
        end = time.monotonic() + SECONDS
        found = []
        for rank, child in enumerate(children):
            said = Path(folder) / f"said-{rank}"
            if not _ended(child, end):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found.append("hung")
            else:
                found.append(said.read_text() if said.exists() else "killed")
    return found


def _forked(folder: Path, rank: int, world: int, body: Body) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        where = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        said = body(rank, world)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said-{rank}").write_text(said)
    os._exit(0)


def _ended(child: int, end: float) -> bool:
    """Wait for a process without leaving it as a zombie longer than a moment."""
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    return False


def network(seed: int = 0, width: int = 5, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def batch(step: int, sizes: list[int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of a rank."""
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 6, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 3, (sum(sizes),), generator=rng)
    return x.split(sizes)[rank], y.split(sizes)[rank]


def core(fraction: float = 1.0, **options: object) -> kf.Preconditioner:
    comm = kt.Distributed(fraction) if dist.get_world_size() > 1 else kf.Serial()
    given = {"clocks": kf.Clocks(1, 2), "step": kf.SelfTuning(), "comm": comm, **options}
    return kf.Preconditioner(given.pop("method", kf.KFAC()), **given)  # type: ignore[arg-type]


def kill(rng: np.random.Generator) -> str:
    """One rank ends at its n-th collective; what was wrong with the reports, or nothing."""
    world = int(rng.integers(2, 5))
    victim = int(rng.integers(world))
    number = int(rng.integers(1, 30))
    inside = bool(rng.random() < 0.5)
    fraction = float(rng.integers(2))

    def body(rank: int, world: int) -> str:
        optimizer = kt.Optimizer(network(), nn.CrossEntropyLoss(), core(fraction))
        if rank == victim:
            _ends_at(number, inside)
        for step in range(12):
            optimizer.step(*batch(step, [8] * world, rank))
        return "ran to its end"

    found = together(world, body)
    wrong = [f"rank {rank}: {said}" for rank, said in enumerate(found) if rank != victim and not names(said, victim)]
    how = f"world {world}, rank {victim} at {number}, {'inside' if inside else 'before'}, fraction {fraction}"
    return f"{how}: {wrong}" if wrong or found[victim] != "killed" else ""


def names(said: str, victim: int) -> bool:
    """Whether a report says of this rank alone that it died."""
    accused = [int(n) for ranks in re.findall(r"ranks \[([\d, ]*)\] died", said) for n in ranks.split(",")]
    return "stops, for" in said and bool(accused) and set(accused) == {victim}


def _ends_at(number: int, inside: bool) -> None:
    """Kill this process at the n-th collective from now: when it is entered, or before a byte has left it."""
    real = dist.all_reduce
    enters = kt.distributed.RollCall.enters
    count = [0]

    def entering(roll: object, turn: int, *what: str) -> None:
        count[0] += 1
        if count[0] == number and not inside:
            os.kill(os.getpid(), signal.SIGKILL)
        enters(roll, turn, *what)  # type: ignore[arg-type]

    def reducing(*arguments: object, **options: object) -> object:
        if count[0] >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)  # type: ignore[arg-type]

    kt.distributed.RollCall.enters = entering  # type: ignore[method-assign, assignment]
    dist.all_reduce = reducing  # type: ignore[assignment]


ODD: dict[str, Callable[[bool], kt.Optimizer]] = {
    "parameters": lambda odd: _optimizer(network(seed=odd)),
    "structure": lambda odd: _optimizer(network(width=5 + odd)),
    "dtypes": lambda odd: _optimizer(network(dtype=torch.float32 if odd else torch.float64)),
    "clocks": lambda odd: _optimizer(network(), clocks=kf.Clocks(1, 2 + odd)),
    "damping": lambda odd: _optimizer(network(), step=kf.Fixed(0.1), schedules=kf.Schedules(0.1 + odd, 0.9)),
    "rate": lambda odd: _optimizer(network(), step=kf.Fixed(0.1 + odd)),
    "method": lambda odd: _optimizer(network(), method=kf.EKFAC() if odd else kf.KFAC()),
}


def _optimizer(net: nn.Module, **options: object) -> kt.Optimizer:
    return kt.Optimizer(net, nn.CrossEntropyLoss(), core(**options))  # type: ignore[arg-type]


def different(what: str, rng: np.random.Generator) -> str:
    """One rank begins with something else."""
    world = int(rng.integers(3, 5))  # of two, neither is the odd one
    odd = int(rng.integers(world))

    def body(rank: int, world: int) -> str:
        ODD[what](rank == odd)
        return "nothing was noticed"

    found = together(world, body)
    good = all(said.startswith("ValueError") and f"ranks [{odd}] disagree" in said for said in found)
    return "" if good else f"other {what} on rank {odd} of {world}: {found}"


def uneven(rng: np.random.Generator) -> str:
    """Shares of random sizes: every rank has the parameters of the others at every step, and of one process."""
    world = int(rng.integers(2, 5))
    sizes = [[int(n) for n in rng.integers(1, 9, size=world)] for _ in range(STEPS)]

    def body(rank: int, world: int) -> str:
        net = network()
        optimizer = kt.Optimizer(net, nn.CrossEntropyLoss(), core(), fisher=kf.type2)
        for step, counts in enumerate(sizes):
            counts = counts if world > 1 else [sum(counts)]
            optimizer.step(*batch(step, counts, rank))
            ours = torch.cat([p.detach().flatten() for p in net.parameters()])
            first = ours.clone()
            dist.broadcast(first, 0)
            if not torch.equal(ours, first):
                return f"the ranks have parted in step {step}"
        return " ".join(f"{x!r}" for x in ours.tolist())

    found = together(world, body)
    (alone,) = together(1, body)
    try:
        want = np.array(alone.split(), dtype=float)
        good = all(np.allclose(np.array(said.split(), dtype=float), want, rtol=1e-8, atol=1e-10) for said in found)
    except ValueError:
        good = False
    return "" if good else f"shares {sizes}: {found}, one process {alone}"


def campaign(count: int, seed: int, kinds: list[str]) -> list[str]:
    """What broke a promise in `count` kills, a case of each kind of difference, and count // 2 + 1 of uneven shares."""
    rng = np.random.default_rng(seed)
    found = [kill(rng) for _ in range(count)]
    found += [different(what, rng) for what in kinds]
    found += [uneven(rng) for _ in range(count // 2 + 1)]
    return [text for text in found if text]


def main() -> int:
    parser = options(__doc__, 10)
    parser.add_argument("--kinds", default=",".join(ODD))
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    torch.set_num_threads(1)
    broken = campaign(given.count, given.seed, kinds)
    return ended(f"ranks: {given.count} kills, {len(kinds)} kinds of difference", broken)


if __name__ == "__main__":
    sys.exit(main())
