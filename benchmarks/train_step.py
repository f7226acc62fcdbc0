"""Images/s of the bare train step here, beside the same step in plain PyTorch.

Command: python benchmarks/train_step.py --config=configs/quickstart.py
In one run and in turn; prints medians, and their ratio where torch is installed.
"""

import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path

from personmae_jax.config import Config

_CONFIG = command_line.define_config(Config)
_ROUNDS, _STEPS = 8, 3  # a first round of each does not count


def main() -> None:
    import jax

    from personmae_jax import sharding
    from personmae_jax.preflight import estimate
    from personmae_jax.pretrain import program as programs

    cfg = _CONFIG()
    program = programs.build(cfg, sharding.make_mesh(cfg.mesh), cfg.train.steps or 1000)
    rows = estimate.noise(program)
    batch = sharding.to_devices(rows, program.mesh)
    state = program.init_state()

    def jax_step() -> None:
        nonlocal state
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)

    steps: dict[str, Callable[[], object]] = {"personmae_jax": jax_step}
    if importlib.util.find_spec("torch"):
        import torch_step

        in_torch = torch_step.make_step(cfg)
        steps["PyTorch"] = lambda: in_torch(rows)
    seconds = {name: [] for name in steps}
    for number in range(_ROUNDS + 1):
        for name, step in steps.items():
            for _ in range(_STEPS):
                start = time.perf_counter()
                step()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    rates = {n: cfg.train.batch_size / statistics.median(s) for n, s in seconds.items()}
    devices = f"{program.mesh.size} {jax.devices()[0].device_kind}"
    for name, rate in rates.items():
        print(f"{name}: {rate:,.1f} images/s, {cfg.train.batch_size} a step, {devices}")
    if len(rates) == 2:
        ours, theirs = rates.values()
        print(f"ratio: {ours / theirs:.2f}")


if __name__ == "__main__":
    command_line.run(main)
