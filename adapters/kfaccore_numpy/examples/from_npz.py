"""An analyst with arrays: `a` and `g` of a layer in an .npz, from any framework, are enough for a posterior."""

import sys

import numpy as np

import kfaccore as kf
from kfaccore.posterior import rows


def made(path: str) -> str:
    """A stand-in: inputs, output gradients of the loss and the weights of a layer of 5 units."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(300, 8)) * np.arange(1, 9)
    W = rng.normal(size=(5, 8)) * [[1], [1], [1], [1], [0.01]]  # the last unit hardly matters
    np.savez(path, a=a, g=rng.normal(size=(300, 5)), W=W)
    return path


def main(path: str) -> tuple[int, int]:
    found = np.load(path)
    record = kf.Record(found["a"], found["g"], n=len(found["a"]))
    curvature = kf.fit(kf.EKFAC(), [{"layer": record}])
    P, _ = kf.tuned(kf.Posterior({"layer": found["W"]}, curvature, 1.0, scale=len(found["a"])))
    print("tuned precision", float(P.prior("layer")), "parameters the data decide", float(P.gamma()["layer"]))
    costs = rows(P)["layer"][0]
    moves = P.covariance({"layer": record}, diagonal=True)[:, 0]
    cheapest = min(range(5), key=lambda unit: float(costs[unit]))
    odd = max(range(len(found["a"])), key=lambda example: float(moves[example]))
    print("the unit that costs least to take out:", cheapest, "- the example that moves the most:", odd)
    return cheapest, odd


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else made("layer.npz"))
