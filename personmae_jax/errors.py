"""The two ways a run ends badly, each with its exit code; and `Closing`, a base."""

from typing import TypeVar

from absl import logging

Entered = TypeVar("Entered")  # beartype refuses `Self` outside a decorated class


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
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Closing:
    """Context manager of a `close()` that never hides an earlier error by its own."""

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
        """Writes out what is left; raises RunError if that fails."""
        raise NotImplementedError
