"""The networks of bench/gpu.py: sizes that are published, and small ones for a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from operations import GPT2, resnet50
from torch import nn

import kfaccore as kf


@dataclass(frozen=True)
class Case:
    """A network, its loss, a batch, and how the user trains it.

    matmul   whether dense products run in TF32; convolutions do, as torch ships it
    half     bfloat16 autocast, and channels-last images
    skip     parameters that K-FAC leaves alone, beside those of norms
    accuracy   whether errors of each precision are measured on it
    cupy     whether CuPy is measured beside torch's namespace
    norms    whether gains and biases of norms are covered too, as they are by default
    precision   of statistics and solves, where it is not what the user's own products have
    limits   claims: {"10/100": device-busy over SGD's, "wall": eager, "1/10": device-busy}
    """

    name: str
    model: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    matmul: bool = False
    half: bool = False
    skip: tuple[str, ...] = ()
    cupy: bool = False
    norms: bool = False
    accuracy: bool = False
    precision: kf.Precision | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


def autoencoder(small: bool) -> nn.Module:
    """784-1000-500-250-30 and back."""
    sizes = (40, 30, 10, 30, 40) if small else (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def transformer(small: bool) -> nn.Module:
    """Twelve blocks of width 768; embedding and head are trained by their plain gradients."""
    model = GPT2(16, 40) if small else GPT2(768, 8192, heads=12)
    model.head.requires_grad_(True)
    return model


def cases(small: bool) -> list[Case]:
    """All of them, at the published sizes unless `small`."""
    images, side, classes = (4, 32, 10) if small else (64, 224, 1000)
    rows, length, words = (2, 8, 40) if small else (8, 512, 8192)

    def resnet() -> nn.Module:
        return resnet50(4, classes) if small else resnet50(64, classes)

    def pictures() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(images, 3, side, side), torch.randint(0, classes, (images,))

    def text() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, words, (rows, length)), torch.randint(0, words, (rows * length,))

    def many(count: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        width = 40 if small else 784
        hidden = torch.randn(count, 40)
        x = torch.sigmoid(hidden @ torch.randn(40, width) / 6 + 0.1 * torch.randn(count, width))
        return lambda: (x, x)

    words_of: dict[str, Any] = {"model": lambda: transformer(small), "loss": nn.CrossEntropyLoss(), "batch": text}
    words_of["skip"] = ("wte.*", "head.*")
    seen: dict[str, Any] = {"model": resnet, "loss": nn.CrossEntropyLoss(), "batch": pictures}
    loose = kf.Precision("bfloat16", "tf32")
    dense: dict[str, Any] = {"model": lambda: autoencoder(small), "loss": nn.MSELoss(), "precision": loose}
    return [
        Case("ResNet-50 float32", **seen, accuracy=True, cupy=True, limits={"10/100": 1.15, "wall": 1.2, "1/10": 2.1}),
        Case("ResNet-50 float32, norms too", **seen, norms=True),
        Case("ResNet-50 bfloat16", **seen, half=True, limits={"10/100": 1.22, "wall": 1.3}),
        Case("transformer float32", **words_of, accuracy=True, cupy=True, limits={"10/100": 1.3}),
        Case("transformer float32, TF32 solves", **words_of, precision=loose, limits={"10/100": 1.15, "1/10": 1.7}),
        Case("transformer float32, TF32 solves, norms too", **words_of, precision=loose, norms=True),
        Case("transformer TF32", **words_of, matmul=True, limits={"10/100": 1.3, "wall": 1.4}),
        Case("transformer bfloat16", **words_of, half=True, limits={"10/100": 1.5}),
        Case(
            "autoencoder 4096",
            **dense,
            accuracy=True,
            cupy=True,
            batch=many(64 if small else 4096),
            limits={"10/100": 1.35, "wall": 1.6},
        ),
        Case(
            "autoencoder 512", **dense, cupy=True, batch=many(16 if small else 512), limits={"10/100": 1.9, "wall": 1.9}
        ),
    ]
