import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest

from personmae_jax.engine.progress import Progress

REPOSITORY = pathlib.Path(__file__).parents[2]


def test_progress_without_a_terminal_is_a_line_now_and_then(clock, capsys):
    with Progress(100, start_step=40) as progress:
        for step in range(41, 101):
            clock.now += 1
            progress.show(step, "loss 0.5000  1,234 images/s")
    lines = capsys.readouterr().out.splitlines()
    shown = [int(re.match(r"step (\d+)/100", line)[1]) for line in lines]
    assert shown == [41, 51, 61, 71, 81, 91, 100]
    assert lines[1] == "step 51/100  loss 0.5000  1,234 images/s  0:00:49 left"


SHOW_PROGRESS = """
from absl import flags, logging
from personmae_jax.engine.progress import Progress
flags.FLAGS.mark_as_parsed()  # this and the next line as absl.app.run does
logging.use_absl_handler()
with Progress(3) as progress:
    for step in (1, 2, 3):
        progress.show(step, "loss 0.5000  1 images/s")
        logging.warning("a log line of step %d", step)
logging.warning("a log line after the end")
"""


@pytest.mark.slow
def test_on_a_terminal_log_lines_do_not_tear_the_bar(tmp_path):
    shown = run_on_terminal(SHOW_PROGRESS)
    lines = screen(shown)
    for step in (1, 2, 3):
        assert sum(line.endswith(f"a log line of step {step}") for line in lines) == 1
    assert sum("━" in line for line in lines) == 1
    bar = next(line for line in lines if "━" in line)
    assert re.search(r"^step 3/3 loss 0.5000  1 images/s  0:00:00 left ━+", bar)
    assert "after the end" in lines[-1]


def run_on_terminal(code: str) -> str:
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with os.fdopen(main, "rb", buffering=0) as stream:
        try:
            while block := stream.read(4096):
                shown += block
        except OSError:  # Linux says so that the other side is closed
            pass
    assert process.wait(timeout=60) == 0, shown
    return shown.decode()


def screen(shown: str) -> list[str]:
    """What a terminal shows after these characters; moves and erasures obeyed."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", shown):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            count = int(re.sub(r"\D", "", token) or 1)
            if token.endswith("A"):
                row = max(row - count, 0)
            elif token.endswith("K"):
                lines[row] = "" if count == 2 else lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]
