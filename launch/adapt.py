"""Trains an encoder on images without labels: USL, and UDA from a fine-tuned run.

Example: python launch/adapt.py --config=configs/usl_market1501.py
  --config.init.workdir=runs/vitb --config.data.path=Market-1501 --workdir=runs/usl

Start it again with the same command to resume. Exit codes: 0 finished, 1 failed,
2 wrong settings, 75 interrupted and saved.
"""

import command_line

from personmae_jax.config_unsupervised import UnsupervisedConfig, check_unsupervised

_CONFIG = command_line.define_config(
    UnsupervisedConfig, example="configs/usl_market1501.py"
)
_CLUSTER = command_line.define_cluster()
_WORKDIR = command_line.define_workdir()


def main() -> int:
    cfg, workdir = _CONFIG(), _WORKDIR()
    from personmae_jax.reid import datasets, init

    init.settle(cfg, workdir)
    check_unsupervised(cfg)
    if cfg.data.layout in ("id_folders", "images"):
        command_line.refuse_inside("--workdir", workdir, cfg.data.path)
    if cfg.eval.layout == "id_folders":
        command_line.refuse_inside("--workdir", workdir, cfg.eval.path)
    from personmae_jax.unsupervised import data

    scored = None
    if cfg.eval.every_rounds:
        scored = datasets.open_scored(cfg.eval.layout, cfg.eval.path)
    target, people = data.open_target(cfg)  # reads every image once

    from personmae_jax.engine import distributed, loop
    from personmae_jax.unsupervised.run import make_training

    distributed.initialize(**_CLUSTER())
    return loop.run(make_training(cfg, workdir, target, people, scored), workdir)


if __name__ == "__main__":
    command_line.run(main)
