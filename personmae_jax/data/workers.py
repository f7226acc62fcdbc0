"""Worker processes: how many pay, and that each exits when its parent does."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def num_cores() -> int:
    """How many cores this process may use: a task of a cluster has some of its node."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Starts processes that no signal reaches before `exit_with_parent`.

    What this process is sent meanwhile reaches it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent() -> None:
    """Ties this worker process to the one that started it; call it first of all.

    Ctrl-C, and a scheduler's SIGTERM, go to every process of a group; but the parent
    alone decides when to stop, and may go on until it has saved.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
