"""What a person watches while a run trains: a bar on a terminal, else plain lines."""

import sys
import time

import rich.console
import rich.progress
from absl import logging

from personmae_jax.errors import Closing

_LINE_EVERY = 10.0  # seconds between two progress lines where there is no terminal


class Progress(Closing):
    """A progress bar on a terminal, a line now and then elsewhere.

    A context manager; log lines of absl appear above the bar while it is shown.
    """

    def __init__(self, num_steps: int, start_step: int = 0, unit: str = "step"):
        super().__init__()
        self._num_steps, self._unit = num_steps, unit
        # Of the first update: what came before it was mostly compiling.
        self._first_step = self._first_time = None
        self._next_line = 0.0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(unit + " {task.completed}/{task.total}"),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.BarColumn(),
            # The launchers' own standard output escapes what moves a cursor.
            console=rich.console.Console(
                file=getattr(sys.stdout, "unescaped", sys.stdout)
            ),
        )
        self._is_terminal = self._bar.console.is_terminal
        self._task = self._bar.add_task(
            "", total=num_steps, completed=start_step, text=""
        )

    def __enter__(self) -> "Progress":
        if self._is_terminal:
            self._closing.enter_context(self._bar)
            # The bar has replaced sys.stderr; absl still holds the one before.
            handler = logging.get_absl_handler().python_handler
            self._closing.callback(handler.setStream, handler.stream)
            handler.setStream(sys.stderr)
        return self

    def show(self, step: int, text: str) -> None:
        """Shows `text` and the time left after `step` of the steps."""
        text = f"{text}  {self._seconds_left(step)}"
        if self._is_terminal:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now >= self._next_line or step >= self._num_steps:
            self._next_line = now + _LINE_EVERY
            print(f"{self._unit} {step}/{self._num_steps}  {text}", flush=True)

    def _seconds_left(self, step: int) -> str:
        now = time.monotonic()
        if self._first_step is None or self._first_time is None:
            self._first_step, self._first_time = step, now
        if step <= self._first_step:
            return "? left"
        per_step = (now - self._first_time) / (step - self._first_step)
        minutes, seconds = divmod(round(per_step * (self._num_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"
