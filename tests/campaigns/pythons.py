"""The Pythons of this machine that the project supports, oldest first: those that start by name, then a manager's own.

    python tests/campaigns/pythons.py

Prints a path a line, one for each minor version from 3.11 on. It needs nothing installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST = 11
NEWEST = 19


def _candidates(name: str) -> Iterator[str]:
    """The path that the name has here, then pyenv's, whose names start only for the versions that it was set to."""
    named = shutil.which(name)
    if named:
        yield named
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from (str(path) for path in sorted(versions.glob(f"*/bin/{name}"), reverse=True))


def _starts(python: str) -> bool:
    """Whether it runs and can make environments; a manager's shim may do neither."""
    return subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode == 0


def found() -> list[str]:
    """One that starts for each minor version from 3.11 on, oldest first."""
    names = [f"python3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
    first = [next(filter(_starts, _candidates(name)), None) for name in names]
    return [python for python in first if python]


if __name__ == "__main__":
    print("\n".join(found()))
    sys.exit(not found())
