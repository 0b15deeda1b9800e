"""A release as users get it: each file installed into an empty environment of each Python, used from an empty folder.

    python tests/campaigns/release.py [--python PATH]... dist/*.whl dist/*.tar.gz

Prints a line a file and Python, and exits 1 if one does not install or run. Without --python they are those that
`pythons.py` finds; at least one must be there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from pythons import found

from kfaccore import __version__

SHELLS = ("kfaccore_numpy", "kfaccore_torch", "kfaccore_jax", "kfaccore_tensorflow")
PRESENT = f"""
import importlib.util
import kfaccore
assert kfaccore.__version__ == {__version__!r}, kfaccore.__version__
assert "site-packages" in kfaccore.__file__, kfaccore.__file__
for name in {SHELLS}:
    assert importlib.util.find_spec(name) is not None, name
for name in ("adapters", "bench", "tests"):
    assert importlib.util.find_spec(name) is None, name
"""
USES = (
    ("-c", PRESENT),
    ("-m", "kfaccore", "--version"),
    ("-m", "kfaccore_numpy.examples.from_npz"),
    ("-m", "kfaccore", "train", "digits-classifier", "--steps", "5", "--out", "run"),
    ("-m", "kfaccore", "inspect", "run/run.safetensors"),
)


def runs(python: str | Path, *arguments: str, folder: Path) -> str:
    """What went wrong, "" if nothing did."""
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{' '.join(arguments)}: {(done.stderr or done.stdout)[-600:]}"


def tried(file: Path, python: str) -> str:
    """Install the file with what the demo needs, and use it; what went wrong first."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        wrong = runs(python, "-m", "venv", "env", folder=here)
        own = here / "env" / "bin" / "python"
        empty = here / "empty"
        empty.mkdir()
        wrong = wrong or runs(own, "-m", "pip", "install", "--quiet", f"{file}[demo]", folder=here)
        for use in USES:
            wrong = wrong or runs(own, *use, folder=empty)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("files", nargs="+")
    given = parser.parse_args()
    pythons = given.python or found()
    wrong = 0 if pythons else 1
    for file in given.files:
        for python in pythons:
            what = tried(Path(file).resolve(), python)
            wrong += bool(what)
            print(f"{Path(file).name} on {python}: {what or 'installs and runs'}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
