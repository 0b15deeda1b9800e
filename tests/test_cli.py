"""The command as a user runs it: files, tables, exit codes."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.cli import app
from kfaccore.cli.doctor import _advice
from kfaccore.cli.table import lines

pytest.importorskip("sklearn")


def run(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run("train", "digits-autoencoder", "--against", "adam", "--steps", 12, "--out", out)


def test_train_writes_table_picture_and_files(trained):
    out, result = trained
    assert result.exit_code == 0
    assert {path.name for path in out.iterdir()} == {"run.json", "run.safetensors", "curves.png"}
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((out / "run.json").read_text())
    assert [row["method"] for row in summary["methods"]] == ["kfac", "adam"]
    assert summary["methods"][0]["codes"] == {"OK": 12 * 8}
    assert summary["curves"]["kfac"]["step"][-1] == 12
    curve = summary["curves"]["kfac"]
    told = kf.load(out / "run.safetensors")["state"]["motion"]["seen"]
    own, slope = told["own"], told["slope"]
    assert curve["critical_batch"][-1] == pytest.approx(512 * own / slope - 1, rel=1e-9)
    assert len(curve["rho"]) == len(curve["step"])
    assert curve["rho"][-1] == pytest.approx(1 / (1 + curve["critical_batch"][-1] / 512), rel=1e-9)
    assert "rho" not in summary["curves"]["adam"]
    for word in ("kfac", "adam", "final loss"):
        assert word in result.stdout


def test_inspect_reads_the_file(trained):
    out, _ = trained
    result = run("inspect", out / "run.safetensors", "--json", "--plot")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["covered"] == 1.0
    assert [row["layer"] for row in found["layers"]] == [f"dense{i}" for i in range(0, 15, 2)]
    assert found["layers"][0]["A"]["size"] == 65
    state = kf.load(out / "run.safetensors")["state"]
    assert found["layers"][0]["damping"] == state["motion"]["damping"] > 0
    tree = state["layers"]["dense0"]
    values = np.linalg.eigvalsh(tree["G"][0].astype(float) / tree["weight"])
    assert found["layers"][0]["G"]["trace"] == pytest.approx(values.sum(), rel=1e-5)
    assert (out / "run-spectra.png").exists()
    (out / "run-spectra.png").unlink()
    assert "covered by Kronecker factors" in run("inspect", out / "run.safetensors").stdout


def test_the_fixed_step_remains(tmp_path):
    result = run("train", "digits-autoencoder", "--steps", 5, "--step", "fixed", "--out", tmp_path)
    assert result.exit_code == 0
    assert kf.metadata(tmp_path / "run.safetensors")["damping"]["dense0"] == 0.1


def test_line_search_and_penalties():
    plain, *others = (
        json.loads(run("train", "digits-autoencoder", "--steps", 4, "--json", *options).stdout)["methods"][0]["final"]
        for options in ((), ("--l2", 0.1), ("--weight-decay", 0.1), ("--step", "line-search"))
    )
    assert len({plain, *others}) == 4
    result = run("train", "digits-autoencoder", "--l2", -1)
    assert result.exit_code == 2
    assert "--l2 is -1.0; need a finite number >= 0" in result.output


def test_resume_continues(trained, tmp_path):
    out, _ = trained
    result = run("train", "digits-autoencoder", "--steps", 15, "--resume", out / "run.safetensors", "--out", tmp_path)
    assert result.exit_code == 0
    assert kf.load(tmp_path / "run.safetensors")["state"]["step"] == 15
    straight = run("train", "digits-autoencoder", "--steps", 15, "--json")
    told = json.loads((tmp_path / "run.json").read_text())
    whole = json.loads(straight.stdout)
    assert told["methods"][0]["final"] == whole["methods"][0]["final"]
    assert told["methods"][0]["codes"] == whole["methods"][0]["codes"]
    first = json.loads((out / "run.json").read_text())["curves"]["kfac"]
    curve = told["curves"]["kfac"]
    assert curve["loss"] == whole["curves"]["kfac"]["loss"]  # the part before among it
    assert curve["seconds"][: len(first["seconds"])] == first["seconds"]
    assert curve["seconds"] == sorted(curve["seconds"])


def test_resume_says_what_it_cannot_go_on_from(trained, tmp_path):
    file = trained[0] / "run.safetensors"
    for option in ("--l2", "--weight-decay"):
        result = run("train", "digits-autoencoder", "--steps", 15, "--resume", file, option, 0.01)
        assert result.exit_code == 2
        assert f"is a run of {option} 0.0, not 0.01: it goes on as it began" in result.stderr
    (tmp_path / "run.safetensors").write_bytes(file.read_bytes())
    curve = json.loads((trained[0] / "run.json").read_text())["curves"]["kfac"]
    for beside in (None, "[", "[]", json.dumps({"curves": {"kfac": {"step": [3], "seconds": [1.0], "loss": [1.0]}}})):
        if beside is not None:
            (tmp_path / "run.json").write_text(beside)
        result = run("train", "digits-autoencoder", "--steps", 15, "--resume", tmp_path / "run.safetensors", "--json")
        assert "no curve of this run in" in result.stderr
        assert json.loads(result.stdout)["curves"]["kfac"]["step"][0] > curve["step"][-1]


@pytest.mark.parametrize("task", ["digits-classifier", "digits-cnn"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_other_tasks_learn(task, method):
    result = run("train", task, "--method", method, "--steps", 8, "--json")
    assert result.exit_code == 0
    losses = json.loads(result.stdout)["curves"][method]["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "mnist"), "no task 'mnist'; there are digits-autoencoder"),
        (("train", "digits-cnn", "--method", "newton"), "no method 'newton'; there are kfac"),
        (("train", "digits-cnn", "--backend", "tpu"), "--backend is 'tpu'; there are numpy and cupy"),
        (("train", "digits-cnn", "--step", "magic"), "--step is 'magic'"),
        (("train", "digits-cnn", "--steps", "-3"), "--steps is -3"),
        (("train", "digits-cnn", "--resume", "no.safetensors"), "no.safetensors is not a file"),
        (("train", "digits-cnn", "--out", "/dev/null/x"), "--out /dev/null/x"),
        (("inspect", "no.safetensors"), "no.safetensors is not a file"),
    ],
)
def test_bad_input_exits_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_inspect_of_a_file_without_factors(tmp_path):
    kf.save(tmp_path / "x.safetensors", {"params": {"a": np.ones(3)}}, method="adam")
    result = run("inspect", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert "holds no Kronecker factors (method adam)" in result.stderr


def test_divergence_exits_3(monkeypatch, tmp_path):
    import dataclasses

    import kfaccore_numpy

    task = kfaccore_numpy.TASKS["digits-autoencoder"]
    wild = dataclasses.replace(task, rates={"sgd": 1e6})
    monkeypatch.setitem(kfaccore_numpy.TASKS, "digits-autoencoder", wild)
    result = run("train", "digits-autoencoder", "--method", "sgd", "--steps", 30, "--out", tmp_path)
    assert result.exit_code == 3
    assert "not finite" in result.stderr
    assert (tmp_path / "run.safetensors").exists()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("task", "shell", "index"), [("digits-autoencoder", "train", 6), ("poisson-2d", "equations.train", 5)]
)
def test_ctrl_c_waits_for_the_step_and_the_files_can_be_resumed(task, shell, index, times, monkeypatch, tmp_path):
    module = importlib.import_module(f"kfaccore_numpy.{shell}")

    def interrupted(*arguments, real=module.step, **options):
        found = real(*arguments, **options)
        if arguments[index] == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return found

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(module, "step", interrupted)
        result = run("train", task, "--steps", 400, "--out", tmp_path)  # so many that not each is looked at
    assert result.exit_code == 130
    assert "stopping after this step" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    file = tmp_path / "run.safetensors"
    told = json.loads((tmp_path / "run.json").read_text())["methods"][0]
    assert told["method"].endswith("kfac")
    assert times == 2 or told["step"] == 3
    if times == 2:  # in the middle of a step
        assert not file.exists()
        return
    assert kf.load(file)["state"]["step"] == 3
    assert run("train", task, "--steps", 4, "--resume", file, "--out", tmp_path).exit_code == 0
    assert run("train", task, "--steps", 4, "--out", tmp_path / "whole").exit_code == 0
    want, got = (kf.load(path)["params"] for path in (tmp_path / "whole" / "run.safetensors", file))
    assert all(np.array_equal(want[n], got[n]) for n in want)


def test_a_picture_without_a_folder_is_refused_before_anything_is_measured(tmp_path):
    result = run("compare", tmp_path / "none.safetensors", "--plot", tmp_path / "no" / "x.png")
    assert result.exit_code == 2
    assert f"{tmp_path / 'no'} is no folder; make it first" in result.stderr


def test_what_a_narrow_terminal_hides_is_named(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    head = ("layer", "gain", "length", "trace")
    assert lines(head, [("dense", "0.96", "0.0465", "1.00")])[-1] == "not shown, for want of width: trace"
    monkeypatch.setenv("COLUMNS", "80")
    assert lines(head, [("dense", "0.96", "0.0465", "1.00")])[-1].endswith("1.00")


def test_methods_version_and_doctor():
    listed = run("methods")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in ("kfac", "ekfac", "diagonal", "identity", "exact", "1806.03884"))
    assert run("--version").stdout.strip() == f"kfaccore {kf.__version__}"
    checked = run("doctor", "--json")
    assert checked.exit_code == 0
    report = json.loads(checked.stdout)
    assert report["factorisations"] == {"cholesky": True, "eigh": True}
    assert set(report["dlpack"].values()) <= {"ok"}
    assert report["rates"]["gemm"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"), [(["--version"], 0, kf.__version__), (["inspect", "no"], 2, "no")]
)
def test_the_package_runs_as_a_module(arguments, code, word, tmp_path):
    """`python -m kfaccore` is the command, exit codes included."""
    done = subprocess.run(
        [sys.executable, "-m", "kfaccore", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert word in done.stdout + done.stderr


@pytest.mark.parametrize(("forced", "word"), [("Haswell", "unset it"), (None, "OPENBLAS_CORETYPE=SkylakeX can")])
def test_doctor_tells_slow_kernels_that_are_forced_from_chosen_ones(monkeypatch, forced, word):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if forced:
        monkeypatch.setenv("OPENBLAS_CORETYPE", forced)
    blas = {"core": "Haswell", "avx512": True, "threads": {}}
    advice = _advice({"blas": blas, "rates": {"gemm": 1.0, "syrk": 2.0}, "dlpack": {}})
    assert len(advice) == 1
    assert word in advice[0]
