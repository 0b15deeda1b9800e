"""The CUDA paths of the torch shell without a GPU, on a device that torch takes for one (`pretended.py`).

    python tests/campaigns/cuda_on_cpu.py

The tests of `tests/test_torch_gpu.py` that need neither CuPy nor TF32; then models and ways to train them, whose
parameters after six steps are those of the CPU; then how often the host waits, which does not depend on how many layers
there are; then the operations of a plain step that is not recorded, with norms and embeddings left to SGD. Where torch
has CUDA, or there is no g++, it says so and ends with 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ending import ended
from torch import nn

import kfaccore as kf

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS.parent / "bench"))
DTYPE = torch.float64
STEPS = 6
EXACT = 1e-7  # what six steps leave of another order of sums


class Attention(nn.Module):
    """A table tied to the output, positions, causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.positions = nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=DTYPE)
        hidden = self.table(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.layer(hidden, src_mask=mask, is_causal=True)).mT


class Graph(nn.Module):
    """Messages between the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        to = torch.arange(len(x), device=x.device)
        gathered = torch.zeros_like(x).index_add(0, to.roll(1), x) + x
        return self.last(torch.tanh(self.first(gathered)))


class Experts(nn.Module):
    """Rows that go to one of three layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (gates.argmax(-1) == k).nonzero()[:, 0]
            out = out.index_add(0, rows, torch.tanh(expert(x[rows])) * gates[rows, k, None])
        return self.head(out)


def dense(depth: int = 3) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(6, 4))


def images() -> nn.Module:
    """Windows of several geometries, groups, both kinds of norms, a transposed convolution."""
    first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    last = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 6, 1))
    return nn.Sequential(first, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


Batch = tuple[torch.Tensor, torch.Tensor]


def rows(size: tuple[int, ...], labels: tuple[int, ...]) -> list[Batch]:
    rng = torch.Generator().manual_seed(3)
    one = lambda: (torch.randn(size, generator=rng, dtype=DTYPE), torch.randint(4, labels, generator=rng))  # noqa: E731
    return [one() for _ in range(STEPS)]


def words() -> list[Batch]:
    rng = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(20, (2, 4, 8), generator=rng)) for _ in range(STEPS)]  # pyright: ignore


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Batch]], nn.Module]] = {
    "dense": (dense, partial(rows, (10, 6), (10,)), nn.CrossEntropyLoss()),
    "weights": (dense, partial(rows, (10, 6), (10,)), nn.CrossEntropyLoss(torch.arange(1.0, 5, dtype=DTYPE))),
    "images": (images, partial(rows, (6, 3, 8, 8), (6,)), nn.CrossEntropyLoss()),
    "attention": (Attention, words, nn.CrossEntropyLoss(ignore_index=0)),
    "graph": (Graph, partial(rows, (12, 6), (12,)), nn.CrossEntropyLoss()),
    "experts": (Experts, partial(rows, (12, 6), (12,)), nn.CrossEntropyLoss()),
}
CLOCKS = kf.Clocks(1, 2)
OPTIMIZERS = ("Optimizer", "Optimizer, fixed")
WAYS: dict[str, kf.Preconditioner] = {
    "kfac": kf.Preconditioner(kf.KFAC(), CLOCKS, kf.Schedules(0.1), donate=True),
    "ekfac": kf.Preconditioner(kf.EKFAC(), CLOCKS, kf.Schedules(0.1)),
    "singd": kf.Preconditioner(kf.SINGD(), CLOCKS, kf.Schedules(0.1)),
    "noise": kf.Preconditioner(kf.KFAC(), CLOCKS, kf.Schedules(0.1), step=kf.Fixed(0.1, rescale=kf.Noise())),
    "Optimizer": kf.Preconditioner(kf.KFAC(), CLOCKS, step=kf.SelfTuning()),
    "Optimizer, fixed": kf.Preconditioner(kf.KFAC(), CLOCKS, kf.Schedules(0.1), step=kf.Fixed(0.1, 0.9)),
}


