"""Layers measured side by side: the same figures, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kfaccore as kf
from kfaccore.analysis.room import narrow
from kfaccore.analysis.target import Limits


@pytest.mark.parametrize(
    "case",
    [
        "every_job_is_done_by_another_process",
        "what_a_job_raises_is_raised",
        "a_process_that_is_killed_is_named",
        "an_iterator_that_is_closed_ends_its_processes",
    ],
)
def test_crew(case):
    script = Path(__file__).with_name("crew_script.py")
    done = subprocess.run([sys.executable, str(script), case], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def small(rng, d_in=6, d_out=4, batch=8):
    return kf.Record(rng.normal(size=(batch, d_in)), rng.normal(size=(batch, d_out)), float(batch))


def compared(path, threads, *options):
    """`kfaccore compare`, in a process whose BLAS has so many threads."""
    words = [sys.executable, "-m", "kfaccore", "compare", str(path), "--json", *options]
    counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **counts}, check=False)
    table = path.with_name(path.name + ".figures.json")
    kept = json.loads(table.read_text())["figures"]
    table.unlink()
    return done.returncode, json.loads(done.stdout), done.stderr, kept


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_figures_are_those_of_one_layer_after_the_other(tmp_path, rng, suffix):
    """A wide layer and one that cannot be read among them."""
    path = tmp_path / f"batch.{suffix}"
    records = {name: small(rng) for name in "abcde"} | {"wide": small(rng, 1100)}
    if suffix == "npz":
        arrays = {f"{name}.{leaf}": getattr(r, leaf) for name, r in records.items() for leaf in "ag"}
        np.savez(path, **arrays, **{"bad.a": np.ones((5, 4)), "bad.g": np.ones((6, 3))})
    else:
        kf.save_records(path, records)
    options = ("--methods", "kfac,ekfac,diagonal", "--budget", "0")
    one = compared(path, 1, *options)
    two = compared(path, 2, *options)
    assert one[0] == two[0] == (2 if suffix == "npz" else 0)
    assert len(one[1]["layers"]) == 3 * len(records)
    for row, other in zip(one[1]["layers"], two[1]["layers"], strict=True):
        assert row.pop("seconds")
        assert other.pop("seconds")
        same = set(row) - {"per_step"} if row["layer"] != "wide" else {"layer", "method", "bytes", "note"}
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
        assert other["gain"] == pytest.approx(row["gain"], rel=1e-9)  # a wide layer has two threads of BLAS
    assert two[3].keys() == one[3].keys()
    assert len(one[3]) == 3 * len(records)
    assert two[1]["notes"] == one[1]["notes"]
    assert ("bad" in two[2]) == (suffix == "npz")


def test_layers_side_by_side_have_room_for_all(rng):
    methods = [kf.KFAC(), kf.Diagonal()]
    limits = Limits(1 << 30)
    assert narrow(small(rng), methods, limits, 4)
    assert not narrow(small(rng, 1100), methods, limits, 2)  # one thread would not do
    many = small(rng, 64, 64, 3000)  # J J^T alone takes 8 * 3 * 2 * 3000^2 bytes
    assert narrow(many, methods, limits, 1)
    assert not narrow(many, methods, limits, 2)
    heavy = small(rng, 50, 50)
    assert narrow(heavy, methods, limits, 2)
    assert not narrow(heavy, [*methods, kf.Exact()], limits, 2)  # three matrices of 2500 x 2500 and more
