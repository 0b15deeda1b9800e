"""Influence of sequences: EK-FAC of a transformer's 13 linear layers in torch, beside kronfluence's.

Width 128, two layers, 64 tokens, float32, one thread. Embeddings and norms are frozen: kronfluence has linear layers.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import resource
from typing import TYPE_CHECKING, Any

from posterior_rivals import influences, seconds
from report import Claim, at_most

import kfaccore as kf

if TYPE_CHECKING:
    import torch

WORDS, WIDTH, LENGTH, HEADS, LAYERS = 64, 128, 64, 4, 2
BATCH = 50
LIMITS = {"fit": 0.7, "pairwise": 0.9, "self": 0.4}


def transformer() -> torch.nn.Module:
    """Says the next token, (batch, words, length); only its linear layers have gradients."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sides = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out")})
            self.up = nn.Linear(WIDTH, 4 * WIDTH)
            self.down = nn.Linear(4 * WIDTH, WIDTH)
            self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.norms[0](x)
            q, k, v = (self.sides[name](z).unflatten(2, (HEADS, -1)).transpose(1, 2) for name in ("q", "k", "v"))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.sides["out"](mixed.transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WORDS, WIDTH)
            self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
            self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.head = nn.Linear(WIDTH, WORDS)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(self.table(ids) + self.places)).transpose(1, 2)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer()
    linear = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in linear)
    return model


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, next ids) of random sequences."""
    import torch

    ids = torch.randint(0, WORDS, (count, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def costs(count: int, asked: int) -> dict[str, float]:
    """CPU seconds of fit, pairwise scores and self-influence; peak MiB of the process after them."""
    from torch import nn

    import kfaccore_torch as kt

    model = transformer()
    x, y = tokens(count)
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    loss = nn.CrossEntropyLoss()
    queries = next(iter(kt.Stream(model, loss, [(x[:asked], y[:asked])], kf.empirical)))
    own = kt.Stream(model, loss, data, kf.empirical)
    found: dict[str, Any] = {}

    def fitted() -> None:
        found["curvature"] = kf.fit(kf.EKFAC(), kt.Stream(model, loss, data, kf.monte_carlo))

    fit = seconds(fitted)
    P = kf.Posterior(kt.matrices(model), found["curvature"], 1e-3)
    pairs = seconds(lambda: kf.scores(P, queries, own))
    alone = seconds(lambda: [P.covariance(records, diagonal=True) for records in own])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"fit": fit, "pairwise": pairs, "self": alone, "peak MiB": peak}


def claims(ours: dict[str, float], count: int, asked: int) -> list[Claim]:
    """Against kronfluence in this very run, on the same sequences."""
    from torch.utils.data import TensorDataset

    whole = tokens(count)
    queries = TensorDataset(*(part[:asked] for part in whole))
    theirs = influences(transformer, TensorDataset(*whole), queries, BATCH)
    return [
        at_most(
            f"transformer, {part}: seconds over kronfluence's", ours[part] / theirs[part] if theirs else None, limit
        )
        for part, limit in LIMITS.items()
    ]
