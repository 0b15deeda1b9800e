"""Ranks under torch.distributed: processes forked from one that has torch imported, which takes longer than most of
what they are tested for."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

WAIT = 120  # seconds for a rank to end
ONE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed", "torch._dynamo", "array_api_compat.torch", "kfaccore_torch"])


def run(code: str, arguments: list[str], errors: str) -> None:
    """`code` as `python -W ignore -c code *arguments` runs it, what it writes to stderr in a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("ignore")
    exec(compile(code, "rank", "exec"), {"__name__": "__main__"})


def ranks(code: str, folder: Path, world: int) -> list[tuple[int, str]]:
    """(exit code, stderr) of each of `world` ranks, which are told rank, world and folder."""
    files = [folder / f"stderr-{world}-{rank}" for rank in range(world)]
    running = []
    for rank, errors in enumerate(files):
        given = code, [str(rank), str(world), str(folder)], str(errors)
        process = SERVER.Process(target=run, args=given)
        with mock.patch.dict(os.environ, ONE):  # what the server begins with
            process.start()
        running.append(process)
    for process in running:
        process.join(WAIT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a rank has not ended after {WAIT} s")
    return [(process.exitcode, errors.read_text()) for process, errors in zip(running, files, strict=True)]
