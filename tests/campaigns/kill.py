"""Kills: a process that saves without end is ended by a signal at a random moment, again and again.

`python tests/campaigns/kill.py [--count N] [--seed S]`. What is promised: the file is whole and is one of those that
were saved, however the writer ended, and the next save leaves nothing beside it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import kfaccore as kf
from campaigns.ending import ended, options

WRITER = """
import signal
import sys
import numpy as np
import kfaccore as kf
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
number = int(sys.argv[2])
while True:
    number += 1
    kf.save(sys.argv[1], {"first": np.full(50_000, number), "last": np.full(50_000, number)}, number=number)
    print(number, flush=True)
"""
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def killed(path: Path, number: int, lines: int, by: int) -> int:
    """End a writer that starts at `number` by a signal once it has said so many lines; the last number that it surely
    saved."""
    command = [sys.executable, "-c", WRITER, str(path), str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout is not None
        said = [int(writer.stdout.readline()) for _ in range(lines)]
        writer.send_signal(by)
        rest = [int(line) for line in writer.stdout.read().split()]
    return max(said + rest)


def campaign(count: int, seed: int) -> list[str]:
    """What broke the promise in `count` kills."""
    rng = np.random.default_rng(seed)
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "state.safetensors"
        saved = 0
        for kill in range(count):
            saved = killed(path, saved, int(rng.integers(1, 4)), int(rng.choice(SIGNALS)))
            found = kf.load(path)
            number = kf.metadata(path)["number"]
            whole = (found["first"] == number).all() and (found["last"] == number).all()
            if not whole or number not in (saved, saved + 1):  # it may have been saved and not said
                broken.append(f"kill {kill}: the file holds {number}, the writer said {saved}")
            saved = number
        kf.save(path, {"first": np.zeros(1)})
        if sorted(x.name for x in Path(name).iterdir()) != [path.name]:
            broken.append(f"left behind: {sorted(x.name for x in Path(name).iterdir())}")
    return broken


def main() -> int:
    given = options(__doc__, 20).parse_args()
    broken = campaign(given.count, given.seed)
    return ended(f"kill: {given.count} kills", broken)


if __name__ == "__main__":
    sys.exit(main())
