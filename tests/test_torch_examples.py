"""The torch examples run, in small form, and learn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from kfaccore_torch.examples import (  # noqa: E402
    accumulation,
    char_transformer,
    convolutions,
    digits,
    freezing,
    gradient_scaler,
    mixed_precision,
    plain_loop,
    residual_cnn,
)

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


def test_accumulation_clipping_and_a_schedule():
    assert accumulation.main(12) > 0.85


def test_a_scaler_without_unscale():
    share, scale = gradient_scaler.main(16)
    assert share > 0.85
    assert scale < 2.0**60
    assert gradient_scaler.whole(8) > 0.6


@pytest.mark.parametrize("compiled", [False, True])
def test_convolutions_average_and_evaluation_inside(compiled):
    ours, average = convolutions.main(14, compiled)
    assert ours > 0.7
    assert average > 0.6


def test_freezing_and_going_on():
    """Stopped and gone on from a file that `weights_only` reads: the same bits; the frozen layer waits for its thaw."""
    whole, _ = freezing.run(8, 3)
    again, _ = freezing.run(8, 3, freezing.run(5, 3)[1])
    frozen, _ = freezing.run(3, 3)
    assert torch.equal(frozen[0].weight, digits.mlp()[0].weight)
    assert not torch.equal(whole[0].weight, frozen[0].weight)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert freezing.main() > 0.85


def test_residual_cnn():
    assert residual_cnn.main(10) > 0.9


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
