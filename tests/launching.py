"""Starts `launch/pretrain.py` as people do, on a network that compiles in seconds."""

import json
import os
import pathlib
import subprocess
import sys
import time

from personmae_jax.synthetic import pedestrian

ROOT = pathlib.Path(__file__).parents[1]
# One block of width 16 on a 4 x 2 grid; most of a start is importing and tracing.
TINY = (
    *("--config.encoder.width=16", "--config.encoder.depth=1"),
    "--config.encoder.num_heads=2",
    *("--config.encoder.patch_size=8", "--config.feature_predictor.depth=1"),
    *("--config.pixel_predictor.width=16", "--config.pixel_predictor.depth=1"),
    "--config.pixel_predictor.memory_blocks=(-1,)",
    "--config.feature_predictor.memory_blocks=(-1,)",
    *("--config.data.height=32", "--config.data.width=16"),
    "--config.train.batch_size=8",
    "--config.eval.every_steps=0",
)


def environment(extra: dict[str, str]) -> dict[str, str]:
    """What a user has: no torch, no shortcuts when compiling but those in `extra`."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return inherited | {"PYTHONPATH": str(ROOT / "tests" / "without_torch")} | extra


def command(workdir, *overrides: str, config: str = "quickstart") -> list[str]:
    return [
        sys.executable,
        "launch/pretrain.py",
        f"--config=configs/{config}.py",
        f"--workdir={workdir}",
        *overrides,
    ]


def pretrain(
    workdir, *overrides: str, config: str = "quickstart", env: dict | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, *overrides, config=config),
        cwd=ROOT,
        env=environment(env or {"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(workdir, *overrides: str, env: dict) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, *overrides),
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(workdir) -> list[dict]:
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.exists():
        return []
    whole = file.read_text().rpartition("\n")[0]  # the last line may be torn
    return [json.loads(line) for line in whole.splitlines()]


def wait_for_step(process: subprocess.Popen, workdir, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in rows(workdir)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_refused(process: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, and nothing on stderr but sentences that hold these words."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr


def make_folder(folder: pathlib.Path, num_good: int, num_bad: int) -> None:
    folder.mkdir()
    for i in range(num_good):
        (folder / f"{i}.jpg").write_bytes(pedestrian.encode_pedestrian(0, i, 0, 0))
    for i in range(num_bad):
        (folder / f"bad{i}.jpg").write_bytes(b"no picture")
