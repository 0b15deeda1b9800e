"""What `kfaccore train` leaves on disk: whole files or the old ones, JSON without NaN, and what can be gone on from."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
import kfaccore_numpy
from kfaccore.cli import app

pytest.importorskip("sklearn")
TASKS = ["digits-classifier", "poisson-2d"]  # one of either kind of run


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def strict(text: str):
    """Of JSON as everyone reads it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("number", "where"), [(errno.ENOSPC, "fsync"), (errno.EROFS, "replace")])
def test_a_disk_that_refuses_leaves_the_old_files_and_loses_no_figure(task, number, where, tmp_path, monkeypatch):
    assert run("train", task, "--steps", 1, "--out", tmp_path).exit_code == 0
    before = contents(tmp_path)
    assert set(before) == {"run.json", "run.safetensors", "curves.png"}

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, where, refuse)
    result = run("train", task, "--steps", 2, "--out", tmp_path, "--json")
    monkeypatch.undo()
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("kfaccore: ")]
    assert line.count(os.strerror(number)) == 3
    assert contents(tmp_path) == before
    assert strict(result.stdout)["methods"][0]["step"] == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_found_before_training(number, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(kfaccore_numpy, "fit", lambda *_, **__: pytest.fail("it has been trained"))
    result = run("train", TASKS[0], "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 2
    assert os.strerror(number) in result.stderr


@pytest.mark.parametrize("name", ["run.json", "run.safetensors", "curves.png"])
def test_a_folder_where_a_file_goes(name, tmp_path):
    (tmp_path / name).mkdir()
    result = run("train", TASKS[0], "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"{name} is a folder" in result.stderr


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_left_to_do_and_another_seed_is_another_run(task, tmp_path):
    assert run("train", task, "--steps", 2, "--out", tmp_path).exit_code == 0
    before = contents(tmp_path)
    file = tmp_path / "run.safetensors"
    for options, word in ((("--steps", 2), "nothing is left to do"), (("--steps", 4, "--seed", 1), "--seed 0")):
        result = run("train", task, *options, "--resume", file, "--out", tmp_path)
        assert result.exit_code == 2
        assert word in result.stderr
        assert contents(tmp_path) == before


def test_a_run_that_diverged_is_still_json(tmp_path, monkeypatch):
    wild = dataclasses.replace(kfaccore_numpy.TASKS[TASKS[0]], rates={"sgd": 1e200})
    monkeypatch.setitem(kfaccore_numpy.TASKS, TASKS[0], wild)
    result = run("train", TASKS[0], "--method", "sgd", "--steps", 5, "--out", tmp_path, "--json")
    assert result.exit_code == 3
    assert strict(result.stdout)["methods"][0]["final"] is None
    assert strict((tmp_path / "run.json").read_text()) == strict(result.stdout)


def test_sigterm_ends_with_the_step_and_the_files_can_be_resumed(monkeypatch, tmp_path):
    module = importlib.import_module("kfaccore_numpy.train")

    def interrupted(*arguments, real=module.step, **options):
        found = real(*arguments, **options)
        if arguments[6] == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(module, "step", interrupted)
        result = run("train", TASKS[0], "--steps", 10, "--out", tmp_path)
    assert result.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    file = tmp_path / "run.safetensors"
    assert kf.load(file)["state"]["step"] == 2
    assert run("train", TASKS[0], "--steps", 3, "--resume", file, "--out", tmp_path).exit_code == 0
    assert run("train", TASKS[0], "--steps", 3, "--out", tmp_path / "whole").exit_code == 0
    want, got = (kf.load(path)["params"] for path in (tmp_path / "whole" / "run.safetensors", file))
    assert all(np.array_equal(want[n], got[n]) for n in want)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_closed_since_python_began_is_none(number, tmp_path):
    """One that goes to a file knows at once that it is closed."""
    program = f"import os; os.close({number}); from kfaccore.cli import main; main()"
    paths = {name: tmp_path / name for name in ("stdout", "stderr")}
    with paths["stdout"].open("w") as out, paths["stderr"].open("w") as err:
        done = subprocess.run([sys.executable, "-c", program, "trian"], stdout=out, stderr=err, check=False)
    told = paths["stderr"].read_text()
    assert done.returncode == 2
    assert "Traceback" not in told
    assert ("No such command" in told) == (number == 1)
    assert not paths["stdout"].read_text()
