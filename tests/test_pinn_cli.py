"""`kfaccore train` and `inspect` on differential equations: files, resuming, Ctrl-C, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.cli import app
from kfaccore.io import flatten
from kfaccore_numpy.equations.network import PINN
from kfaccore_numpy.equations.problems import PROBLEMS
from kfaccore_numpy.equations.tasks import PINN_TASKS, SOLVERS
from kfaccore_numpy.equations.train import initial_state

TINY = replace(PINN_TASKS["poisson-2d"], widths=(24,), counts=(150, 60))


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_train_writes_errors_picture_and_files(tmp_path):
    result = run("train", "poisson-2d", "--method", "pinn-kfac-star", "--against", "adam,lbfgs", "--steps", 6,
                 "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.safetensors", "curves.png"}
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((tmp_path / "run.json").read_text())
    assert [row["method"] for row in summary["methods"]] == ["pinn-kfac-star", "adam", "lbfgs"]
    assert summary["methods"][0]["codes"] == {"OK": 6 * 2}
    for row in summary["methods"]:
        assert row["absolute"] == pytest.approx(row["relative"] * 0.5, rel=0.05)
    for word in ("pinn-kfac-star", "relative", "absolute", "lbfgs"):
        assert word in result.stdout
    assert kf.load(tmp_path / "run.safetensors")["state"]["step"] == 6


def test_inspect_shows_both_terms_of_every_layer(tmp_path):
    assert run("train", "poisson-2d", "--method", "pinn-kfac-star", "--steps", 6, "--out", tmp_path).exit_code == 0
    file = tmp_path / "run.safetensors"
    found = json.loads(run("inspect", file, "--json").stdout)
    assert found["covered"] == 1.0
    rows = {row["layer"]: row for row in found["layers"]}
    assert list(rows) == ["dense0 interior", "dense0 boundary", "dense2 interior", "dense2 boundary"]
    term = kf.load(file)["state"]["layers"]["dense2"]["terms"]["1"]
    values = np.linalg.eigvalsh(term["A"][0] / term["weight"][0])
    A = rows["dense2 boundary"]["A"]
    assert A["size"] == 65
    assert A["trace"] == pytest.approx(values.sum())
    assert A["damping_over_mean"] == pytest.approx(PINN_TASKS["poisson-2d"].star[0] / values.mean())
    assert A["damping_over_top"] == pytest.approx(PINN_TASKS["poisson-2d"].star[0] / values[-1])
    shown = run("inspect", file, "--plot")
    assert shown.exit_code == 0
    for word in ("dense0 interior", "dense2 boundary", "100% of the parameters"):
        assert word in shown.stdout
    assert (tmp_path / "run-spectra.png").read_bytes()[:4] == b"\x89PNG"
    assert run("train", "poisson-2d", "--method", "adam", "--steps", 2, "--out", tmp_path).exit_code == 0
    refused = run("inspect", file)
    assert refused.exit_code == 2
    assert "holds no Kronecker factors (method adam)" in refused.stderr


@pytest.fixture
def undrawn(monkeypatch):
    """Without the picture, which is most of a short run's time."""
    monkeypatch.setattr("kfaccore.cli.plot.solution", lambda *_: None)


@pytest.mark.parametrize("method", ["pinn-kfac", "pinn-kfac-star", "gauss-newton", "adam"])
@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, every, monkeypatch, tmp_path):
    monkeypatch.setitem(PINN_TASKS, "poisson-2d", replace(TINY, every=every, clocks=(2, 4)))
    whole, half, rest = (tmp_path / name for name in ("whole", "half", "rest"))
    common = ("train", "poisson-2d", "--method", method, "--seed", 3, "--steps")
    assert run(*common, 11, "--out", whole).exit_code == 0
    assert run(*common, 7, "--out", half).exit_code == 0
    assert run(*common, 11, "--resume", half / "run.safetensors", "--out", rest).exit_code == 0
    want, got = (flatten(kf.load(folder / "run.safetensors")) for folder in (whole, rest))
    assert set(want) == set(got)
    for name, x in want.items():
        assert np.array_equal(x, got[name]), name
        assert x.dtype == got[name].dtype
    assert kf.metadata(rest / "run.safetensors") == kf.metadata(whole / "run.safetensors")
    if every and method != "gauss-newton":  # it did not stand still
        assert not np.array_equal(want["params/dense0"], kf.load(half / "run.safetensors")["params"]["dense0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poisson-2d", "--method", "pinn-kfac-star"), "is a run of pinn-kfac on poisson-2d, not pinn-kfac-star on"),
        (("heat-1d",), "is a run of pinn-kfac on poisson-2d, not pinn-kfac on heat-1d"),
        (("digits-classifier",), "is a run of pinn-kfac on poisson-2d, not kfac on digits-classifier"),
        (("poisson-2d", "--seed", "1"), "is a run of --seed 0; --seed is 1"),
        (("poisson-2d", "--steps", "2"), "has taken 2 steps already; --steps is 2, need more"),
        (("poisson-2d", "--method", "lbfgs"), "--resume continues a run that keeps a state, which lbfgs does not"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_resumed_exits_2_and_writes_nothing(arguments, message, tmp_path):
    assert run("train", "poisson-2d", "--steps", 2, "--out", tmp_path / "first").exit_code == 0
    file = tmp_path / "first" / "run.safetensors"
    result = run("train", *arguments, "--resume", file, "--out", tmp_path / "next")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list((tmp_path / "next").iterdir())


@pytest.mark.usefixtures("undrawn")
def test_damaged_and_foreign_files_are_refused(tmp_path):
    assert run("train", "poisson-2d", "--steps", 2, "--out", tmp_path).exit_code == 0
    file = tmp_path / "run.safetensors"
    data = file.read_bytes()
    meta = kf.metadata(file)
    narrow = PINN.of(PROBLEMS["poisson-2d"], 5)
    state = initial_state(narrow, narrow.init(0), SOLVERS["pinn-kfac"](TINY))
    for write, message in (
        (lambda: file.write_bytes(data[:-100]), "is not a readable safetensors file"),
        (lambda: file.write_text("{}"), "is not a readable safetensors file"),
        (lambda: kf.save(file, {"params": narrow.init(0), "state": state}, **meta), "leaf 'params/dense0' has shape"),
        (lambda: kf.save(file, {"params": narrow.init(0)}, **meta), "holds other leaves than asked for"),
        (file.unlink, "is not a file"),
    ):
        write()
        result = run("train", "poisson-2d", "--steps", 4, "--resume", file)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("task", ["poisson-2d", "heat-1d", "poisson-2d-deep"])
def test_gauss_newton_from_the_command_line(task):
    result = run("train", task, "--method", "gauss-newton", "--steps", 3, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)["methods"][0]
    assert row["step"] == 3
    assert row["codes"] == {"OK": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--method", "newton"),
            "no method 'newton' for poisson-2d; there are pinn-kfac, pinn-kfac-star",
        ),
        (("--against", "adam,kfac"), "no method 'kfac' for poisson-2d"),
        (("--l2", "0.1"), "--l2: not for poisson-2d"),
        (("--backend", "cupy"), "--backend: not for poisson-2d"),
        (("--steps", "-1"), "--steps is -1; need a positive number"),
        (("--out", "/dev/null/x"), "--out /dev/null/x"),
    ],
)
def test_bad_input_exits_2(arguments, message):
    result = run("train", "poisson-2d", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
