"""Does K-FAC with a fixed step beat tuned baselines on the digits autoencoder, and how good are the baselines?

The library's defaults and the command line's fixed step (rate 1, momentum 0.9, KL clip 1e-3), three seeds.
"""

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import math
import subprocess
import sys
import time
from statistics import median
from typing import Any

import numpy as np
from report import Claim, arguments, at_most, claim, finish

import kfaccore as kf
import kfaccore_numpy as kn

TASK = kn.TASKS["digits-autoencoder"]
TARGET, RATES, SEEDS = 0.23, (1e-3, 3e-3, 6e-3, 1e-2), (0, 1, 2)


def run(optimiser: Any, seed: int, steps: int, every: int = 10) -> tuple[float, float, int | None, float]:
    """(loss at step 400, worst loss seen, first step at or under the target, seconds a step)."""
    data, evaluation = TASK.load()
    params = TASK.network.init(np.random.default_rng(seed))
    at_400, worst, reached, seconds = math.nan, 0.0, None, 0.0
    for p in kn.fit(TASK.network, params, data, TASK.loss, optimiser, batch=TASK.batch, steps=steps, seed=seed):
        seconds = p.seconds / p.step
        if p.step % every:
            continue
        loss = kn.mean_loss(TASK.network, params, evaluation, TASK.loss)
        worst = max(worst, loss)
        at_400 = loss if p.step == 400 else at_400
        if loss <= TARGET and reached is None:
            reached = p.step
            if p.step >= 400:
                break
    return at_400, worst, reached, seconds


def import_ratio(repeats: int) -> float:
    """Time of `import kfaccore` over that of `import numpy, scipy.linalg`, in fresh interpreters with bytecode."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return time.perf_counter() - start

    pairs = [(seconds("import kfaccore"), seconds("import numpy, scipy.linalg")) for _ in range(repeats + 1)][1:]
    return median(p[0] for p in pairs) / median(p[1] for p in pairs)


def main() -> None:
    options = arguments(__doc__)
    rows, kfac = [], []
    for seed in SEEDS:
        pre = kf.Preconditioner(kf.KFAC(), step=kf.Fixed(1.0, 0.9, kf.KLClip(1e-3)), donate=True)
        kfac.append(run(pre, seed, 400))
        rows.append([f"kfac, seed {seed}", *kfac[-1][:3], kfac[-1][3] * 1e3])
    adam = {}
    for rate in (6e-3,) if options.quick else RATES:
        for seed in SEEDS:
            adam[rate, seed] = run(kn.Adam(rate), seed, 2000)
            rows.append([f"adam {rate:g}, seed {seed}", *adam[rate, seed][:3], adam[rate, seed][3] * 1e3])
    best = min(median(adam[rate, seed][0] for seed in SEEDS) for rate in {r for r, _ in adam})
    reached = [adam[6e-3, seed][2] for seed in SEEDS]
    inside = all(step is not None and 1450 <= step <= 1800 for step in reached)
    ratio = import_ratio(5 if options.quick else 15)
    worst = max(k[1] for k in kfac)
    claims: list[Claim] = [
        claim("K-FAC never diverges: worst loss seen", worst, "finite", math.isfinite(worst)),
        at_most("K-FAC at step 400 over the best Adam rate, worst seed", max(k[0] for k in kfac) / best, 1),
        claim("Adam 6e-3 reaches 0.23 at steps", ", ".join(map(str, reached)), "1450 to 1800", inside),
        at_most("import kfaccore over import numpy, scipy.linalg", ratio, 1.3),
    ]
    columns = ("run", "loss at 400", "worst loss", "steps to 0.23", "ms a step")
    finish("Digits autoencoder, batch 512, fixed step", columns, rows, claims, options.json)


if __name__ == "__main__":
    main()
