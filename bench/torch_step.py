"""What does K-FAC add to a torch step, and what does a factor computation cost by itself?

Classic autoencoder 784-1000-500-250-30-..., batch 512; convolutions 3-32-64-128 on 32 x 32, batch 128; transformer of
width 256, 4 layers, 128 positions, batch 16. Every figure is over the plain SGD step, or the forward and backward, of
the same model in the same interleaved rounds. Monte-Carlo draws; statistics every 10 steps and inverses every 100, or 1
and 10, put together from a step without either, one with statistics and one with both. curvlinops beside it if present.

NumPy does K-FAC's products and torch the step they are compared with, so OPENBLAS_CORETYPE, which would force the
kernels of one side only, is dropped: both libraries choose for the processor. The last line says what OpenBLAS chose.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"
FORCED = os.environ.pop("OPENBLAS_CORETYPE", None)

import importlib.util
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from report import Claim, arguments, at_most, claim, finish, kernels
from torch import nn

import kfaccore as kf
import kfaccore_torch as kt

NEVER = 10**9
LIMITS = {"autoencoder": (2.0, 2.9, 1.5), "cnn": (1.18, 2.3, 2.1), "transformer": (1.2, 2.0, 1.7)}


def autoencoder() -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers = [x for i, o in pairwise(sizes) for x in (nn.Linear(i, o), nn.Tanh())]
    x = torch.rand(512, 784)
    return nn.Sequential(*layers[:-1]), nn.MSELoss(), x, x


def cnn() -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))
    return model, nn.CrossEntropyLoss(), torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))


class Transformer(nn.Module):
    def __init__(self, characters: int = 64, d: int = 256) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, d), nn.Embedding(128, d)
        block = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, characters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.blocks(self.token(x) + self.position(torch.arange(x.shape[1])), mask=mask, is_causal=True)
        return self.head(self.norm(h)).transpose(1, 2)


def transformer() -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    x = torch.randint(0, 64, (16, 129))
    return Transformer(), nn.CrossEntropyLoss(), x[:, :-1], x[:, 1:]


MODELS: dict[str, Callable] = {"autoencoder": autoencoder, "cnn": cnn, "transformer": transformer}


def sgd(name: str) -> Callable[[], Any]:
    model, loss, x, y = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def kfac(name: str, update: int, refresh: int) -> Callable[[], Any]:
    """Factored where rows are few (the one-object optimizer), dense gradients elsewhere (the preconditioner)."""
    model, loss, x, y = MODELS[name]()
    clocks = kf.Clocks(update, refresh)
    if name == "autoencoder":
        core = kf.Preconditioner(kf.KFAC(), clocks, step=kf.Fixed(1e-4, 0.9), donate=True)
        whole = kt.Optimizer(model, loss, core)
        return lambda: whole.step(x, y)
    pre = kt.Preconditioner(model, loss, kf.Preconditioner(kf.KFAC(), clocks, donate=True))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        with pre.capture():
            f = model(x)
        pre.loss(f, y).backward()
        pre.step()
        optimizer.step()

    return step


def forward_backward(name: str) -> Callable[[], Any]:
    model, loss, x, y = MODELS[name]()

    def step() -> None:
        model.zero_grad()
        loss(model(x), y).backward()

    return step


def factors(name: str) -> Callable[[], Any]:
    """All factors of one batch from nothing: forward, one draw, A and G."""
    model, loss, x, y = MODELS[name]()
    pre = kt.Preconditioner(model, loss, kf.KFAC())

    def step() -> None:
        with pre.capture():
            f = model(x)
        pre.loss(f, y)  # statistics are taken here
        pre.discard()

    return step


def curvlinops(name: str) -> Callable[[], Any] | None:
    """The same by the published library, where it installs and knows all layers."""
    if name == "transformer" or importlib.util.find_spec("curvlinops") is None:
        return None
    from curvlinops import KFACLinearOperator

    model, loss, x, y = MODELS[name]()
    options: dict[str, Any] = {"fisher_type": "mc", "check_deterministic": False}

    def step() -> None:
        KFACLinearOperator(model, loss, list(model.parameters()), [(x, y)], **options).compute_kronecker_factors()

    return step


def timed(functions: dict[str, Callable[[], Any] | None], rounds: int) -> dict[str, float]:
    """Median of each function's time over its baseline's in the same round."""
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for label, function in functions.items():
            if function is None:
                continue
            begun = time.process_time()
            function()
            if turn:
                times.setdefault(label, []).append(time.process_time() - begun)
    return {label: median(found) for label, found in times.items()}


def main() -> None:
    given = arguments(__doc__)
    rows: list = []
    claims: list[Claim] = []
    for name, (slow, fast, alone) in LIMITS.items():
        torch.manual_seed(0)
        functions: dict[str, Callable[[], Any] | None] = {
            "sgd": sgd(name),
            "plain": kfac(name, NEVER, NEVER),
            "update": kfac(name, 1, NEVER),
            "refresh": kfac(name, 1, 1),
            "forward+backward": forward_backward(name),
            "factors": factors(name),
            "curvlinops": None if given.quick else curvlinops(name),
        }
        found = timed(functions, 3 if given.quick else 11)
        base = found["sgd"]
        plain, update, refresh = (found[k] / base for k in ("plain", "update", "refresh"))
        often, seldom = (plain + (update - plain) / u + (refresh - update) / r for u, r in ((1, 10), (10, 100)))
        whole = found["factors"] / found["forward+backward"]
        peer = found["curvlinops"] / found["forward+backward"] if "curvlinops" in found else None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append([name, 1000 * base, plain, update, refresh, seldom, often, whole, peer or "-", peak])
        claims.append(at_most(f"{name}, step at 10/100 over SGD", seldom, slow))
        claims.append(at_most(f"{name}, step at 1/10 over SGD", often, fast))
        claims.append(at_most(f"{name}, factors over forward+backward", whole, alone))
        text = None if peer is None else f"{peer:.3g}"
        claims.append(claim(f"{name}, curvlinops' factors over forward+backward", text, "reported", None))
    claims.append(kernels(FORCED))
    columns = ("model", "sgd ms", "plain", "update", "+refresh", "10/100", "1/10", "factors", "curvlinops", "peak MB")
    finish("K-FAC in torch over plain SGD", columns, rows, claims, given.json)


if __name__ == "__main__":
    main()
