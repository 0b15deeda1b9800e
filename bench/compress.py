"""Which weights of a trained classifier can go, and which can be rounded? Digits, nothing retrained.

Accuracy after a share of the weights is taken out, by magnitude, OBD, OBS with its compensation and EigenDamage; and
with 8 levels a weight, rounded alone and with the errors made up for (GPTQ).
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import numpy as np
from report import arguments, at_least, finish

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.cli.prune import _lowest, _without_modes, _zeroed
from kfaccore.linalg.cg import CG, Residual
from kfaccore.posterior import damage, given, modes, quantise, weights

TASK = kn.TASKS["digits-classifier"]


def quantised(params: dict, data: tuple, compensated: bool) -> dict:
    """8 levels a weight, a step for each row."""
    records = next(iter(kn.Stream(TASK.network, params, TASK.loss, [data], kf.forward_only)))
    found = {}
    for name, W in params.items():
        a = records[name].rows()[0, :, 0]
        A = a.T @ a / len(a)
        A = A + 1e-2 * np.trace(A) / len(A) * np.eye(len(A), dtype=A.dtype)
        step = 2 * np.abs(W).max(1) / 7
        grid = lambda column, step=step: np.round(column / step) * step  # noqa: E731
        found[name] = quantise(W, A, grid) if compensated else grid(W.T).T
    return found


def main() -> None:
    args = arguments(__doc__)
    data, held = TASK.load()
    params = TASK.network.init(np.random.default_rng(0))
    pre = kf.Preconditioner(kf.KFAC(), schedules=kf.Schedules(l2=1e-3), step=kf.SelfTuning())
    for progress in kn.fit(TASK.network, params, data, TASK.loss, pre, batch=256, steps=60, seed=0):
        params = progress.params
    curvature = kf.fit(kf.EKFAC(), kn.Stream(TASK.network, params, TASK.loss, [data], kf.type2))
    P = kf.Posterior(params, curvature, {k: 1e-3 * float(b.values.mean()) for k, b in curvature.layers.items()})

    def accuracy(theta: dict) -> float:
        return float((TASK.network.forward(theta, held[0])[0].argmax(1) == held[1]).mean())

    size = {name: abs(W) for name, W in params.items()}
    how = CG(Residual(1e-3), 300)
    rows = [("trained", 1.0, accuracy(params))]
    last = {}
    for share in (0.9,) if args.quick else (0.5, 0.8, 0.9, 0.95):
        last = {
            "magnitude": accuracy(_zeroed(params, _lowest(size, share))),
            "OBD": accuracy(_zeroed(params, _lowest(damage(P), share))),
            "OBS": accuracy(given(P, 0.0, _lowest(weights(P), share), how)[0]),
            "EigenDamage": accuracy(_without_modes(P, _lowest(modes(P), share))),
        }
        rows += [(name, 1 - share, value) for name, value in last.items()]
    rounded = [accuracy(quantised(params, data, compensated)) for compensated in (False, True)]
    rows += [("8 levels, rounded", 1.0, rounded[0]), ("8 levels, compensated", 1.0, rounded[1])]
    claims = [
        at_least("OBS over OBD at the last share", last["OBS"] - last["OBD"], 0.0),
        at_least("EigenDamage over magnitude at the last share", last["EigenDamage"] - last["magnitude"], 0.0),
        at_least("compensated over rounded", rounded[1] - rounded[0], 0.0),
    ]
    finish("compress", ("way", "kept", "accuracy"), rows, claims, args.json)


if __name__ == "__main__":
    main()
