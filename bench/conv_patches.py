"""What does the A factor of a convolution cost? FFT autocorrelation, chunks of patches, naive unfolding."""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np
from report import Claim, arguments, at_least, at_most, finish, interleaved

from kfaccore import Patches, Window
from kfaccore.convolution.phases import fft_pays

IMAGES = 128
CASES = {  # name: (groups, height, width, channels a group, window)
    "3 ch 3x3": (1, 32, 32, 3, Window((3, 3), padding=1)),
    "32 ch 3x3": (1, 32, 32, 32, Window((3, 3), padding=1)),
    "64 ch 3x3": (1, 32, 32, 64, Window((3, 3), padding=1)),
    "32 ch 5x5": (1, 32, 32, 32, Window((5, 5), padding=2)),
    "64 ch 3x3 valid": (1, 32, 32, 64, Window((3, 3))),
    "32 ch 3x3 padding (0, 2)": (1, 32, 32, 32, Window((3, 3), padding=(0, 2))),
    "32 ch 3x3 on 31x29": (1, 31, 29, 32, Window((3, 3), padding=1)),
    "3 ch 7x7 stride 2": (1, 32, 32, 3, Window((7, 7), stride=2, padding=3)),
    "32 ch 3x3 stride 2": (1, 32, 32, 32, Window((3, 3), stride=2, padding=1)),
    "32 ch 5x5 stride 2": (1, 32, 32, 32, Window((5, 5), stride=2, padding=2)),
    "32 ch 3x3 dilation 2": (1, 32, 32, 32, Window((3, 3), padding=2, dilation=2)),
    "4 groups of 16 ch 3x3": (4, 32, 32, 16, Window((3, 3), padding=1)),
}
ROADS = {  # name: (shape of the image, window): every road that there is, on NumPy and torch
    "64x1, 128 ch": ((64, 191, 1, 128), Window((64, 1))),
    "1x64, 16 ch": ((64, 1, 191, 16), Window((1, 64))),
    "1-d 16, 256 ch": ((64, 128, 256), Window((16,), padding=7)),
    "1-d 1024, 1 ch": ((16, 4096, 1), Window((1024,))),
    "3x3, 3 ch": ((128, 32, 32, 3), Window((3, 3), padding=1)),
    "3x3, 64 ch": ((128, 32, 32, 64), Window((3, 3), padding=1)),
    "3x3, 256 ch": ((32, 16, 16, 256), Window((3, 3), padding=1)),
    "5x5, 32 ch": ((128, 32, 32, 32), Window((5, 5), padding=2)),
    "7x7 stride 2, 3 ch": ((128, 32, 32, 3), Window((7, 7), stride=2, padding=3)),
    "3x3 dilation 2, 32 ch": ((128, 32, 32, 32), Window((3, 3), padding=2, dilation=2)),
}
LONG = ("64x1, 128 ch", "1-d 16, 256 ch", "1-d 1024, 1 ch")
QUICK = ("3 ch 3x3", "32 ch 3x3", "64 ch 3x3", "3 ch 7x7 stride 2", "32 ch 3x3 stride 2")
RIVALS = ("library", "chunks", "naive")


