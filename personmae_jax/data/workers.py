"""What every worker process of ours has in common: it lives exactly as its parent."""

import multiprocessing
import os
import signal
import threading
from typing import Any


def live_with_parent() -> None:
    """Ties this worker process to the one that started it; call it first of all.

    Ctrl-C, and a scheduler's SIGTERM, go to every process of a group; but the parent
    alone decides when to stop, and may go on until it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
