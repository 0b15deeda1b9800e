"""Are compare, advise and inspect quick and small on real networks, and is what advise names worth following?

Four networks of random weights trained a little: a CNN with PReLU of 100,000 parameters, a GRU made of Linear over 256
words, a transformer with 12 shared passes, a CNN of 12 layers with 1.2 GB of factors. Each command runs in a process of
its own. Gains of layers small enough to be multiplied out are held against dense float64 matrices.
"""

from __future__ import annotations

import os

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", str(os.cpu_count() or 1))

import compileall
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from analysis_models import NETWORKS, write
from report import Claim, at_most, claim, finish, parser

import kfaccore as kf
import kfaccore_numpy as kn
from kfaccore.analysis import compare
from kfaccore.methods import CATALOGUE

SECONDS = {"detector": 3.0, "recurrent": 15.0, "shared": 20.0, "deep": 30.0}
PEAK = 1024.0  # MiB
DENSE = 1200  # parameters up to which F is multiplied out
PATIENCE = 120  # seconds that one training may take
# bytecode is there after an installation, also where the environment says not to write it
ENV = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
TASKS = ("digits-classifier", "digits-autoencoder", "digits-cnn")


def command(*words: str) -> tuple[float, float, float, int]:
    """(seconds, CPU seconds, peak MiB, exit code) of a command; on a busy machine the first two lie far apart. The peak
    is that of all its processes together, pages that they share counted once."""
    measured = (
        "import resource, subprocess, sys, time; "
        "start = time.perf_counter(); "
        "code = subprocess.run([sys.executable, '-m', 'kfaccore', *sys.argv[1:]], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL).returncode; "
        "seconds = time.perf_counter() - start; "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, code)"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", measured, *words], stdout=subprocess.PIPE, text=True, env=ENV, start_new_session=True
    )
    together = 0.0
    while running.poll() is None:
        together = max(together, _resident(running.pid))
        time.sleep(0.1)  # a look takes milliseconds of a core that the command would have
    assert running.stdout is not None
    seconds, busy, peak, code = running.stdout.read().split()
    return float(seconds), float(busy), max(int(peak) / 1024, together), int(code)


