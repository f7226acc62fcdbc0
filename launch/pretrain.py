"""Pretrains PersonMAE.

Example: python launch/pretrain.py --config=configs/quickstart.py
  --workdir=runs/short --config.train.steps=100

Start it again with the same command to resume. Exit codes: 0 finished, 1 failed,
2 wrong settings, 75 interrupted and saved.
"""

import command_line

from personmae_jax.config import Config

_CONFIG = command_line.define_config(Config)
_CLUSTER = command_line.define_cluster()
_WORKDIR = command_line.define_workdir()


def main() -> int:
    cfg = _CONFIG()
    # Wrong settings are said before jax is even imported.
    from personmae_jax.config_check import check
    from personmae_jax.data.records import open_records

    check(cfg)
    if cfg.data.source == "folder":
        command_line.refuse_inside("--workdir", _WORKDIR(), cfg.data.path)
        # Scores are of people that the run does not see.
        command_line.refuse_inside("--config.eval.path", cfg.eval.path, cfg.data.path)
    if cfg.eval.layout == "id_folders":
        command_line.refuse_inside("--workdir", _WORKDIR(), cfg.eval.path)
    records = open_records(cfg.data)

    from personmae_jax.engine import distributed
    from personmae_jax.pretrain.run import run

    distributed.initialize(**_CLUSTER())
    return run(cfg, _WORKDIR(), records)


if __name__ == "__main__":
    command_line.run(main)
