"""Training without labels: the loop within a round against its bare step.

As benchmarks/loop.py; the first pseudo labels are made before, and none anew.

Run: python benchmarks/adapt_loop.py --config=configs/usl_quickstart.py
  --config.init.workdir=runs/quickstart
"""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path

from personmae_jax.config_unsupervised import UnsupervisedConfig

_CONFIG = command_line.define_config(
    UnsupervisedConfig, example="configs/usl_quickstart.py"
)
_STEPS = 40


def main() -> None:
    import loop_timing

    from personmae_jax.engine import distributed, loop
    from personmae_jax.reid import init
    from personmae_jax.unsupervised.data import open_target
    from personmae_jax.unsupervised.run import make_training

    cfg = _CONFIG()
    cfg.train.rounds, cfg.train.steps_per_round = 2, 10 * _STEPS
    cfg.eval.every_rounds = 0
    with tempfile.TemporaryDirectory() as folder:
        init.settle(cfg, folder)
        distributed.initialize()
        training = make_training(cfg, folder, *open_target(cfg))
        loop_timing.compare(
            training, loop.initial_state(training), steps=_STEPS, pieces=7
        )


if __name__ == "__main__":
    command_line.run(main)
