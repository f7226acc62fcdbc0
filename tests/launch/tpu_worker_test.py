"""What every host of a slice does: a training outlives its connection, starts once."""

import os
import pathlib
import signal
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu_worker.sh"


class Host:
    """A home folder whose training is a shell script instead of pretrain.py."""

    def __init__(self, home: pathlib.Path):
        self.home = home / "personmae"
        (self.home / "venv" / "bin").mkdir(parents=True)
        self.python = self.home / "venv" / "bin" / "python"

    def trains(self, body: str) -> None:
        """From now on a training counts itself in `starts`, then does `body`."""
        text = f'#!/bin/sh\necho "$*" >>{self.home}/starts\n{body}\n'
        self.python.write_text(text)
        self.python.chmod(0o755)

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SCRIPT, *words],
            env={"PATH": os.environ["PATH"], "HOME": str(self.home.parent)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as a connection has
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start("run", *words)
        stderr = process.communicate(timeout=60)[1]
        return process.returncode, stderr

    def starts(self) -> list[str]:
        return (self.home / "starts").read_text().splitlines()


@pytest.fixture
def host(tmp_path):
    # A child inherits that it is ignored, as under nohup, and cannot undo it.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield Host(tmp_path)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("left", "told"), [(0, 0), (75, 75), (1, 3), (2, 3), (134, 3)])
def test_finished_and_interrupted_are_told_as_they_are_and_failures_as_3(
    host, left, told
):
    host.trains(f"echo said why; exit {left}")
    code, stderr = host.run("id1", "--config=x")
    assert code == told
    assert ("said why" in stderr) == (told == 3)
    assert (f"left with exit code {left}" in stderr) == (told == 3)


def test_a_training_gets_its_words_and_the_copied_data(host):
    host.trains("exit 0")
    host.run("id1", "--config=configs/vitb.py", "--workdir=gs://b/a b")
    assert host.starts() == [
        "launch/pretrain.py --config=configs/vitb.py --workdir=gs://b/a b"
    ]
    (host.home / "data").mkdir()
    host.run("id2", "--config=x")
    flag = f"--config.data.path={host.home}/data"
    assert host.starts()[1] == f"launch/pretrain.py {flag} --config=x"


def test_the_same_start_repeated_starts_nothing_and_tells_the_same(host):
    host.trains("exit 75")
    assert host.run("id1")[0] == 75
    assert host.run("id1")[0] == 75
    assert len(host.starts()) == 1
    host.trains("exit 0")
    assert host.run("id2")[0] == 0
    assert len(host.starts()) == 2


def test_a_training_outlives_its_connection_and_is_waited_for(host):
    os.mkfifo(host.home / "go")
    host.trains(f"read line <{host.home}/go; exit 75")
    with host.start("run", "id1") as first:
        with (host.home / "go").open("w") as go:  # waits until the training reads
            os.killpg(first.pid, signal.SIGHUP)
            assert first.wait(timeout=60) == -signal.SIGHUP
            with host.start("run", "id2") as second:
                with pytest.raises(subprocess.TimeoutExpired):
                    second.wait(timeout=0.2)
                go.write("\n")
                go.close()
                assert second.wait(timeout=60) == 75
    assert len(host.starts()) == 1


def test_a_training_that_was_killed_with_its_shell_is_a_failure(host):
    host.trains("exit 0")
    assert host.run("id1")[0] == 0
    host.trains("kill -KILL $PPID")
    code, stderr = host.run("id2")
    assert code == 3
    assert "exit code 137" in stderr
