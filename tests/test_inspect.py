"""inspect: what a file knows is shown, what it does not is said, what is damaged ends with a line and exit 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.cli import app

F = np.diag([1.0, 2.0, 4.0])[None]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def state(**leaves):
    return {"params": {"fc": np.ones((3, 3)), "other": np.ones(7)}, "state": {"layers": {"fc": leaves}}}


def saved(path, tree=None, **meta):
    good = {"A": 2 * F, "G": F, "weight": np.array([2.0])}
    kf.save(path, state(**good) if tree is None else tree, **meta)
    return path


def test_what_the_file_does_not_know_is_said(tmp_path):
    shown = run("inspect", saved(tmp_path / "x")).stdout
    assert "9 parameters are covered by Kronecker factors; the file does not say how many there are" in shown
    assert "the file does not have: model, parameters, uncovered, damping, clocks" in shown
    assert "None" not in shown
    assert "damping/mean" not in shown
    found = json.loads(run("inspect", tmp_path / "x", "--json").stdout)
    assert found["covered"] is None
    assert found["layers"][0]["A"] == {
        "size": 3,
        "condition": 4.0,
        "effective_rank": pytest.approx(2.60, abs=0.01),
        "trace": 7.0,
    }


def test_what_the_file_knows_is_shown(tmp_path):
    meta = {"model": "Net", "parameters": 20, "uncovered": {"scale": [4, "no layer kind"]}, "damping": {"fc": 0.1}}
    path = saved(tmp_path / "x", **meta, clocks={"update": 1, "refresh": 5}, method="KFAC")
    shown = run("inspect", path).stdout
    assert "x: by KFAC of Net" in shown
    assert "45% of the parameters are covered by Kronecker factors: 9 of 20" in shown
    assert "not covered: scale (4): no layer kind" in shown
    assert "clocks: update every 1 steps, refresh every 5 steps" in shown
    assert "the file does not have" not in shown
    row = json.loads(run("inspect", path, "--json").stdout)["layers"][0]
    assert row["damping_over_mean"] == pytest.approx(0.1 / (7 / 3) / (3.5 / 3))


def test_a_torch_file_knows_its_model(tmp_path):
    torch = pytest.importorskip("torch")
    import kfaccore_torch as kt

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU(3), torch.nn.Linear(3, 2))
    pre = kt.Preconditioner(model, torch.nn.CrossEntropyLoss(), kf.Preconditioner(kf.KFAC()), skip=("1.*",))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    pre.save(tmp_path / "x")
    meta = kf.metadata(tmp_path / "x")
    assert (meta["model"], meta["parameters"]) == ("Sequential", sum(p.numel() for p in model.parameters()))
    assert meta["clocks"] == {"update": 1, "refresh": 5}
    assert set(meta["damping"]) == {"0", "2"} == set(meta["blocks"])
    assert set(meta["uncovered"]) == {"1.weight"}
    kt.save_records(tmp_path / "r", model, torch.nn.CrossEntropyLoss(), x, y, skip=("1.*",))
    shown = run("inspect", tmp_path / "r").stdout
    assert "records of r: of Sequential" in shown
    assert "covered by Kronecker factors: 23 of 26" in shown
    assert "not covered: 1.weight (3)" in shown


def test_records_are_reported(tmp_path, rng):
    path = tmp_path / "x.npz"
    np.savez(path, **{"fc.a": rng.normal(size=(5, 3)), "fc.g": rng.normal(size=(5, 2))})
    shown = run("inspect", path, "--plot").stdout
    assert "Kronecker" in shown
    assert (tmp_path / "x-spectra.png").exists()
    (row,) = json.loads(run("inspect", path, "--json").stdout)["layers"]
    assert row["noise"] is None
    assert row["kronecker"] > 0


BAD = {
    "not square": state(A=np.ones((1, 3, 2)), G=F, weight=np.ones(1)),
    "weight": state(A=F, G=F, weight=np.ones(4)),
    "scalar": state(A=np.float64(1.0), G=F, weight=np.ones(1)),
    "nan": state(A=F * np.nan, G=F, weight=np.ones(1)),
    "no factors": {"state": np.ones(3)},
    "layers is a leaf": {"state": {"layers": np.ones(3)}},
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_states_exit_2(tmp_path, kind):
    result = run("inspect", saved(tmp_path / "x", BAD[kind]), "--json")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("kfaccore: ")


@pytest.mark.parametrize("meta", [{"damping": [1]}, {"blocks": 3}, {"terms": {}}, {"uncovered": "x"}, {"clocks": [2]}])
def test_metadata_of_the_wrong_kind_exits_2(tmp_path, meta):
    result = run("inspect", saved(tmp_path / "x", **meta))
    assert result.exit_code == 2
    assert "damaged metadata" in result.stderr


@pytest.mark.parametrize("meta", [{"damping": {"fc": "x"}}, {"parameters": "many"}, {"order": 3}, {"model": {"a": []}}])
def test_odd_values_are_as_good_as_none(tmp_path, meta):
    assert run("inspect", saved(tmp_path / "x", **meta)).exit_code == 0


def command(*arguments, code="from kfaccore.cli import main; main()", **options):
    """The command in a process of its own."""
    env = {**os.environ, **options.pop("env", {})}
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, check=False, env=env, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_without_the_characters(tmp_path, encoding, rng):
    path = tmp_path / "x.npz"
    np.savez(path, **{"層λ.a": rng.normal(size=(5, 3)), "層λ.g": rng.normal(size=(5, 2))})
    done = command("compare", path, "--methods", "kfac", env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_device_and_an_unexpected_error_are_one_line(tmp_path):
    path = saved(tmp_path / "x")
    shell = "from kfaccore.cli import main; import sys; sys.stdout = open('/dev/full', 'w'); main()"
    done = command("inspect", path, code=shell)
    assert done.returncode == 2
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr
    broken = "import kfaccore.cli as c; c._run = lambda: 1 / 0; c.main()"
    done = command("methods", code=broken)
    assert done.returncode == 1
    assert done.stderr.strip().count(b"\n") == 0
    assert b"ZeroDivisionError" in done.stderr
    assert b"--debug" in done.stderr
    assert b"Traceback" in command("--debug", "methods", code=broken).stderr


def test_a_picture_that_cannot_be_drawn_exits_2(tmp_path, rng):
    path = tmp_path / "x.npz"
    np.savez(path, **{"fc.a": rng.normal(size=(5, 3)), "fc.g": rng.normal(size=(5, 2))})
    for target, said in ((tmp_path / "no" / "x.png", "is no folder"), (tmp_path / "x.docx", "could not be drawn")):
        result = run("compare", path, "--methods", "kfac", "--plot", target)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_negative_seed_is_bad_input():
    result = run("train", "digits-classifier", "--seed", "-1", "--steps", "1")
    assert result.exit_code == 2
    assert "--seed" in result.stderr
