"""One real step on an NVIDIA GPU, where there is one."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# Prints platform and losses of two steps on one batch.
TWO_STEPS = """
import jax
from tiny import tiny_batch, tiny_config
from personmae_jax import sharding
from personmae_jax.pretrain import program

cfg = tiny_config()
mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
built = program.build(cfg, mesh, cfg.train.steps)
state, batch = built.init_state(), sharding.to_devices(tiny_batch(cfg), mesh)
print(jax.devices()[0].platform)
for _ in range(2):
    state, metrics = built.train_step(state, batch)
    print(float(metrics["loss"]))
"""


def two_steps(platform: str) -> tuple[str, list[float]]:
    tests = pathlib.Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-c", TWO_STEPS],
        env={
            **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            "JAX_PLATFORMS": platform,
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    name, *losses = process.stdout.split()
    return name, [float(loss) for loss in losses]


def test_a_step_on_the_gpu_agrees_with_one_on_the_cpu():
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA GPU here: there is no nvidia-smi")
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        pytest.skip("jax has no CUDA here: pip install -r requirements-cuda.txt")
    name, losses = two_steps("cuda")
    assert name == "gpu"
    # bfloat16 there, float32 here.
    assert losses == pytest.approx(two_steps("cpu")[1], rel=1e-2)
