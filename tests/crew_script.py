"""What `test_cli_crew.py` runs in a process of its own: forks beside the threads of JAX and PyTorch are not safe."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import active_children

import pytest

from kfaccore.cli.crew import shared_out


def doubled(job, send):
    send(2 * job)
    send(os.getpid())


def every_job_is_done_by_another_process():
    found: dict = {}
    for job, message in shared_out(range(5), doubled, 2):
        found.setdefault(job, []).append(message)
    assert {job: messages[0] for job, messages in found.items()} == {job: 2 * job for job in range(5)}
    workers = {messages[1] for messages in found.values()}
    assert len(workers) <= 2
    assert os.getpid() not in workers
    assert active_children() == []


def what_a_job_raises_is_raised():
    def refusing(job, send):
        raise KeyError(f"no {job}")

    with pytest.raises(KeyError, match="no 1"):
        list(shared_out([1], refusing, 2))
    assert active_children() == []


def a_process_that_is_killed_is_named():
    def killed(job, send):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"given 'fc' was ended \(exit code -9\)"):
        list(shared_out(["fc"], killed, 2))


def an_iterator_that_is_closed_ends_its_processes():
    def waiting(job, send):
        send("begun")
        signal.pause()

    messages = shared_out(range(2), waiting, 2)
    next(messages)
    assert len(active_children()) == 2
    messages.close()
    assert active_children() == []


if __name__ == "__main__":
    globals()[sys.argv[1]]()
