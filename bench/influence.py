"""What do influence scores cost, and do they foretell retraining?

EK-FAC influence of an MLP in float32 and of a transformer in torch, and the linear datamodelling score on digits with a
tenth of the labels random. Claims against kronfluence are not run where it is not installed (the extra `rivals`).
--large: 1,000 queries times 50,000 examples in the memory given.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import resource
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import influence_sequences as sequences
import numpy as np
from posterior_rivals import kronfluence
from report import Claim, at_least, at_most, claim, finish, parser

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.posterior import lds, removal

LOSS = kf.SoftmaxCrossEntropy()
MLP = kn.Sequential((784,), (kn.Dense(256), kn.ReLU(), kn.Dense(256), kn.ReLU(), kn.Dense(10)))
SMALL = kn.Sequential((64,), (kn.Dense(32), kn.ReLU(), kn.Dense(10)))
BATCH = 250


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and what it gave."""
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


def cut(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(x), BATCH)]


def costs(count: int, asked: int) -> dict[str, float]:
    """Seconds of fit, pairwise scores and self-influence of the MLP."""
    rng = np.random.default_rng(0)
    params = MLP.init(rng)
    x = rng.normal(size=(count, 784)).astype(np.float32)
    y = rng.integers(0, 10, count)
    data = cut(x, y)
    queries = next(iter(kn.Stream(MLP, params, LOSS, [(x[:asked], y[:asked])], kf.empirical)))
    own = kn.Stream(MLP, params, LOSS, data, kf.empirical)
    fit, curvature = seconds(lambda: kf.fit(kf.EKFAC(), kn.Stream(MLP, params, LOSS, data)))
    P = kf.Posterior(params, curvature, 1e-3)
    pairs, _ = seconds(lambda: kf.scores(P, queries, own))
    alone, _ = seconds(lambda: [P.covariance(records, diagonal=True) for records in own])
    return {"fit": fit, "pairwise": pairs, "self": alone}


def trained(x: np.ndarray, y: np.ndarray, l2: float, seed: int, steps: int = 150) -> dict[str, np.ndarray]:
    """The small network at the minimum of its penalised loss, nearly: K-FAC on all data."""
    params = SMALL.init(np.random.default_rng(seed), lambda w: w.astype(np.float64))
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(l2=l2), step=kf.SelfTuning())
    for _ in kn.fit(SMALL, params, (x, y), LOSS, pre, batch=len(x), steps=steps, seed=0):
        pass
    return params


