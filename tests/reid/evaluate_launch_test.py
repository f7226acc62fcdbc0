"""Promises of the command: what it prints, writes and answers, on one host or two."""

import contextlib
import json
import pathlib
import re
import subprocess
import sys

import pytest
from distributed_test import free_port
from exported import make_run, small_config, trained_like
from launching import ROOT, assert_refused, environment

from personmae_jax.synthetic import pedestrian


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A run, and eight people in two cameras."""
    folder, cfg = tmp_path_factory.mktemp("evaluate"), small_config()
    encoder = trained_like(cfg.encoder)
    make_run(folder / "run", cfg, {0: (encoder, encoder)})
    for who in range(8):
        (folder / "data" / f"{who:03}").mkdir(parents=True)
        for camera in (1, 2):
            image = pedestrian.encode_pedestrian(0, who, camera, 0)
            (folder / "data" / f"{who:03}" / f"{camera:02}_0.jpg").write_bytes(image)
    return [
        *("--workdir", str(folder / "run")),
        *("--dataset", "id_folders", "--data", str(folder / "data")),
        *("--query-camera", "2", "--feature", "cls+mean", "--flip", "--rerank"),
    ]


def start(*arguments: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "launch/evaluate.py", *arguments],
        cwd=ROOT,
        env=environment({"JAX_PLATFORMS": "cpu"} | extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess([], process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def alone(
    arguments, tmp_path_factory
) -> tuple[subprocess.CompletedProcess, pathlib.Path]:
    out = tmp_path_factory.mktemp("alone")
    return finish(start(*arguments, "--out", str(out), "--json")), out


def test_the_command_prints_a_table_and_json_and_writes_them(alone):
    process, out = alone
    assert process.returncode == 0, process.stderr
    first, head, _, last = process.stdout.splitlines()
    assert "at step 0: ViT 32/3/4 on 32 x 16 pixels; 8 queries and 8 gallery" in first
    assert head.split()[0] == "mAP"
    scores = json.loads(last)
    assert scores["queries"] == 8
    assert json.loads((out / "retrieval.json").read_text()) == scores
    assert (out / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert not process.stderr


@pytest.mark.slow
def test_wrong_arguments_are_refused_in_one_line(arguments):
    wrong = {
        "--weights=pupil": "student|teacher",
        "--feature=tokens": "cls|mean|stripes|cls+mean",
        "--step=7": "no whole checkpoint of step 7",
        "--out=/dev/null/x": "cannot be written",
    }
    processes = {flag: start(*arguments, flag) for flag in wrong}
    for flag, process in processes.items():
        done = finish(process)
        assert_refused(done, wrong[flag])
        assert len(done.stderr.strip().splitlines()) == 1, flag


@pytest.mark.slow
def test_two_processes_score_as_one(alone, arguments, tmp_path):
    cluster = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    gloo = {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = [
        start(
            *(*arguments, *cluster, f"--process_id={i}", "--json"),
            *("--out", str(tmp_path / str(i)), "--save-features"),
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            **gloo,
        )
        for i in range(2)
    ]
    try:
        done = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    expected = alone[0].stdout.splitlines()[-1]
    assert done[0].stdout.splitlines()[-1] == expected
    # Gloo's threads print across one another's lines.
    gloo = re.compile("Gloo|peer ranks")
    told = [line for line in done[1].stdout.splitlines() if not gloo.search(line)]
    assert not "".join(told).strip()  # one speaks and writes
    assert not (tmp_path / "1").exists()
    assert (tmp_path / "0" / "features.npz").exists()
