"""The command that people type: exit codes, sentences, and what killing it leaves."""

import os
import pathlib
import pty
import random
import signal
import subprocess
import sys
import time

import pytest
from image_files import members, write_folder, write_lmdb, write_zip
from job_test import shards_of

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "launch/prepare_data.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run(*arguments, **options) -> tuple[int, str, str]:
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    return write_folder(tmp_path_factory.mktemp("source") / "a", members(1000))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    code, _, err = run("--source", source, "--out", out, "--processes=1")
    assert (code, err) == (0, "")
    return out


def processes_of(session: int) -> list[int]:
    """Every live process of a session."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def wait_until(is_true) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(source, whole, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    for number in range(3):
        with start("--source", source, "--out", out, "--processes=2") as process:
            wanted = 2 * number + 1
            wait_until(
                lambda wanted=wanted, process=process: (
                    len([*out.glob("persons-*-of-?????")]) >= wanted
                    or process.poll() is not None
                )
            )
            time.sleep(rng.random() / 20)
            process.kill()
            process.communicate()
        # No worker goes on writing once its parent is dead.
        wait_until(lambda pid=process.pid: not processes_of(pid))
    code, _, err = run("--source", source, "--out", out)
    assert (code, err) == (0, "")
    assert shards_of(out) == shards_of(whole)
    assert not [*out.glob("*.part")]


@pytest.mark.parametrize(
    ("number", "is_group"), [(signal.SIGTERM, False), (signal.SIGINT, True)]
)
def test_a_signal_leaves_with_75_and_the_next_start_goes_on(
    source, whole, tmp_path, number, is_group
):
    out = tmp_path / "out"
    with start("--source", source, "--out", out) as process:
        wait_until(lambda: len([*out.glob("persons-*-of-?????")]) >= 1)
        (os.killpg if is_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (75, 0)  # 0: it was quicker
    if process.returncode == 75:
        assert "start again with the same command" in err
        assert "Traceback" not in err
    wait_until(lambda: not processes_of(process.pid))
    assert run("--source", source, "--out", out)[0] == 0
    assert shards_of(out) == shards_of(whole)


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv = sys.argv[1:]
sys.path.insert(0, "launch")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(source, whole, tmp_path):
    out, script = tmp_path / "out", tmp_path / "full.py"
    script.write_text(FULL)
    words = ["launch/prepare_data.py", "--source", source, "--out", out]
    done = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "fix the cause and start again with the same command" in done.stderr
    assert not [*out.glob("*.part")]
    assert run("--source", source, "--out", out)[0] == 0
    assert shards_of(out) == shards_of(whole)


def test_a_second_start_beside_the_first_is_refused(source, tmp_path):
    out = tmp_path / "out"
    with start("--source", source, "--out", out) as first:
        wait_until(lambda: (out / "lock").exists() and (out / "plan.json").exists())
        code, _, err = run("--source", source, "--out", out)
        first.communicate(timeout=60)
    if code:  # else the first had finished
        assert code == 2
        assert f"--out={out} is in use by process {first.pid}" in err


def test_check_tells_good_from_damaged(whole, tmp_path):
    code, _, err = run("--check", whole, "--min-side=9")
    assert (code, err.count("leave out --min-side")) == (2, 1)
    code, out, _ = run("--check", whole)
    assert code == 0
    assert "are as they were written" in out
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    file = copy / "persons-train.array_record-00003-of-00008"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, err = run("--check", copy)
    assert code == 1
    assert f"{file.name}: damaged records" in out
    assert "1 of 8 shards are damaged" in err


def test_a_damaged_database_that_kills_its_reader_is_one_sentence(tmp_path):
    path = write_lmdb(tmp_path / "lmdb", members(2000))
    with open(path / "data.mdb", "r+b") as file:
        file.truncate(16384)
    code, _, err = run("--source", path, "--out", tmp_path / "out")
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --source PATH... and --out DIR"),
        (["--source", "/nowhere", "--out", "o"], "--source=/nowhere: there is nothing"),
        (["--source", "/", "--out", "o", "--processes=0"], "processes"),
        (["x.zip", "--out", "o"], "'x.zip' is no flag"),
        (["--source", "tests", "--out", "tests/o"], "--out=tests/o lies in tests"),
    ],
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_help_shows_an_example():
    code, out, _ = run("--help")
    assert code == 0
    assert "python launch/prepare_data.py --source LUPerson/lmdb --out" in out
    assert "--keep-list" in out


def test_several_sources_may_follow_one_flag(tmp_path):
    content = members(20)
    for number in range(4):
        part = dict([*content.items()][number * 5 : number * 5 + 5])
        write_zip(tmp_path / f"{number}.zip", part)
    zips = sorted(tmp_path.glob("*.zip"))
    code, out, err = run("--source", *zips, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "stored: 20" in out
    assert "image 20/20" in out


def test_on_a_terminal_there_is_a_bar(source, tmp_path):
    leader, follower = pty.openpty()
    words = ["launch/prepare_data.py", "--source", source, "--out", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65536)
            except OSError:
                break
    os.close(leader)
    assert process.returncode == 0
    assert b"image 1000/1000" in shown
    assert b"left" in shown
