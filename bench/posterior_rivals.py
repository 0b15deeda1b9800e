"""CPU seconds of kronfluence and laplace-torch on the MLP 784-256-256-10 of `influence.py` and `laplace.py`, float32.

Both are of the extra `rivals`; where one is not installed its figures are missing and the claim says so.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = (784, 256, 256, 10)
BATCH = 250


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def installed(name: str) -> Any:
    """The package called so, not the script beside this file."""
    here = Path(__file__).resolve().parent
    known = sys.path[:]
    sys.path[:] = [place for place in known if Path(place).resolve() != here]
    try:
        return import_module(name)
    finally:
        sys.path[:] = known


def network() -> Any:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers: list[Any] = []
    for into, out in pairwise(WIDTHS):
        layers += [torch.nn.Linear(into, out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def data(x: np.ndarray, y: np.ndarray) -> Any:
    import torch

    return torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))


def kronfluence(x: np.ndarray, y: np.ndarray, asked: int) -> dict[str, float]:
    """Of fit (EK-FAC, labels sampled once), pairwise scores and self-influence; empty where it is not installed."""
    whole = data(x, y)
    return influences(network, whole, data(x[:asked], y[:asked]), BATCH)


def influences(made: Callable[[], Any], whole: Any, queries: Any, batch: int) -> dict[str, float]:
    """As `kronfluence`, of a model whose outputs (batch, classes, ...) are judged by cross-entropy, summed over all."""
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
    except ImportError:
        return {}
    import torch

    class CrossEntropy(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            f = model(batch[0])
            logits = f.detach().movedim(1, -1)
            labels = torch.distributions.Categorical(logits=logits).sample() if sample else batch[1]
            return torch.nn.functional.cross_entropy(f, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

    task = CrossEntropy()
    each = {"per_device_train_batch_size": batch}
    with tempfile.TemporaryDirectory() as folder:
        run = Analyzer("model", prepare_model(made(), task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        sizes = {"per_device_batch_size": batch, "factor_args": FactorArguments(strategy="ekfac")}
        return {
            "fit": seconds(lambda: run.fit_all_factors("f", whole, **sizes)),
            "pairwise": seconds(
                lambda: run.compute_pairwise_scores(
                    "p", "f", queries, whole, per_device_query_batch_size=len(queries), **each
                )
            ),
            "self": seconds(lambda: run.compute_self_scores("s", "f", whole, **each)),
        }


def laplace_torch(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of the fit (K-FAC, type-2), the tuning of one precision (100 steps of Adam) and the probit predictive, 20 inputs
    at once; empty where it is not installed."""
    try:
        Laplace = installed("laplace").Laplace
    except ImportError:
        return {}
    import torch

    loader = torch.utils.data.DataLoader(data(x, y), batch_size=BATCH)
    made = Laplace(network(), "classification", "all", "kron")
    fit = seconds(lambda: made.fit(loader))
    tune = seconds(lambda: made.optimize_prior_precision(method="marglik", n_steps=100, lr=0.1))
    inputs = torch.tensor(x).split(20)
    probit = seconds(lambda: [made(part, link_approx="probit") for part in inputs])
    return {"fit": fit, "tuning": tune, "probit": probit}
