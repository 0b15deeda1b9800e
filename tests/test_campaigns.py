"""The short form of every campaign; `make campaigns` runs the long ones."""

from __future__ import annotations

import pytest

from campaigns import fuzz, hostile, kill
from conftest import NAMESPACES
from rows import METHODS

EAGER = [n for n in NAMESPACES if n.name in ("numpy", "torch")]


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("namespace", EAGER, ids=lambda n: n.name)
def test_fuzz(row, namespace):
    seen, broken = fuzz.campaign(row, namespace, 16 if namespace.name == "numpy" else 6, seed=1)
    assert not broken
    assert seen["ok"] > 0.6 * sum(seen.values())


def test_hostile_files():
    seen, broken = hostile.campaign(100, seed=1)
    assert not broken
    assert seen["read"]


def test_kills():
    assert kill.campaign(2, seed=1) == []
