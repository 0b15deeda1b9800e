"""Numerics: the self-tuning step on losses and batches that were made to break it.

`python tests/campaigns/numerics.py [--count N] [--seed S]`. What is promised: parameters and state stay finite whatever
the batches are, nothing is raised, damping is between its bounds and stays what it was where the loss of a batch is not
finite; where half of the batches are bad, or come in bursts, training goes on: the loss on clean data ends at 0.9 of
what it was, or lower; with inputs and targets of scales from 1e-6 to 1e6 (float64: 1e-30 to 1e30) it does not explode.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kfaccore as kf
import kfaccore_numpy as kn
from campaigns.ending import ended, options
from kfaccore import tree

STEPS = 40
EXAMPLES = 120
LEAST, MOST = 1e-8, 1e8  # of damping
Pair = tuple[np.ndarray, np.ndarray]
METHODS = [kf.KFAC(), kf.EKFAC(), kf.KFAC(inverse=kf.eigh), kf.TKFAC(), kf.Diagonal(), kf.RandomizedKFAC(), kf.SKFAC()]


@dataclass(frozen=True)
class Trouble:
    """What is done to a batch, the share of the first loss that has to be left at the end at most, and the exponents
    of random scales of inputs and targets, five times as large in float64 where they are extreme."""

    name: str
    harm: Callable[[np.random.Generator, int, Pair], Pair] = lambda rng, step, batch: batch
    left: float = 0.9
    exponent: float = 0.0
    classes: bool = True


def _every_second(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    return _bad(rng, batch) if step % 2 else batch


def _burst(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    return _bad(rng, batch) if step % 20 in range(5, 12) else batch


def _bad(rng: np.random.Generator, batch: Pair) -> Pair:
    """NaN or Inf in one number, in all of them, or numbers whose squares are none."""
    x = batch[0].copy()
    kind = rng.integers(4)
    if kind == 0:
        x.flat[rng.integers(x.size)] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == 1:
        x[:] = np.nan
    elif kind == 2:
        x[:] = np.sqrt(np.finfo(x.dtype).max) * 4
    else:
        x[rng.integers(len(x))] = np.finfo(x.dtype).max
    return x, batch[1]


def _one_of_all(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    """Every example of the batch is the same one."""
    place = rng.integers(len(batch[0]))
    return tuple(np.repeat(part[place : place + 1], len(part), axis=0) for part in batch)  # type: ignore[return-value]


def _contradictions(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    """Labels drawn anew at every step."""
    return batch[0], rng.integers(0, 3, size=len(batch[1]))


def _outlier(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    x = batch[0].copy()
    x[rng.integers(len(x))] *= 1e3
    return x, batch[1]


def _jumps(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    """Inputs of another scale at every step."""
    return batch[0] * batch[0].dtype.type(10.0 ** rng.uniform(-2, 2)), batch[1]


def _zeros(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    """Now and then nothing comes in."""
    return (np.zeros_like(batch[0]), batch[1]) if step % 3 == 0 else batch


def _single(rng: np.random.Generator, step: int, batch: Pair) -> Pair:
    return batch[0][:1], batch[1][:1]


TROUBLES = [
    Trouble("every second batch bad", _every_second),
    Trouble("bursts of bad batches", _burst),
    Trouble("a burst in a regression", _burst, classes=False),
    Trouble("scales of a classifier", exponent=0.5),
    Trouble("scales of a regression", exponent=0.5, classes=False),
    Trouble("extreme scales of a classifier", left=1.2, exponent=6.0),
    Trouble("extreme scales of a regression", left=1.2, exponent=6.0, classes=False),
    Trouble("one example over and over", _one_of_all, left=3.0),
    Trouble("labels at random", _contradictions, left=2.0),
    Trouble("one example of a thousandfold size", _outlier, left=np.inf),
    Trouble("inputs that jump", _jumps, left=np.inf),
    Trouble("batches of zeros", _zeros, left=2.0),
    Trouble("batches of one", _single, left=3.0),
]


def run(trouble: Trouble, method: object, dtype: np.dtype, seed: int) -> str:
    """What broke the promise, or nothing."""
    rng = np.random.default_rng(seed)
    net = kn.Sequential((5,), (kn.Dense(7), kn.Tanh(), kn.Dense(3)))
    x = rng.normal(size=(EXAMPLES, 5))
    f = x @ rng.normal(size=(5, 3))
    y = (f + 0.3 * rng.normal(size=f.shape)).argmax(1) if trouble.classes else np.sin(f)
    loss = kf.SoftmaxCrossEntropy() if trouble.classes else kf.Gaussian()
    most = trouble.exponent * (5 if trouble.exponent > 1 and dtype == np.float64 else 1)
    x = (x * 10.0 ** rng.uniform(-most, most)).astype(dtype)
    y = y if trouble.classes else (y * 10.0 ** rng.uniform(-most, most)).astype(dtype)
    params = net.init(rng, lambda w: np.asarray(w, dtype=dtype))
    pre = kf.Preconditioner(method, kf.Clocks(1, int(rng.integers(1, 4))), step=kf.SelfTuning())  # type: ignore[arg-type]
    state = kn.initial_state(net, params, pre)
    first = kn.mean_loss(net, params, (x, y), loss)
    damping = 0.0
    for step in range(STEPS):
        rows = rng.integers(0, EXAMPLES, size=24)
        batch = trouble.harm(rng, step, (x[rows], y[rows]))
        value, state, _ = kn.step(net, params, batch, loss, pre, state, step, rng)
        found = float(state.motion.damping)
        if not all(np.isfinite(w).all() for w in params.values()):
            return f"parameters are not finite after step {step}"
        if not all(np.isfinite(leaf).all() for leaf in tree.leaves(state)):
            return f"the state is not finite after step {step}"
        if found and not LEAST <= found <= MOST:
            return f"damping {found} after step {step}"
        if not np.isfinite(value) and damping and found != damping:
            return f"a bad batch took damping from {damping} to {found} in step {step}"
        damping = found
    last = kn.mean_loss(net, params, (x, y), loss)
    return "" if last <= trouble.left * first else f"the loss went from {first:.4g} to {last:.4g}"


def campaign(count: int, seed: int) -> list[str]:
    """What broke a promise in `count` runs of every trouble."""
    broken = []
    for place, trouble in enumerate(TROUBLES):
        for number in range(count):
            method = METHODS[(number + place) % len(METHODS)]
            dtype = np.dtype(np.float32 if (number // 2 + place) % 2 else np.float64)
            own = int(np.random.default_rng([seed, place, number]).integers(2**31))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = run(trouble, method, dtype, own)
                except Exception as error:
                    found = f"raised {type(error).__name__}: {error}"
            if found:
                broken.append(f"{trouble.name}, {type(method).__name__} in {dtype}, run {number}: {found}")
    return broken


def main() -> int:
    given = options(__doc__, 10).parse_args()
    broken = campaign(given.count, given.seed)
    return ended(f"numerics: {given.count * len(TROUBLES)} runs of {STEPS} steps", broken)


if __name__ == "__main__":
    sys.exit(main())
