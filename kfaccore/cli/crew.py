"""Jobs shared out among processes: each takes the next one as soon as it is free.

Processes, since Python runs one thread at a time; forked, since an interpreter and its imports take longer to start
than most layers to measure. Where there is no safe fork there is a crew of one, which is nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import wait
from typing import Any

from threadpoolctl import threadpool_info

Send = Callable[[Any], None]
Work = Callable[[Any, Send], None]


def hands() -> int:
    """How many processes BLAS would keep busy with a thread each; 1 where none can be forked."""
    if "fork" not in get_all_start_methods() or sys.platform == "darwin":  # Apple's BLAS does not survive a fork
        return 1
    return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def shared_out(jobs: Iterable[Any], work: Work, count: int) -> Generator[tuple[Any, Any]]:
    """(job, message) for everything that `work(job, send)` sends in one of `count` processes, as it comes.

    Jobs are asked for one by one, when a process is free. Raises what `work` raises, and ChildProcessError for a
    process that was killed; none of them outlives the iterator.
    """
    waiting = iter(jobs)
    context = get_context("fork")
    crew: dict[Any, Any] = {}
    busy: dict[Any, Any] = {}  # the job of each pipe whose process has one
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work), daemon=True)
            with warnings.catch_warnings():
                # Python warns of threads; those of BLAS are at rest, and it starts its own anew after a fork
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()  # so that the end of the process ends the pipe
            crew[here] = process
            _next(here, waiting, busy)
        while busy:
            for pipe in wait(list(busy)):
                yield from _heard(pipe, crew[pipe], waiting, busy)
    finally:
        for pipe, process in crew.items():
            pipe.close()
            process.kill()  # it holds nothing that must be put in order
            process.join()


def _next(pipe: Any, waiting: Iterator[Any], busy: dict[Any, Any]) -> None:
    """Give a free process the next job, if there is one."""
    busy.pop(pipe, None)
    for job in waiting:
        busy[pipe] = job
        pipe.send(job)
        return


def _heard(pipe: Any, process: Any, waiting: Iterator[Any], busy: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """One message of a busy process."""
    try:
        ended, message = pipe.recv()
    except EOFError:
        process.join()
        job = busy[pipe]
        raise ChildProcessError(
            f"the process that was given {job!r} was ended (exit code {process.exitcode})"
        ) from None
    if not ended:
        yield busy[pipe], message
    elif message is not None:
        raise message
    else:
        _next(pipe, waiting, busy)


def _serve(pipe: Any, work: Work) -> None:
    """Do jobs until the pipe ends; whoever made the process answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            work(job, lambda message: pipe.send((False, message)))
        except Exception as error:
            pipe.send((True, error))
        else:
            pipe.send((True, None))
