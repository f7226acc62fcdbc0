"""The train loop against its bare step, with real batches: who waits for whom?

Prints the images/s of both, and the host's time a step beside dispatching it.

Run: python benchmarks/loop.py --config=configs/vitb.py --config.train.batch_size=8
  --config.data.source=folder --config.data.path=IMAGES
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path

from personmae_jax.config import Config

_CONFIG = command_line.define_config(Config)
_STEPS = 10


def main() -> None:
    import loop_timing

    from personmae_jax import sharding
    from personmae_jax.data.records import open_records
    from personmae_jax.pretrain.program import build
    from personmae_jax.pretrain.run import make_training

    cfg = _CONFIG()
    program = build(cfg, sharding.make_mesh(cfg.mesh), 1000 * _STEPS)
    training = make_training(cfg, program, open_records(cfg.data))
    loop_timing.compare(training, program.init_state(), steps=_STEPS, pieces=3)


if __name__ == "__main__":
    command_line.run(main)
