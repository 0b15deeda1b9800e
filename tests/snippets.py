"""The Python of a page, run as a reader would: each block in a process of its own, printing what it says it prints."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {"kfaccore_torch": "torch", "kfaccore_jax": "jax", "kfaccore_tensorflow": "tensorflow"}  # and what it needs
NEEDS = {*ADAPTERS.values(), "optax", "keras"}


def blocks(text: str) -> list[str]:
    """The Python of a page's text."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def snippets(name: str) -> list:
    """The Python of a page, named by page and place, as parameters of a test."""
    found = blocks((ROOT / name).read_text())
    return [pytest.param(code, id=f"{name}-{number}") for number, code in enumerate(found)]


def promised(code: str) -> list[str]:
    """What a snippet's lines `print(...)  # output` say they print."""
    return re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)


def missing(code: str) -> list[str]:
    """The frameworks that a snippet imports and this environment lacks."""
    words = set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE))
    wanted = sorted({ADAPTERS.get(word, word) for word in words} & NEEDS)
    return [name for name in wanted if importlib.util.find_spec(name) is None]


def printed(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a snippet in a process of its own: TensorFlow beside other frameworks can abort one."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def runs_as_printed(code: str, folder: Path) -> None:
    """Skips where a framework is missing."""
    for name in missing(code):
        pytest.skip(f"{name} is not installed")
    done = printed(code, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == promised(code)
