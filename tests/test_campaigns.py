"""The short form of every campaign; `make campaigns` runs the long ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
from campaigns import fuzz, hostile, kill, numerics, pythons
from conftest import NAMESPACES
from rows import METHODS

EAGER = [n for n in NAMESPACES if n.name in ("numpy", "torch")]
CAMPAIGNS = Path(__file__).parent / "campaigns"


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("namespace", EAGER, ids=lambda n: n.name)
def test_fuzz(row, namespace):
    _, broken = fuzz.campaign(row, namespace, range(16 if namespace.name == "numpy" else 6), seed=1)
    assert not broken


@dataclass(frozen=True)
class Excused(kf.KFAC):
    """Right in every number, and never OK."""

    def solve(self, *arguments, **options):
        found = super().solve(*arguments, **options)
        return replace(found, code=np.full_like(found.code, kf.Code.UNCONVERGED))


def test_a_method_that_always_excuses_itself_fails():
    row = replace(METHODS[0], method=Excused())
    seen, broken = fuzz.campaign(row, EAGER[0], range(8), seed=1)
    assert seen["ok"] == 0
    assert "OK in 0 of 8 cases" in broken[-1]
    assert any("refused codes" in line for line in broken)


def test_hostile_files():
    seen, broken = hostile.campaign(100, seed=1)
    assert not broken
    assert seen["read"]


def test_kills():
    assert kill.campaign(2, seed=1) == []


def test_numerics():
    assert numerics.campaign(1, seed=1) == []


def script(name: str, *options: str) -> str:
    """What a campaign that forks prints, in a process of its own, which has no threads of other libraries."""
    command = [sys.executable, str(CAMPAIGNS / f"{name}.py"), "--seed", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="ranks are torch's")
def test_ranks():
    assert script("ranks", "--count", "2", "--kinds", "dtypes,rate") == (
        "ranks: 2 kills, 2 kinds of difference: 0 broken promises"
    )


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="runs are of its digits")
def test_terminals():
    line = script("terminals", "--count", "60")
    assert line.startswith("terminals: 60 command lines, exits {'0': ")
    assert line.endswith(": 0 broken promises")


def test_pythons_are_found_where_a_manager_keeps_them(tmp_path, monkeypatch):
    """The newest of each minor version that starts, oldest first; names on the path come before."""
    for version, code in (("3.12.1", 0), ("3.12.9", 1), ("3.13.0", 0), ("3.10.0", 0)):
        python = tmp_path / "versions" / version / "bin" / f"python{version.rpartition('.')[0]}"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
    named = tmp_path / "names" / "python3.13"
    named.parent.mkdir()
    named.write_bytes((tmp_path / "versions/3.13.0/bin/python3.13").read_bytes())
    named.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(named.parent))
    assert pythons.found() == [str(tmp_path / "versions/3.12.1/bin/python3.12"), str(named)]
