"""Images/s of the bare train step on this machine, the batch already on the device.

Command: python benchmarks/train_step.py --config=configs/quickstart.py
Prints the median of 20 steps after 3 that do not count.
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path

_CONFIG = command_line.define_config()
_NUM_WARM, _NUM_TIMED = 3, 20


def main() -> None:
    import jax
    import numpy as np

    from personmae_jax import experiment as experiments
    from personmae_jax import sharding

    cfg = _CONFIG()
    experiment = experiments.build(cfg, sharding.make_mesh(), cfg.train.steps or 1000)
    rng = np.random.default_rng(0)
    shapes = experiment.abstract_batch
    rows = {
        name: rng.integers(0, 256, shapes[name].shape).astype(np.uint8)
        for name in ("region_a", "region_b")
    }
    patches = np.tile(np.arange(cfg.num_patches), (cfg.train.batch_size, 1))
    visible = rng.permuted(patches, axis=1)[:, cfg.num_hidden :]
    rows["visible"] = np.sort(visible, axis=1).astype(np.int32)
    rows["geometry"] = np.tile(np.float32([0.3, 0.2, 1.1, 0.9]), (len(visible), 1))
    batch = sharding.to_devices(rows, experiment.mesh)
    state, seconds = experiment.init_state(), []
    for _ in range(_NUM_WARM + _NUM_TIMED):
        start = time.perf_counter()
        state, metrics = experiment.train_step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[_NUM_WARM:])
    print(
        f"{cfg.train.batch_size / median:,.1f} images/s "
        f"({median * 1e3:,.1f} ms a step of {cfg.train.batch_size} images, "
        f"{experiment.mesh.size} {jax.devices()[0].device_kind})"
    )


if __name__ == "__main__":
    command_line.run(main)
