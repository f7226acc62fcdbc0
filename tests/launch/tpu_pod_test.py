"""What tpu_pod.sh asks of gcloud, and on what it starts again."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from fake_gcloud import PREEMPTED, PREEMPTED_UNSEEN

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_pod.sh"
WORDS = ("--config=configs/vitb.py", "--workdir=gs://b/run", "--config.data.path=a b'c")


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Pod:
    """tpu_pod.sh with a gcloud that records and plays."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        fake = pathlib.Path(__file__).with_name("fake_gcloud.py")
        executable(
            folder / "bin" / "gcloud",
            f'#!/bin/sh\nexec {sys.executable} -IS {fake} "$@"\n',
        )
        self.fate = {"queued": "ACTIVE", "node": "READY", "lists": [], "quota": False}

    def __call__(self, *words: str, runs=(), **environment: str):
        fate = self.fate | {"runs": list(runs)}
        (self.folder / "fate.json").write_text(json.dumps(fate))
        (self.folder / "calls.jsonl").write_text("")
        return subprocess.run(
            [SCRIPT, *words],
            env={
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "FAKE_GCLOUD": str(self.folder),
                "POD_ZONE": "us-west4-a",
                "POD_TYPE": "v5litepod-16",
                "POD_DATA": "gs://b/data",
                "POD_POLL": "0",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """The words of all calls of gcloud, after `compute tpus`."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [json.loads(line)[2:] for line in lines]

    def deeds(self) -> list[str]:
        """What the calls changed, in short."""
        return [deed(call) for call in self.calls() if call[1] != "list"]


def deed(call: list[str]) -> str:
    if call[1] != "ssh":
        return call[1]
    command = next(word for word in call if word.startswith("--command="))
    return "unpack" if "tar" in command else command.split()[1]


@pytest.fixture
def pod(tmp_path) -> Pod:
    return Pod(tmp_path)


AGAIN = ["delete", "create", "scp", "unpack", "setup", "run"]


def test_create_requests_spot_capacity_and_waits(pod):
    pod.fate["queued"] = ""
    process = pod("create")
    assert process.returncode == 0, process.stderr
    create, *looks = (c for c in pod.calls() if c[:2] != ["queued-resources", "list"])
    assert create == [
        *("queued-resources", "create", "personmae", "--node-id=personmae"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
        *("--spot", "--zone=us-west4-a", "--quiet"),
    ]
    assert [look[:2] for look in looks] == [["tpu-vm", "list"]]
    assert "WAITING" in process.stderr
    assert "READY" in process.stderr


def test_create_takes_what_is_there(pod):
    assert pod("create").returncode == 0
    assert pod.deeds() == []


def test_create_stops_and_says_so_without_quota(pod):
    pod.fate |= {"queued": "", "quota": True}
    process = pod("create")
    assert process.returncode == 1
    assert "Quota" in process.stderr
    assert "error: the slice cannot be requested" in process.stderr


def test_other_capacity_is_a_setting(pod):
    pod.fate["queued"] = ""
    pod("create", POD_CREATE_FLAGS="--reserved --network=mine", POD_TYPE="v6e-8")
    create = next(call for call in pod.calls() if call[1] == "create")
    assert {"--reserved", "--network=mine", "--runtime-version=v2-alpha-tpuv6e"} <= {
        *create
    }
    assert "--spot" not in create


def test_setup_brings_this_commit_packages_and_data_to_all_hosts(pod):
    process = pod("setup")
    assert process.returncode == 0, process.stderr
    assert pod.deeds() == ["scp", "unpack", "setup"]
    assert all("--worker=all" in call for call in pod.calls())
    assert f"archive --format=tar.gz --output={pod.calls()[0][2]}" in process.stdout
    assert (
        "--command=personmae/code/launch/tpu_worker.sh setup gs://b/data"
        in pod.calls()[-1]
    )


def test_run_gives_the_hosts_the_words_that_it_got(pod):
    assert pod("run", *WORDS, runs=[0]).returncode == 0
    command = next(w for w in pod.calls()[-1] if w.startswith("--command="))
    worker, verb, _, *words = shlex.split(command.removeprefix("--command="))
    assert (worker, verb) == ("personmae/code/launch/tpu_worker.sh", "run")
    assert tuple(words) == WORDS


def run_ids(pod: Pod) -> list[str]:
    commands = [word for call in pod.calls() for word in call if " run " in word]
    return [command.split()[2] for command in commands]


@pytest.mark.parametrize(
    ("runs", "deeds"),
    [
        ([0], ["run"]),
        ([75, 75, 0], ["run", "run", "run"]),
        ([PREEMPTED, 0], ["run", *AGAIN]),
        ([PREEMPTED_UNSEEN, 75, 0], ["run", *AGAIN, "run"]),
        ([PREEMPTED, PREEMPTED, 0], ["run", *AGAIN, *AGAIN]),
    ],
    ids=str,
)
def test_run_goes_on_after_75_and_preemption_until_finished(pod, runs, deeds):
    process = pod("run", *WORDS, runs=runs)
    assert process.returncode == 0, process.stderr
    assert pod.deeds() == deeds
    assert len(set(run_ids(pod))) == len(runs)
    assert "finished" in process.stderr


@pytest.mark.parametrize(
    ("code", "words"), [(3, "pretrain.py failed"), (127, "not set up")]
)
def test_run_stops_and_says_so_on_any_other_exit_code(pod, code, words):
    process = pod("run", *WORDS, runs=[code])
    assert process.returncode == 1
    assert pod.deeds() == ["run"]
    assert words in process.stderr.splitlines()[-1]


def test_run_watches_the_same_training_after_a_lost_connection(pod):
    assert pod("run", *WORDS, runs=[255, 1, 0]).returncode == 0
    assert pod.deeds() == ["run"] * 3
    assert len(set(run_ids(pod))) == 1


def test_run_gives_up_on_hosts_that_it_cannot_reach(pod):
    process = pod("run", *WORDS, runs=[255] * 9)
    assert process.returncode == 1
    assert len(run_ids(pod)) == 5
    assert "cannot be reached" in process.stderr


@pytest.mark.parametrize(
    ("queued", "words"), [("", "there is no slice"), ("FAILED", "request has failed")]
)
def test_run_requests_no_slice_that_nobody_asked_for(pod, queued, words):
    pod.fate["queued"] = queued
    process = pod("run", *WORDS)
    assert process.returncode == 1
    assert words in process.stderr
    assert pod.deeds() == []


def test_a_preempted_slice_is_gone_before_run_even_starts(pod):
    pod.fate["node"] = "PREEMPTED"
    assert pod("run", *WORDS, runs=[0]).returncode == 0
    assert pod.deeds() == AGAIN


def test_a_slice_that_cannot_be_requested_again_stops_the_run(pod):
    pod.fate["quota"] = True
    process = pod("run", *WORDS, runs=[PREEMPTED])
    assert process.returncode == 1
    assert pod.deeds() == ["run", "delete", "create"]
    assert "cannot be requested" in process.stderr


def test_status_logs_and_delete(pod):
    assert "ACTIVE" in pod("status").stdout
    pod("logs", "3")
    assert "--worker=3" in pod.calls()[0]
    assert "--command=tail -n 100 -F personmae/train.log" in pod.calls()[0]
    pod("delete")
    assert pod.calls()[0][:4] == ["queued-resources", "delete", "personmae", "--force"]


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (["run", "--workdir=/tmp/x"], {}, "gs://"),
        (["creat"], {}, "none of create"),
        ([], {}, "none of create"),
        (["create"], {"POD_ZONE": ""}, "POD_ZONE"),
        (["create"], {"POD_TYPE": ""}, "POD_TYPE"),
    ],
)
def test_wrong_words_are_refused_in_one_line(pod, words, environment, sentence):
    process = pod(*words, **environment)
    assert process.returncode == 2
    assert pod.calls() == []
    assert sentence in process.stderr
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "status", "delete"])
def test_dry_run_shows_every_command_and_executes_none(pod, verb):
    words = WORDS if verb == "run" else ()
    process = pod("--dry-run", verb, *words)
    assert process.returncode == 0, process.stderr
    assert pod.calls() == []
    shown = [
        shlex.split(line[2:]) for line in process.stdout.splitlines() if "+" in line
    ]
    assert shown
    if verb == "run":
        assert [deed(c[3:]) for c in shown if c[0] == "gcloud" and c[4] != "list"] == [
            "run",
            *AGAIN[:-1],
        ]
