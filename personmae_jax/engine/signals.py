"""What SIGTERM and Ctrl-C do to a command; handlers are installed here alone.

A command that has done nothing yet leaves at once; one that writes a file leaves in
good order; a job that keeps its finished parts raises; a training run saves first.
Worker processes ignore both (`data/workers.py`). Imports no jax: the first handler
stands before jax is imported.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import logging

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_INTERRUPTED = 75  # the exit code: start again
_SHORT = 3.0  # seconds of waiting that need no word
_KILLED = 130  # 128 + SIGINT, as shells have it


def leave_at_once(text: str, end: Callable[[int], object] = os._exit) -> None:
    """From now on both print `text` and end the process with 75."""

    def leave(*_: object) -> None:
        print(text, file=sys.stderr)
        end(_INTERRUPTED)

    _install(leave)


def leave_in_order(text: str) -> None:
    """The same, but temporary files are removed on the way out."""
    leave_at_once(text, end=sys.exit)


@contextlib.contextmanager
def raised(error: type[BaseException]) -> Iterator[None]:
    """Inside, the first of either raises `error`; the second one kills."""

    def interrupt(*_: object) -> None:
        _install(signal.SIG_DFL)
        raise error

    with _restored():
        _install(interrupt)
        yield


@contextlib.contextmanager
def passed_on(child: int) -> Iterator[None]:
    """Inside, the process `child` alone decides: SIGTERM is sent on to it.

    Ctrl-C is not: the terminal has sent it to both, and the second one kills.
    """

    def pass_on(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    with _restored():
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, pass_on)
        yield


@contextlib.contextmanager
def ending_a_wait(what: str, seconds: float) -> Iterator[None]:
    """Inside, either ends the process with 75, and so many seconds end it with 1.

    For a wait below Python, where its handlers are not called: a thread of its own
    reads the signals from the wake-up pipe, and says what is waited for.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def leave(text: str, code: int) -> None:
        print(text, file=sys.stderr, flush=True)
        os._exit(code)

    poll = select.poll()  # select() takes no file numbers above 1,023
    poll.register(reader)

    def watch() -> None:
        if not poll.poll(1000 * _SHORT):
            print(f"waiting for {what} ...", file=sys.stderr, flush=True)
        while poll.poll(1000 * seconds):
            number = os.read(reader, 1)
            if not number:
                return  # the wait is over
            if number[0] in _NUMBERS:
                leave("interrupted before any work was done; start again", _INTERRUPTED)
        leave(f"error: waited {seconds:.0f} s in vain for {what}", 1)

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def take_back_sigterm() -> None:
    """Gives SIGTERM back to Python's handler, after jax.distributed has taken it.

    jax takes it below Python, to save a run at a step that all hosts agree on.
    """
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def interrupt_as_sigterm() -> None:
    """Turns the first SIGINT into a SIGTERM, which jax handles; the second one kills.

    Python calls signal handlers in the main thread only, which may be inside XLA for
    minutes. So a thread of its own reads the signals from the wake-up pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # without it none reaches the pipe

    def wait_for_interrupt() -> None:
        while os.read(reader, 1) != bytes([signal.SIGINT]):
            pass

    def watch() -> None:
        wait_for_interrupt()
        logging.warning(
            "Interrupted: saving a checkpoint; press Ctrl-C again to leave at once."
        )
        os.kill(os.getpid(), signal.SIGTERM)  # jax's handler tells the other hosts
        wait_for_interrupt()
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the bar hides the cursor
        os._exit(_KILLED)

    threading.Thread(target=watch, name="interrupts", daemon=True).start()


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Puts the handlers back that were there before."""
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _install(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in _NUMBERS:
        signal.signal(number, handler)
