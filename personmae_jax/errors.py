"""The two ways a run ends badly, each with its exit code."""


class ConfigError(ValueError):
    """Wrong arguments or configuration, found before any work was done: exit code 2.

    The message is one sentence: the value, the rule, and the way out.
    """


class RunError(RuntimeError):
    """A failure of a run that had begun: exit code 1.

    The message is one line that says what happened and how to mend it.
    """


def first_line(error: BaseException) -> str:
    """What a one-line message quotes of an exception of somebody else's code."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
