"""The torch examples run, in small form, and learn."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from kfaccore_torch.examples import char_transformer, mixed_precision, plain_loop, residual_cnn  # noqa: E402


def test_plain_loop():
    assert plain_loop.main(12) > 0.85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    assert mixed_precision.main(12, dtype) > 0.85


def test_residual_cnn():
    assert residual_cnn.main(10) > 0.6


def test_char_transformer():
    assert char_transformer.main(6) < 4.5


def test_data_parallel():
    """torchrun, as in the example's first line."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "kfaccore_torch.examples.data_parallel"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    shares = re.findall(r"([0-9.]+)% of the digits", result.stdout)  # the lines of two ranks can run together
    assert len(shares) == 2
    assert shares[0] == shares[1]
    assert float(shares[0]) > 95
