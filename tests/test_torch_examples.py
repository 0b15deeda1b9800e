"""The torch examples run, in small form, and learn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from kfaccore_torch.examples import char_transformer, mixed_precision, plain_loop, residual_cnn  # noqa: E402

RANKS = """
import os
from pathlib import Path
import torch.distributed as dist
from kfaccore_torch.examples import data_parallel

dist.init_process_group("gloo")
(Path(__file__).parent / str(dist.get_rank())).write_text(str(data_parallel.main()))
os._exit(0)
"""


def test_plain_loop():
    assert plain_loop.main(12) > 0.85


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    assert mixed_precision.main(12, dtype) > 0.85


def test_residual_cnn():
    assert residual_cnn.main(10) > 0.6


def test_char_transformer():
    assert char_transformer.main(6) < 4.5


def test_data_parallel(tmp_path):
    """torchrun, as in the example's first line; ranks leave at once, for gloo's threads can abort Python's exit."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run([*command, str(script)], capture_output=True, text=True, env=env, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    shares = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert shares[0] == shares[1] > 0.95
