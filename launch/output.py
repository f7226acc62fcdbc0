"""Standard output and error that no terminal, disk or pipe can end a run by."""

import io
import os
import select
import sys

from absl import logging

from personmae_jax.errors import without_control


class _Raw(io.RawIOBase):
    """A descriptor whose writes may fail: what was lost is said at the end."""

    error: OSError | None = None

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # as some terminals and runners leave a pipe
                select.select([], [self._descriptor], [])
            except OSError as e:
                self.error = e
                return len(data)


class _Stream(io.TextIOWrapper):
    """Escapes control characters, and what the encoding lacks."""

    unescaped: io.TextIOWrapper  # the same for what draws, as a progress bar does

    def write(self, text: str) -> int:
        return super().write(without_control(text))


def guard() -> None:
    """Replaces both streams."""
    for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would be taken for it
            os.open(os.devnull, os.O_RDONLY)  # what is written is known to be lost
        if descriptor:
            old = getattr(sys, name)
            options = {
                "encoding": old.encoding if old else "utf-8",
                "errors": "backslashreplace",
                "line_buffering": True,
            }
            stream = _Stream(io.BufferedWriter(_Raw(descriptor)), **options)
            stream.unescaped = io.TextIOWrapper(stream.buffer, **options)
            setattr(sys, name, stream)
    logging.get_absl_handler().python_handler.stream = sys.stderr


def lost() -> OSError | None:
    """Why standard output was not written, if it was not."""
    sys.stdout.flush()
    return sys.stdout.buffer.raw.error  # type: ignore[attr-defined]


def code_if_told(code: int, otherwise: int) -> int:
    """`code`, or instead of 0 `otherwise` if standard output was lost, and says so."""
    if error := lost():
        what = f"standard output was not written: {error.strerror}"
        print(what, file=sys.stderr, flush=True)
        return code or otherwise
    return code
