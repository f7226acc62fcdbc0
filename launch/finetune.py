"""Fine-tunes an encoder on images of known people, and scores it by retrieval.

Example: python launch/finetune.py --config=configs/finetune_market1501.py
  --config.init.workdir=runs/vitb --config.data.path=Market-1501 --workdir=runs/market

Start it again with the same command to resume. Exit codes: 0 finished, 1 failed,
2 wrong settings, 75 interrupted and saved.
"""

import command_line

from personmae_jax.config_finetune import FinetuneConfig, check_finetuning

_CONFIG = command_line.define_config(
    FinetuneConfig, example="configs/finetune_market1501.py"
)
_CLUSTER = command_line.define_cluster()
_WORKDIR = command_line.define_workdir()


def main() -> int:
    cfg, workdir = _CONFIG(), _WORKDIR()
    from personmae_jax.finetune import sampling
    from personmae_jax.reid import datasets, init

    init.settle(cfg, workdir)
    check_finetuning(cfg)
    if cfg.data.layout in ("id_folders", "images"):
        command_line.refuse_inside("--workdir", workdir, cfg.data.path)
    if cfg.eval.layout == "id_folders":
        command_line.refuse_inside("--workdir", workdir, cfg.eval.path)
    dataset = sampling.open_training(cfg)
    scored = datasets.open_scored(cfg.eval.layout, cfg.eval.path)

    from personmae_jax.engine import distributed
    from personmae_jax.finetune.run import run

    distributed.initialize(**_CLUSTER())
    return run(cfg, workdir, dataset, scored)


if __name__ == "__main__":
    command_line.run(main)
