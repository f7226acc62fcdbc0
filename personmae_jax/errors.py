"""The two ways a run ends badly, each with its exit code; and `Closing`, a base."""

import contextlib
import re
from typing import TypeVar

from absl import logging

Entered = TypeVar("Entered")  # beartype refuses `Self` outside a decorated class


# What moves a cursor, clears a screen, hides or turns text, and comes in names.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class ConfigError(ValueError):
    """Wrong arguments or configuration, found before any work was done: exit code 2.

    The message is one sentence: the value, the rule, and the way out.
    """


class RunError(RuntimeError):
    """A failure of a run that had begun: exit code 1.

    The message is one line that says what happened and how to fix it.
    """


def first_line(error: BaseException) -> str:
    """What a one-line message quotes of an exception of somebody else's code."""
    with contextlib.suppress(Exception):  # theirs may have no text at all
        return str(error).strip().splitlines()[0]
    return type(error).__name__


def quoted(value: object, length: int = 100) -> str:
    """The begin of a stranger's value on one line; of an error, its message."""
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
        return " ".join(text.split())[:length]
    except BaseException as e:  # its own code, which may do anything
        return f"of a text that raises {type(e).__name__}"


def without_control(text: str) -> str:
    """The text with control characters but tab and newline escaped, for terminals."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Closing:
    """Context manager of a `close()` that never hides an earlier error by its own."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()

    def __enter__(self: Entered) -> Entered:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except RunError as e:
            if error is None:
                raise
            logging.error("%s", e)  # what came first tells more

    def close(self) -> None:
        """Leaves what was entered into `_closing`; raises RunError if that fails."""
        self._closing.close()