def _resident(session: int) -> float:
    """MiB of the processes of a session but its first; 0 where the system does not tell."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) != session or int(stat.parent.name) == session:
                continue
            rolled = stat.with_name("smaps_rollup").read_text()
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in rolled.splitlines() if line.startswith("Pss:")) / 1024
    return total


def off_by(path: Path) -> float | None:
    """The largest difference of a gain from the dense one, over layers that are small enough; None without any."""
    records, grads = kf.load_records(path)
    methods = {name: CATALOGUE[name]() for name in ("kfac", "ekfac", "diagonal", "identity")}
    worst = None
    for name, record in records.items():
        if record.d_out * record.d_in > DENSE:
            continue
        found = compare({name: record}, methods, grads, repeats=1)
        wide = kf.Record(np.asarray(record.rows(), float), np.asarray(record.g, float), record.n, record.mask)
        F = kf.dense(wide)[0] + found[0].damping * np.eye(record.d_out * record.d_in)
        g = np.asarray(grads[name], float).ravel()
        for f in found:
            state = kf.settle(methods[f.method], wide, damping=f.damping)
            v = g.reshape(1, record.d_out, record.d_in)
            y = methods[f.method].solve(state, v, kf.Hyper(0, 0.0, f.damping)).direction.ravel()
            dense = (g @ y) ** 2 / ((y @ F @ y) * (g @ np.linalg.solve(F, g)))
            worst = max(worst or 0.0, abs(dense - f.gain))
    return worst


def networks(quick: bool, folder: Path) -> tuple[list[list[Any]], list[Claim]]:
    """Rows and claims of the commands on the files."""
    rows: list[list[Any]] = []
    claims: list[Claim] = []
    compileall.compile_dir(str(Path(kf.__file__).parent), quiet=2)
    for name in NETWORKS:
        if quick and name != "detector":
            claims.append(at_most(f"{name}: seconds of each command", None, SECONDS[name]))
            continue
        path = write(name, folder)
        for words in (("compare", str(path)), ("advise", str(path), "--memory", "1GB"), ("inspect", str(path))):
            seconds, busy, peak, code = command(*words)
            rows.append([name, words[0], seconds, busy, peak, code])
            print(f"{name} {words[0]}: {seconds:.1f} s, {busy:.1f} s of CPU, {peak:.0f} MiB", file=sys.stderr)
            claims.append(at_most(f"{name}: {words[0]}, seconds", seconds, SECONDS[name]))
            claims.append(at_most(f"{name}: {words[0]}, peak MiB", peak, PEAK))
        off = off_by(path)
        if off is not None:
            claims.append(at_most(f"{name}: gains off the dense ones by", off, 1e-8))
    return rows, claims


def seconds_to(method: str, task: str, target: float, steps: int) -> float:
    """Training seconds until the evaluated loss is at most `target`; infinite where it never is, or not in time."""
    words = [sys.executable, "-m", "kfaccore", "train", task, "--method", method, "--steps", str(steps), "--json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return float("inf")
    if not done.stdout:
        return float("inf")
    curve = json.loads(done.stdout)["curves"][method]
    reached = [s for s, loss in zip(curve["seconds"], curve["loss"], strict=True) if loss <= target]
    return min(reached, default=float("inf"))


def advised(path: Path, *words: str) -> dict[str, Any]:
    """What `kfaccore advise` answers."""
    asked = [sys.executable, "-m", "kfaccore", "advise", str(path), "--json", "--budget", "60", *words]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=False).stdout)


def followed(task: str, folder: Path, steps: int) -> tuple[str, float, float]:
    """(the method that most parameters get in the plan of most gain within a step of K-FAC, its seconds, the
    catalogue's median)."""
    chosen = kn.TASKS[task]
    params = chosen.network.init(np.random.default_rng(0), lambda w: np.asarray(w, np.float32))
    batch = tuple(part[: chosen.batch] for part in chosen.load()[0])
    path = folder / f"{task}.safetensors"
    kn.save_records(path, chosen.network, params, batch, chosen.loss)
    step = advised(path, "--time", "1000s", "--methods", "kfac", "--by", "direction")["cost"]
    named = advised(path, "--time", f"{step}s")["methods"]
    sizes = dict.fromkeys(named.values(), 0)
    for layer, method in named.items():
        sizes[method] += params[layer].size
    best = max(sizes, key=sizes.__getitem__)
    words = [sys.executable, "-m", "kfaccore", "train", task, "--method", "kfac", "--steps", str(steps), "--json"]
    target = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["methods"][0]["final"]
    catalogue = [name for name in CATALOGUE if name not in ("pinn-kfac", "exact")]
    seconds = {name: seconds_to(name, task, 1.05 * target, 2 * steps) for name in {*catalogue, best}}
    print(task, best, {name: round(s, 2) for name, s in sorted(seconds.items())}, file=sys.stderr)
    return best, seconds[best], statistics.median(seconds.values())


def main() -> None:
    """Run, print, exit 1 if a claim falls short."""
    given = parser(__doc__)
    given.add_argument("--networks", action="store_true", help="the commands alone, no training")
    options = given.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, claims = networks(options.quick, folder)
        for task in TASKS:
            title = f"{task}: seconds of what advise names over the catalogue's median"
            if options.quick or options.networks:
                claims.append(at_most(title, None, 1.0))
                continue
            method, own, median = followed(task, folder, 40)
            claims.append(claim(f"{title} ({method})", own / median, "<= 1", own <= median))
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    claims.append(claim("peak MiB of this script", usage, "reported", None))
    finish("analysis", ("network", "command", "seconds", "CPU s", "peak MiB", "exit"), rows, claims, options.json)


if __name__ == "__main__":
    main()