def unfolded(image: np.ndarray, w: Window) -> list[np.ndarray]:
    """Sliding windows copied to rows, one array a group, in the library's column order."""
    padded = np.pad(image, ((0, 0), (0, 0), *w.padding, (0, 0)))
    reach = [(k - 1) * r + 1 for k, r in zip(w.kernel, w.dilation, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    (s, t), (q, r) = w.stride, w.dilation
    windows = windows[:, :, ::s, ::t, :, ::q, ::r].transpose(0, 1, 2, 3, 5, 6, 4)
    return [block.reshape(-1, block.shape[-1] * w.kernel[0] * w.kernel[1]) for block in windows]


def naive(image: np.ndarray, w: Window) -> np.ndarray:
    """Unfolding and one X^T X."""
    return np.stack([rows.T @ rows for rows in unfolded(image, w)])


def peak(function: Callable[[], Any]) -> float:
    """MB allocated at the highest point of one call."""
    tracemalloc.start()
    function()
    found = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return found


def errors(image: np.ndarray, w: Window) -> tuple[float, float]:
    """Largest difference of the library from naive unfolding over the largest entry, float64 and float32."""
    exact = naive(image, w)
    found = []
    for dtype in (np.float64, np.float32):
        for gram in (Patches(image.astype(dtype), w).gram(), Patches(image.astype(dtype), w).gram_by_chunks()):
            found.append(float(np.abs(gram - exact).max() / np.abs(exact).max()))
    return max(found[:2]), max(found[2:])


def syrk_share(image: np.ndarray, w: Window) -> float:
    """Rate of the product inside `naive` (all of it less its unfolding) over that of X.T @ X on rows of its shape."""
    fresh = np.random.default_rng(1).standard_normal(unfolded(image, w)[0].shape, dtype=np.float32)
    functions = {"naive": lambda: naive(image, w), "unfolded": lambda: unfolded(image, w)}
    times = interleaved({**functions, "fresh": lambda: fresh.T @ fresh}, 5)
    return times["fresh"] / (times["naive"] - times["unfolded"])


def case(name: str, repeats: int) -> tuple[list[Any], dict[str, float]]:
    """A table row and the figures of one geometry."""
    groups, height, width, channels, w = CASES[name]
    shape = (groups, IMAGES, height, width, channels)
    image = np.random.default_rng(0).standard_normal(shape)
    double, single = errors(image, w)
    small = image.astype(np.float32)
    patches = Patches(small, w)
    functions = {"library": patches.gram, "chunks": patches.gram_by_chunks, "naive": lambda: naive(small, w)}
    seconds = interleaved(functions, repeats)
    memory = {rival: peak(function) for rival, function in functions.items()}
    row = [name, *(seconds[r] * 1e3 for r in RIVALS), seconds["naive"] / seconds["library"]]
    row += [*(memory[r] for r in RIVALS), f"{double:.0e}", f"{single:.0e}"]
    fastest = seconds["library"] / min(seconds.values())
    figures = {"speed": seconds["naive"] / seconds["library"], "memory": memory["library"] / memory["naive"]}
    return row, {**figures, "double": double, "single": single, "fastest": fastest}


def namespaces() -> dict[str, Callable[[np.ndarray], Any]]:
    """How an image enters each namespace of the CPU that is installed."""
    found: dict[str, Callable[[np.ndarray], Any]] = {"NumPy": np.asarray}
    if find_spec("torch"):
        import torch

        torch.set_num_threads(1)
        found["torch"] = torch.asarray
    return found


def road(name: str, repeats: int) -> list[Claim]:
    """What the library picks over the best of autocorrelation, chunks, and unfolding with one product."""
    shape, w = ROADS[name]
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    claims = []
    for space, put in namespaces().items():
        patches = Patches(put(image), w)
        rows = prod(patches.shape[:-1])

        def unfold(patches: Patches = patches, rows: int = rows) -> Any:
            x: Any = patches.unfold()
            x = x.reshape(rows, -1)
            return x.T @ x

        roads = {"fft": patches.gram_by_fft, "chunks": patches.gram_by_chunks, "unfold": unfold}
        seconds = interleaved(roads, repeats)
        picked = "fft" if fft_pays(w, tuple(patches.image.shape), space == "NumPy") else "chunks"
        times = ", ".join(f"{key} {value * 1e3:.3g}" for key, value in seconds.items())
        title = f"{space}, {name}, {picked} over the best of ({times} ms)"
        claims.append(at_most(title, seconds[picked] / min(seconds.values()), 1.1))
    return claims


def main() -> None:
    options = arguments(__doc__)
    names = QUICK if options.quick else tuple(CASES)
    rows, figures = [], {}
    for name in names:
        row, figures[name] = case(name, 3 if options.quick else 7)
        rows.append(row)
    wide = CASES["64 ch 3x3"]
    share = syrk_share(np.random.default_rng(0).standard_normal((1, IMAGES, 32, 32, 64)).astype(np.float32), wide[4])
    claims: list[Claim] = [
        at_most("largest float64 error", max(f["double"] for f in figures.values()), 1e-12),
        at_most("largest float32 error", max(f["single"] for f in figures.values()), 1e-6),
        at_least("64 channels 3x3, times faster than unfolding and one syrk", figures["64 ch 3x3"]["speed"], 5),
        at_most("64 channels 3x3, share of unfolding's extra memory", figures["64 ch 3x3"]["memory"], 1 / 3),
        at_least("32 channels 3x3, times faster than unfolding and one syrk", figures["32 ch 3x3"]["speed"], 3),
        at_least("the baseline's syrk, share of the rate of X.T @ X", share, 0.8),
        at_most("library over the fastest of the three, worst case", max(f["fastest"] for f in figures.values()), 1.15),
    ]
    for name in ROADS:
        # a second and more a call: one round says it, and --quick leaves it out
        if not (options.quick and name in LONG):
            claims += road(name, 1 if name in LONG else 3)
    columns = ["128 images", *(f"{r} ms" for r in RIVALS), "naive / library"]
    columns += [*(f"{r} MB" for r in RIVALS), "err64", "err32"]
    finish("A factor of a convolution, float32, one thread", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