def margins(params: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log odds of the labels."""
    f = SMALL.forward(params, x)[0]
    own = np.arange(10) == y[:, None]
    return f[own] - np.log(np.exp(np.where(own, -np.inf, f)).sum(1))


def foretold(l2: float, subsets: int) -> dict[str, float]:
    """LDS of each method, of the plain gradient product and of leverage-corrected removal, on halves."""
    x, y = kn.tasks.digits()
    x = x.astype(np.float64)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    train, test = order[:400], order[400:460]
    labels = y.copy()
    wrong = rng.random(400) < 0.1
    labels[train[wrong]] = rng.integers(0, 10, wrong.sum())
    data = (x[train], labels[train])
    inside = np.stack([rng.permutation(400) < 200 for _ in range(subsets)])
    runs = [[trained(x[train][row], labels[train][row], l2, seed) for seed in (0, 1)] for row in inside]
    outcomes = np.stack([np.mean([margins(p, x[test], y[test]) for p in pair], axis=0) for pair in runs])
    params = trained(*data, l2, 0)
    queries = next(iter(kn.measured(SMALL, params, kn.margin, [(x[test], y[test])])))
    own = kn.Stream(SMALL, params, LOSS, [data], kf.empirical)
    found = {}
    for name, method, fisher in (
        ("EK-FAC", kf.EKFAC(), kf.type2),
        ("K-FAC", kf.KFAC(), kf.type2),
        ("EK-FAC, empirical", kf.EKFAC(), kf.empirical),
        ("gradient product", kf.Identity(), kf.type2),
    ):
        P = kf.Posterior(params, kf.fit(method, kn.Stream(SMALL, params, LOSS, [data], fisher)), l2)
        found[name] = lds(kf.scores(P, queries, own), inside, outcomes)
        if name == "EK-FAC":
            found["EK-FAC, 10 l2"] = lds(
                kf.scores(P.__class__(params, P.curvature, 10 * l2), queries, own), inside, outcomes
            )
            found["EK-FAC, removal"] = lds(_removal(P, params, data, queries), inside, outcomes)
    return found


def _removal(P: kf.Posterior, params: dict, data: tuple, queries: dict) -> np.ndarray:
    f = SMALL.forward(params, data[0])[0]
    p = np.exp(f - f.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hessian = (np.eye(10) * p[:, :, None] - p[:, :, None] * p[:, None, :]) / len(f)
    residual = p - np.eye(10)[data[1]]
    records = next(iter(kn.outputs(SMALL, params, [data])))
    return removal(P, hessian, residual, queries, records)[0]


def large(memory: int) -> list[tuple[str, str]]:
    """1,000 queries times 50,000 examples of the MLP."""
    rng = np.random.default_rng(0)
    params = MLP.init(rng)
    x = rng.normal(size=(50_000, 784)).astype(np.float32)
    y = rng.integers(0, 10, 50_000)
    queries = next(iter(kn.Stream(MLP, params, LOSS, [(x[:1000], y[:1000])], kf.empirical)))
    curvature = kf.fit(kf.EKFAC(), kn.Stream(MLP, params, LOSS, cut(x[:5000], y[:5000])))
    P = kf.Posterior(params, curvature, 1e-3)
    took, found = seconds(lambda: kf.scores(P, queries, kn.Stream(MLP, params, LOSS, cut(x, y), kf.empirical), memory))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [("scores", f"{found.shape}"), ("seconds", f"{took:.0f}"), ("peak MiB", f"{peak:.0f}")]


def rivals(ours: dict[str, float], count: int, asked: int) -> list[Claim]:
    """Against kronfluence in this very run, on the same examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 784)).astype(np.float32)
    theirs = kronfluence(x, rng.integers(0, 10, count), asked)
    limits = {"fit": 1 / 20, "pairwise": 0.65, "self": 1 / 100}
    return [
        at_most(f"MLP, {part}: seconds over kronfluence's", ours[part] / theirs[part] if theirs else None, limit)
        for part, limit in limits.items()
    ]


def of_sequences(rows: list[tuple], claims: list[Claim], quick: bool) -> None:
    """A transformer's figures, where torch is installed."""
    if quick or find_spec("torch") is None:
        claims += [at_most(f"transformer, {part}", None, limit) for part, limit in sequences.LIMITS.items()]
        return
    found = sequences.costs(500, 100)
    rows += [
        (f"transformer, N 500: {name}{'' if 'MiB' in name else ' [CPU s]'}", value) for name, value in found.items()
    ]
    claims += sequences.claims(found, 500, 100)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--large", action="store_true", help="1,000 x 50,000 scores of the MLP")
    options.add_argument("--memory", type=int, default=1 << 30, help="bytes the queries may take")
    args = options.parse_args()
    if args.large:
        finish("1,000 x 50,000", ("figure", "value"), large(args.memory), [], args.json)
    count, subsets = (500, 12) if args.quick else (2000, 60)
    ours = costs(count, 100)
    rows: list[tuple] = [(f"MLP, N {count}: {name} [CPU s]", value) for name, value in ours.items()]
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows += [("MLP: peak MiB", mine)]
    claims = rivals(ours, count, 100)
    theirs = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # ours is in it: never less than theirs alone
    claims.append(at_most("MLP: peak MiB over that with kronfluence's", mine / theirs if theirs > mine else None, 1.0))
    of_sequences(rows, claims, args.quick)
    for l2, target in ((1e-3, 0.64), (1e-2, 0.76)):
        found = foretold(l2, subsets)
        rows += [(f"LDS at l2 {l2:g}: {name}", value) for name, value in found.items()]
        claims.append(
            at_least(f"LDS of EK-FAC at damping = l2 = {l2:g}", None if args.quick else found["EK-FAC"], target)
        )
        told = f"{found['EK-FAC, removal']:.2f} against {found['EK-FAC']:.2f}"
        claims.append(claim(f"leverage helps groups at l2 {l2:g}", told, "reported: it is for single examples", None))
    finish("influence", ("what", "figure"), rows, claims, args.json)


if __name__ == "__main__":
    main()
