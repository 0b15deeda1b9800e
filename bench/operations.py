"""How many operations is a step? Of `pre.step`, the shell included, and of the statistics while a draw runs back.

On an accelerator every operation is a launch, so that they are what a step of many layers costs there; none is needed
to count them. Views and aliases of torch are left out, except where a claim says so; what autograd itself runs
is the model's. Host reads are what waits for the device.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from report import Claim, arguments, at_most, finish
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfaccore as kf
import kfaccore_torch as kt

READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.item", "aten.equal", "aten.nonzero")
NO_WORK = ("aten.detach", "aten.alias", "aten.lift_fresh", "aten._unsafe_view")
KINDS = {"plain": (False, False), "update": (True, False), "update and refresh": (True, True)}


@dataclass
class Counted(TorchDispatchMode):
    """Operations by name while it is entered, those of autograd's engine left out; views apart, and host reads."""

    work: Counter[str] = field(default_factory=Counter)
    views: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if not _of_engine():
            kind = self.views if func.is_view or name in NO_WORK else self.work
            kind = self.reads if name in READS else kind
            kind[name] += 1
        return func(*args, **(kwargs or {}))


def _of_engine() -> bool:
    """Whether autograd's engine runs the operation, and no hook of ours inside it."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "array_api_compat" not in path:
            return False
        if path.endswith(("autograd/graph.py", "autograd/__init__.py")):
            return True
        frame = frame.f_back
    return False


class Block(nn.Module):
    """A transformer block with one packed projection, as GPT-2 has it."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        cut = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.ln_1(x)).reshape(cut).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.out(F.gelu(self.fc(self.ln_2(x))))


class GPT2(nn.Module):
    """Twelve blocks between an embedding and a last norm; the head is tied to no layer and left out of K-FAC."""

    def __init__(self, width: int = 16, vocabulary: int = 40, heads: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(12)))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.ln_f(self.blocks(self.wte(ids)))).flatten(0, 1)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            convolution = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.short = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50(width: int = 4, classes: int = 10) -> nn.Module:
    """53 convolutions with a norm each and a dense layer: 54 layers, 106 gains and biases."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for stage, count in enumerate((3, 4, 6, 3)):
        for i in range(count):
            layers.append(Bottleneck(inputs, width << stage, 1 + (i == 0 and stage > 0)))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@dataclass(frozen=True)
class Case:
    """A network, a batch, and the most operations of each kind of step."""

    name: str
    model: Callable[[], nn.Module]
    x: torch.Tensor
    y: torch.Tensor
    limits: tuple[int, int, int]


def cases() -> list[Case]:
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (4, 8))
    images = torch.randn(4, 3, 32, 32)
    return [
        Case("GPT-2-shaped", GPT2, ids, torch.randint(0, 40, (32,)), (150, 800, 1600)),
        Case("ResNet-50-shaped", resnet50, images, torch.randint(0, 10, (4,)), (300, 1400, 3000)),
    ]


def counted(case: Case) -> dict[str, tuple[Counted, Counted]]:
    """Of the draw and of `pre.step`, by the kind of step; each kind comes after one of its own, so that nothing is made
    for the first time."""
    model = case.model()
    found = {}
    for kind, due in KINDS.items():
        clocks = kf.Clocks(1 if due[0] else 1000, 1 if due[1] else 1000)
        core = kf.Preconditioner(kf.KFAC(), clocks, donate=True)
        pre = kt.Preconditioner(model, nn.CrossEntropyLoss(), core, namespace="torch")
        for _ in range(3):
            draw = Counted()
            step = Counted()
            with pre.capture():
                f = model(case.x)
            with draw:
                loss = pre.loss(f, case.y)
            loss.backward()
            with step:
                pre.step()
            model.zero_grad()
        found[kind] = draw, step
    return found


class Reading:
    """Counts arrays read on the host, by the method that did it, while it is entered."""

    NAMES = ("__bool__", "__float__", "__int__", "__array__")

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.kept: dict[str, Any] = {}

    def __enter__(self) -> Reading:
        for name in self.NAMES:
            own = self.kept[name] = getattr(torch.Tensor, name)

            def told(x: torch.Tensor, *rest: Any, own: Any = own, name: str = name, **more: Any) -> Any:
                self.found[name] += 1
                return own(x, *rest, **more)

            setattr(torch.Tensor, name, told)
        return self

    def __exit__(self, *_: object) -> None:
        for name, own in self.kept.items():
            setattr(torch.Tensor, name, own)


def core_alone() -> dict[str, tuple[int, int]]:
    """Operations, views included, and host reads of the core with 48 dense layers of 64 x 64 and 32 rows."""
    blocks = {f"layer{i}": kf.Block(64, 64) for i in range(48)}
    pre = kf.Preconditioner(kf.KFAC())
    records = {name: kf.Record(torch.randn(32, 64), torch.randn(32, 64), 32) for name in blocks}
    grads = {name: torch.randn(64, 64) for name in blocks}
    state = pre.init(blocks, grads["layer0"])
    _, state, _ = pre.do(kf.Due(True, True), state, records, grads)
    found = {}
    for kind, due in KINDS.items():
        with Reading() as read, Counted() as seen:
            pre.do(kf.Due(*due), state, records if due[0] else None, grads)
        found[kind] = sum((seen.work + seen.views).values()), sum(read.found.values()) + sum(seen.reads.values())
    return found


def main() -> None:
    options = arguments(__doc__)
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    for case in cases():
        for (kind, (draw, step)), limit in zip(counted(case).items(), case.limits, strict=True):
            inside = sum(draw.work.values()) if KINDS[kind][0] else 0
            work = sum(step.work.values())
            reads = sum(step.reads.values())
            rows.append([case.name, kind, inside, work, sum(step.views.values()), reads])
            claims.append(at_most(f"{case.name}, {kind}: operations", inside + work, limit))
            if kind != "update and refresh":
                claims.append(at_most(f"{case.name}, {kind}: host reads", reads, 0))
    for (kind, (operations, reads)), limit in zip(core_alone().items(), (60, 200, 500), strict=True):
        rows.append(["48 of 64 x 64, core", kind, "", operations, "included", reads])
        claims.append(at_most(f"48 records of 64 x 64 in the core, {kind}: operations and views", operations, limit))
        if kind != "update and refresh":
            claims.append(at_most(f"48 records of 64 x 64 in the core, {kind}: host reads", reads, 0))
    columns = ["network", "step", "in the draw", "in the step", "views", "host reads"]
    finish("Operations of a K-FAC step, torch's namespace", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
