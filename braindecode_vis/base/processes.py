"""Fresh processes of this machine that share its cores, for work that divides into independent pieces."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.memory import count_cores, describe_kill


@contextmanager
def open_processes(
    n: int, work: str, after: str, prepare: Callable[..., Any] | None = None, about: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Yield `n` new processes; they end with the block, or when this process is killed.

    Parameters
    ----------
    n
        Number of processes; each uses its share of the cores.
    work
        What they do, for the error message if one is killed.
    after
        What remains then and what to do, as a sentence.
    prepare, about
        Function that each process calls first, and its arguments.

    Raises
    ------
    DataError
        If one of the processes is killed.
    """
    # Fresh ones, since a copy of a process with threads may wait for a lock forever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, _start, (os.getpid(), n, prepare, about)) as pool:
        try:
            yield pool
        except BrokenExecutor as error:
            raise DataError(
                f"one of the {n} processes that {work} ended: {describe_kill()}. {after}"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int, n: int, prepare: Callable[..., Any] | None, about: tuple[Any, ...]) -> None:
    from threadpoolctl import threadpool_limits

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # it was killed, and nobody would take what is made here

    threading.Thread(target=leave_with_parent, daemon=True).start()
    threadpool_limits(max(1, count_cores() // n))
    # Arrays of about a megabyte come and go: to ask the system for each anew takes a fifth of the time.
    with suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of the GNU C library
            ctypes.CDLL(None).mallopt(option, 32 << 20)
    if prepare is not None:
        prepare(*about)
