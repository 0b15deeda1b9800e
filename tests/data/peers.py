"""Values of laplace-torch and kronfluence that `tests/test_posterior_peers.py` holds the posterior against.

    pip install torch laplace-torch kronfluence; python tests/data/peers.py > tests/data/peers.json

Everything is in float64. The model is Linear(5, 4), ReLU, Linear(4, 3), the sequence model the same on 6 positions,
whose logits are averaged; weights and data come from one seed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (5, 4, 3)
EXAMPLES = 12
QUERIES = 4
POSITIONS = 6
DAMPING = 0.01


def problem() -> dict[str, np.ndarray]:
    """Weights (d_out, d_in + 1), the bias last; 12 examples with labels, and 4 queries; sequences of both."""
    rng = np.random.default_rng(7)
    d_in, hidden, classes = SIZES
    return {
        "0": rng.normal(size=(hidden, d_in + 1)) / 2,
        "2": rng.normal(size=(classes, hidden + 1)),
        "x": rng.normal(size=(EXAMPLES, d_in)),
        "y": rng.integers(0, classes, EXAMPLES),
        "queries": rng.normal(size=(QUERIES, d_in)),
        "asked": rng.integers(0, classes, QUERIES),
        "sequences": rng.normal(size=(EXAMPLES, POSITIONS, d_in)),
        "sequences asked": rng.normal(size=(QUERIES, POSITIONS, d_in)),
    }


def model(given: dict[str, np.ndarray], averaged: bool = False) -> Any:
    import torch

    d_in, hidden, classes = SIZES
    layers = [torch.nn.Linear(d_in, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes)]
    net = Averaged(*layers) if averaged else torch.nn.Sequential(*layers)
    for name in ("0", "2"):
        net[int(name)].weight.data = torch.tensor(given[name][:, :-1])
        net[int(name)].bias.data = torch.tensor(given[name][:, -1])
    return net


def laplace_torch(given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Evidence, its slopes in each precision, covariance of predictions, probit and bridge."""
    import torch
    from laplace import Laplace
    from laplace.curvature import CurvlinopsEF, CurvlinopsGGN

    x, y, queries = (torch.tensor(given[name]) for name in ("x", "y", "queries"))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=EXAMPLES)
    cases = {
        "kron, type2": ("all", "kron", CurvlinopsGGN),
        "kron, empirical": ("all", "kron", CurvlinopsEF),
        "diagonal, type2": ("all", "diag", CurvlinopsGGN),
        "last layer, kron, type2": ("last_layer", "kron", CurvlinopsGGN),
        "last layer, full, type2": ("last_layer", "full", CurvlinopsGGN),
    }
    found = {}
    for name, (weights, structure, backend) in cases.items():
        made = Laplace(model(given), "classification", weights, structure, backend=backend)
        made.fit(loader)
        values: dict[str, Any] = {"one": made.log_marginal_likelihood(torch.tensor([2.0])).item()}
        if weights == "all":  # one precision for each weight and each bias
            several = torch.arange(1.0, 5.0, requires_grad=True)
            evidence = made.log_marginal_likelihood(several)
            evidence.backward()
            values |= {"several": evidence.item(), "slopes": several.grad.tolist()}
        made.prior_precision = torch.tensor([2.0])
        f, V = made._glm_predictive_distribution(queries)
        values |= {"f": f.tolist(), "covariance": V.detach().tolist()}
        values |= {link: made(queries, link_approx=link).detach().tolist() for link in ("probit", "bridge")}
        found[name] = values
    return found


def kronfluence(given: dict[str, np.ndarray], folder: Path, averaged: bool) -> dict[str, Any]:
    """Pairwise scores and self-influence of each strategy, of the empirical Fisher."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    names = ("sequences", "sequences asked") if averaged else ("x", "queries")
    data, asked = (
        torch.utils.data.TensorDataset(torch.tensor(given[rows]), torch.tensor(given[labels]))
        for rows, labels in zip(names, ("y", "asked"), strict=True)
    )
    wide = torch.float64
    found = {}
    for strategy in ("ekfac", "kfac", "diagonal", "identity"):
        task = task_of()
        net = prepare_model(model(given, averaged), task)
        analyzer = Analyzer("peers", net, task, cpu=True, output_dir=str(folder / f"{strategy}{averaged}"))
        factors = FactorArguments(
            strategy=strategy,
            use_empirical_fisher=True,
            activation_covariance_dtype=wide,
            gradient_covariance_dtype=wide,
            per_sample_gradient_dtype=wide,
            lambda_dtype=wide,
        )
        analyzer.fit_all_factors("f", data, per_device_batch_size=EXAMPLES, factor_args=factors)
        for title, damping in (("scores", DAMPING), ("heuristic", None)):
            if strategy == "identity" and damping is None:
                continue
            scores = ScoreArguments(
                damping_factor=damping, per_sample_gradient_dtype=wide, precondition_dtype=wide, score_dtype=wide
            )
            sizes = {"per_device_query_batch_size": QUERIES, "per_device_train_batch_size": EXAMPLES}
            analyzer.compute_pairwise_scores(title, "f", asked, data, score_args=scores, **sizes)
            pairs = analyzer.load_pairwise_scores(title)["all_modules"]
            values = found.setdefault(strategy, {})
            values[title] = pairs.tolist()
            if damping is not None:
                analyzer.compute_self_scores("own", "f", data, per_device_train_batch_size=EXAMPLES, score_args=scores)
                values["self"] = analyzer.load_self_scores("own")["all_modules"].tolist()
    return found


def task_of() -> Any:
    """The sum of cross-entropies as training loss and as what is measured."""
    import torch
    from kronfluence.task import Task

    class CrossEntropy(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

    return CrossEntropy()


if __name__ == "__main__":
    import torch

    class Averaged(torch.nn.Sequential):
        """The mean of the logits over positions."""

        def forward(self, x: Any) -> Any:
            return super().forward(x).mean(1)

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    known = problem()
    told = {name: version(name) for name in ("torch", "laplace-torch", "kronfluence", "curvlinops-for-pytorch")}
    values: dict[str, Any] = {"versions": told, "laplace-torch": laplace_torch(known)}
    with tempfile.TemporaryDirectory() as where:
        values["kronfluence"] = kronfluence(known, Path(where), averaged=False)
        values["kronfluence, sequences"] = kronfluence(known, Path(where), averaged=True)
    json.dump(values, sys.stdout)
    sys.stdout.write("\n")