def trained(model: nn.Module, loss: nn.Module, batches: list[Batch], core: kf.Preconditioner, way: str) -> None:
    """A step a batch, by `Optimizer` or in a loop before SGD."""
    import kfaccore_torch as kt

    settings: dict[str, Any] = {"namespace": "torch", "fisher": kf.type2, "uncovered": kf.Diagonal()}
    if way in OPTIMIZERS:
        optimizer = kt.Optimizer(model, loss, core, **settings)
        for x, y in batches:
            optimizer.step(x, y)
        return
    pre = kt.Preconditioner(model, loss, core, **settings)
    outer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for x, y in batches:
        outer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        outer.step()


def apart(name: str, way: str) -> float:
    """How far parameters of the two devices lie apart, relative to the largest of each."""
    make, data, loss = MODELS[name]
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = make().to(device, DTYPE)
        trained(model, loss.to(device), [(x.to(device), y.to(device)) for x, y in data()], WAYS[way], way)
        found.append([p.detach().cpu() for p in model.parameters()])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def waits(depth: int, way: str) -> int:
    """Of the last step, which updates nothing."""
    import pretended

    torch.manual_seed(1)
    model = dense(depth).to("cuda", DTYPE)
    batches = [(x.cuda(), y.cuda()) for x, y in rows((10, 6), (10,))]
    counted: list[int] = []
    model.register_forward_pre_hook(lambda *_: counted.append(pretended.waited()))
    core = kf.Preconditioner(kf.KFAC(), kf.Clocks(9, 9), kf.Schedules(0.1), step=WAYS[way].rule)
    trained(model, nn.CrossEntropyLoss(), batches, core, way)
    return pretended.waited() - counted[-2 if core.rule.judges else -1]  # a step that is judged runs the model again


def operations() -> dict[str, int]:
    """Of a plain step, by network: launches, but that one on lists of arrays may be a few."""
    import operations as bench

    from kfaccore_torch import launched

    launched.MOST_BYTES = 0  # no graph
    found = {}
    for case in bench.cases():

        def frozen(case: bench.Case = case) -> nn.Module:
            model = case.model().cuda()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.Embedding):
                    module.requires_grad_(False)
            return model

        on_device = replace(case, model=frozen, x=case.x.cuda(), y=case.y.cuda())
        found[case.name] = sum(bench.counted(on_device)["plain"][1].work.values())
    return found


def campaign() -> list[str]:
    """Broken promises."""
    broken = []
    for (name, count), most in zip(operations().items(), (60, 110), strict=True):
        print(f"operations of a plain step, {name}: {count}")
        broken += [f"{name}: {count} operations, {most} at most"] * (count > most)
    for name in MODELS:
        for way in WAYS:
            far = apart(name, way)
            print(f"{name:10} {way:16} {far:.1e}", flush=True)
            broken += [f"{name}, {way}: {far:.2g} from the CPU's parameters"] * (not far <= EXACT)
    for way, most in (("kfac", 0), ("noise", 7), ("Optimizer", 8), ("Optimizer, fixed", 2)):
        found = [waits(depth, way) for depth in (2, 6)]
        print(f"waits of a plain step, {way}, 10 and 26 parameters: {found}")
        broken += [f"{way}: the host waits {found} times"] * (found[0] != found[1] or found[0] > most)
    return broken


def main() -> int:
    if torch.cuda.is_available() or not shutil.which("g++"):
        print("torch has CUDA here: pytest -m device" if torch.cuda.is_available() else "no g++ here")
        return 0
    import pretended

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PRETENDED": pretended.FILE, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "pretended", "-m", "device"]
    command += ["-k", "not cupy and not TF32", str(TESTS / "test_torch_gpu.py")]
    failed = subprocess.run(command, env=environment, check=False).returncode
    broken = campaign() + ["tests of the device failed"] * bool(failed)
    return ended(f"cuda on cpu: {len(MODELS) * len(WAYS)} models and ways", broken)


if __name__ == "__main__":
    sys.exit(main())
