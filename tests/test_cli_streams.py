"""What `kfaccore` prints arrives whole or with a message, in lines of its own; what it cannot compute with is named."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import kfaccore as kf
from kfaccore.cli import app
from kfaccore.cli.table import lines

SHORT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
sys.argv = ["kfaccore", "methods"]
from kfaccore.cli import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of files are of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_full_disk_takes_a_part_of_is_said(unbuffered, tmp_path):
    env = dict(os.environ, PYTHONUNBUFFERED=unbuffered, PYTHONDONTWRITEBYTECODE="1")
    with (tmp_path / "out").open("w") as out:
        found = subprocess.run(
            [sys.executable, "-c", SHORT], stdout=out, stderr=subprocess.PIPE, text=True, env=env, check=False
        )
    assert found.returncode == 2, found.stderr
    assert "kfaccore: [Errno" in found.stderr


@pytest.mark.parametrize("verb", ["inspect", "compare"])
def test_a_stored_gradient_that_overflowed_is_named(verb, tmp_path):
    rng = np.random.default_rng(0)
    record = kf.Record(rng.normal(size=(6, 4)), rng.normal(size=(6, 3)), 6.0)
    grad = rng.normal(size=(3, 4))
    grad[1, 2] = np.inf
    path = tmp_path / "records.safetensors"
    kf.save_records(path, {"bad": record}, {"bad": grad})
    found = CliRunner().invoke(app, [verb, str(path)])
    assert found.exit_code == 2
    assert "layer 'bad': the gradient stored with it, of shape (3, 4), is not finite" in found.output


def test_a_name_of_two_lines_is_one_cell():
    assert lines(("layer", "x"), [("a\nb\tc", "1")])[-1] == r"a\nb\tc  1"
