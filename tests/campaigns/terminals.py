"""Terminals: bad command lines, on terminals that lack characters, disks that are full and pipes that are closed.

`python tests/campaigns/terminals.py [--count N] [--seed S]`. What is promised: a command ends with 0, or with 1, 2 or 3
and a line on standard error; there is no traceback, nothing unexpected and nothing that hangs; `--json` that ends
with 0 prints JSON without NaN, and names in other alphabets are shown as well as the terminal can.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_name}_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import rich.progress  # noqa: F401 imported before the forks
import sklearn.datasets  # noqa: F401

import kfaccore as kf
import kfaccore_numpy as kn
from campaigns.ending import ended, options
from kfaccore.cli import main as command

SECONDS = 60  # after which a command counts as hung
REAL = 40  # every so manieth command is a process of its own, whose end is Python's own
TERMINALS = ["utf-8", "utf-8", "utf-8", "ascii", "latin-1", "full", "closed", "broken"]
NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "",
    "x",
    "9" * 30,
    "9" * 400,
    "0x10",
    "٣",
    "1,5",
]
SIZES = ["4MB", "0", "-4MB", "1e400GB", "MB", "4 MB", "4XB", "nanMB", "1e", "", "4µs", "10ms"]
NAMES = [
    "kfac",
    "ekfac",
    "KFAC",
    "adam",
    "sgd",
    "fngd",
    "pinn-kfac",
    "kfac,kfac",
    ",",
    "",
    "層",
    "\udcff",
    "kfac\n",
    "*",
    "[a",
]
TASKS = ["digits-classifier", "poisson-2d", "mnist", "", "層", "digits classifier", "-", "\udcff"]
VALUES = {"number": NUMBERS, "size": SIZES, "name": NAMES}
VERBS: dict[str, dict[str, str]] = {
    "train": {
        "--method": "name", "--against": "name", "--seed": "number", "--backend": "name", "--step": "name",
        "--l2": "number", "--weight-decay": "number", "--out": "path", "--resume": "path", "--json": "",
    },
    "inspect": {"--plot": "", "--full": "", "--json": ""},
    "compare": {
        "--methods": "name", "--layers": "name", "--damping": "number", "--update": "number", "--refresh": "number",
        "--peak": "size", "--backend": "name", "--plot": "path", "--check": "", "--full": "", "--csv": "", "--json": "",
    },
    "advise": {
        "--memory": "size", "--time": "size", "--methods": "name", "--layers": "name", "--damping": "number",
        "--by": "name", "--update": "number", "--refresh": "number", "--peak": "size", "--json": "",
    },
    "influence": {
        "--queries": "path", "--train": "path", "--top": "number", "--method": "name", "--damping": "number",
        "--memory": "number", "--plot": "", "--json": "",
    },
    "laplace": {"--precision": "number", "--method": "name", "--plot": "", "--json": ""},
    "prune": {"--share": "number", "--precision": "number", "--method": "name", "--plot": "", "--json": ""},
    "methods": {},
}  # fmt: skip
BOUND = {"train": ["--steps", "1"], "compare": ["--budget", "0.2"], "advise": ["--budget", "0.2"]}


def files(folder: Path) -> list[str]:
    """What a path may be: good files, damaged ones, and what is no file."""
    rng = np.random.default_rng(0)
    record = {"層[0].a": rng.normal(size=(5, 3)), "層[0].g": rng.normal(size=(5, 2))}
    np.savez(folder / "records.npz", **record)  # type: ignore[arg-type]
    np.savez(folder / "data.npz", x=rng.normal(size=(4, 64)), y=np.arange(4))
    np.savez(folder / "text.npz", x=np.array(["a"]), y=np.array([{}], dtype=object))
    net = kn.TASKS["digits-classifier"].network
    params = net.init(rng, lambda w: np.asarray(w, dtype=np.float32))
    pre = kf.Preconditioner(kf.KFAC())
    state = pre.init(net.blocks(), next(iter(params.values())))
    tree = {"params": params, "state": state}
    told = kf.describe(pre, state) | {"task": "digits-classifier", "method": "kfac", "seed": 0}
    kf.save(folder / "run.safetensors", tree, **told)
    kf.save(folder / "λ.safetensors", {"params": params}, method=[1], task={"a": float("nan")})
    whole = (folder / "run.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-7])
    (folder / "cut.npz").write_bytes((folder / "records.npz").read_bytes()[:-9])
    (folder / "empty.npz").touch()
    (folder / "noise").write_bytes(rng.bytes(999))
    (folder / "folder.npz").mkdir()
    made = [str(path) for path in sorted(folder.iterdir())]
    there_not = [str(folder / "no"), "/dev/null", "/dev/full", "/proc/self/mem", "", ".", "a" * 300, "no/\udcff\n", "-"]
    return made + there_not


def line(rng: np.random.Generator, paths: list[str]) -> list[str]:
    """A command line, mostly wrong somewhere; bounded in steps and seconds."""
    if rng.random() < 0.05:
        return [str(word) for word in rng.choice(["--versio", "trian", "--help", "", "--debug", "層"], size=2)]
    verb = str(rng.choice(list(VERBS)))
    options = VERBS[verb]
    first = TASKS if verb == "train" else paths
    words = [verb, str(rng.choice(first))] if verb != "methods" and rng.random() < 0.95 else [verb]
    if verb == "influence" and rng.random() < 0.8:
        words += ["--queries", str(rng.choice(paths)), "--train", str(rng.choice(paths))]
    for option in rng.permutation(list(options))[: rng.integers(4)]:
        kind = options[option]
        words += [str(option)] if not kind else [str(option), str(rng.choice(VALUES.get(kind, paths)))]
    if rng.random() < 0.03:
        words += ["--no-such-option"]
    return words + BOUND.get(verb, [])


def verdict(words: list[str], terminal: str, real: bool) -> str:
    """ "0" to "3", or what broke the promise."""
    code, out, err = _process(words, terminal) if real else _forked(words, terminal)
    shown = err.decode(errors="replace")
    if code is None:
        return "hung"
    if code not in (0, 1, 2, 3):
        return f"ended with {code}: {shown[-300:]}"
    if "Traceback" in shown or "unexpected" in shown:
        return f"unexpected: {shown[-600:]}"
    if code and not shown.strip() and terminal in ("utf-8", "ascii", "latin-1"):
        return f"ended with {code} without a word"
    if code == 0 and terminal == "full":
        return "ended with 0 where nothing could be written"
    if code == 0 and "--json" in words and "--help" not in words and terminal == "utf-8":
        return _json(out) or "0"
    return str(code)


def _json(out: bytes) -> str:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        json.loads(out, parse_constant=refuse)
    except ValueError as error:
        return f"printed no JSON: {error}"
    return ""


def _standard(terminal: str, out: io.BufferedIOBase) -> int:
    """The descriptor of standard output on a terminal; -1 for none."""
    if terminal == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if terminal == "broken":
        reads, writes = os.pipe()
        os.close(reads)
        return writes
    return -1 if terminal == "closed" else out.fileno()


def _forked(words: list[str], terminal: str) -> tuple[int | None, bytes, bytes]:
    """The command in a fork of this process, which has imported all that takes long."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _run(words, terminal, out, err)
        end = time.monotonic() + SECONDS
        status = None
        while status is None and time.monotonic() < end:
            found, raw = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if found else None
            time.sleep(0.002)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def _run(words: list[str], terminal: str, out: io.BufferedIOBase, err: io.BufferedIOBase) -> None:
    code = 70
    try:
        os.dup2(err.fileno(), 2)
        standard = _standard(terminal, out)
        os.close(1) if standard < 0 else os.dup2(standard, 1)
        encoding = terminal if terminal in ("ascii", "latin-1") else "utf-8"
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding) if standard >= 0 else None  # type: ignore[assignment, arg-type]
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, errors="backslashreplace")  # type: ignore[arg-type]
        sys.argv = ["kfaccore", *words]
        command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _process(words: list[str], terminal: str) -> tuple[int | None, bytes, bytes]:
    """The command as a process of its own."""
    with tempfile.TemporaryFile() as out:
        standard = _standard(terminal, out)
        encoding = terminal if terminal in ("ascii", "latin-1") else "utf-8"
        program = ["-c", "from kfaccore.cli import main; main()"]
        if standard < 0:
            program[1] = f"import os; os.close(1); {program[1]}"
        done = subprocess.run(
            [sys.executable, *program, *words],
            stdout=out if standard < 0 else standard,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            timeout=SECONDS,
            check=False,
        )
        out.seek(0)
        return done.returncode, out.read(), done.stderr


def campaign(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each exit code came in `count` command lines, and the broken promises."""
    seen: Counter[str] = Counter()
    broken: list[str] = []
    plt.close("all")
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        paths = files(Path(name))
        os.chdir(name)
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            words = line(rng, paths)
            terminal = str(rng.choice(TERMINALS))
            found = verdict(words, terminal, number % REAL == REAL - 1)
            seen[found.split()[0].rstrip(":")] += 1
            if found not in ("0", "1", "2", "3"):
                broken.append(f"{number} on {terminal}: kfaccore {words}: {found}")
        os.chdir(home)
    return seen, broken


def main() -> int:
    given = options(__doc__, 400).parse_args()
    seen, broken = campaign(given.count, given.seed)
    return ended(f"terminals: {given.count} command lines, exits {dict(sorted(seen.items()))}", broken)


if __name__ == "__main__":
    sys.exit(main())
