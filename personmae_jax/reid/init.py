"""What an encoder starts from: a run, a PyTorch file, or nothing."""

import copy
import dataclasses

import numpy as np

from personmae_jax.config import ModelConfig
from personmae_jax.config_finetune import FinetuneConfig, PeopleConfig
from personmae_jax.engine.checkpoint import (
    describe,
    has_checkpoint,
    restore_encoder,
)
from personmae_jax.engine.training import Start
from personmae_jax.engine.workdir import read_num_steps, read_settings
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.pytorch import importer
from personmae_jax.pytorch.positions import resample_positions, say

_SOURCES, _OF_RUNS = {"workdir", "torch_weights"}, {"step", "weights"}  # of config.init


def settle(cfg: PeopleConfig, workdir: str | None) -> None:
    """Sets the encoder's architecture, mean and std to those of what it starts from.

    A run in `workdir` that would be resumed has them already; what it started from
    need no longer exist.

    Raises:
      ConfigError: The run or the file is not there, or is damaged.
    """
    if cfg.init.workdir is not None and cfg.init.torch_weights is not None:
        raise ConfigError(
            "config.init names both a run (workdir) and a file (torch_weights); "
            "the encoder starts from one of them"
        )
    default = type(cfg.init)()
    names = {f.name for f in dataclasses.fields(cfg.init)} - _SOURCES
    given = {n for n in names if getattr(cfg.init, n) != getattr(default, n)}
    if cfg.init.workdir is None and given & _OF_RUNS:
        raise _useless(given & _OF_RUNS, "workdir", "a run's")
    if cfg.init.torch_weights is None and given - _OF_RUNS:
        raise _useless(given - _OF_RUNS, "torch_weights", "a file's")
    if cfg.init.workdir is None and cfg.init.torch_weights is None:
        return
    if workdir is not None and has_checkpoint(workdir):
        _adopt(cfg, read_settings(workdir))
    elif cfg.init.workdir is not None:
        source = read_settings(cfg.init.workdir)
        _adopt(cfg, source)
        is_other = source.pos_embed_grid != cfg.grid
        cfg.encoder.pos_embed_grid = source.pos_embed_grid if is_other else None
    else:
        size = (cfg.data.height, cfg.data.width)
        _adopt(cfg, importer.settings_of_file(cfg.init, size))


def _useless(names: set[str], source: str, whose: str) -> ConfigError:
    return ConfigError(
        f"config.init.{min(names)} is {whose}: it goes with config.init.{source}, "
        "which is not given"
    )


def _adopt(cfg: PeopleConfig, source: ModelConfig) -> None:
    cfg.encoder = copy.deepcopy(source.encoder)
    cfg.data.mean, cfg.data.std = source.data.mean, source.data.std


def read_encoder(cfg: PeopleConfig) -> Start:
    """The parameters that the encoder starts from, and sentences on them.

    Returns:
      Numpy float32 arrays, None if they are to be random.

    Raises:
      ConfigError: The checkpoint or the file is missing or damaged.
    """
    if cfg.init.torch_weights is not None:
        return importer.read_encoder(cfg)
    if cfg.init.workdir is None:
        return None, ("Encoder from scratch: random weights.",)
    try:
        step, _ = describe(cfg.init.workdir, cfg.init.step)
        if step == 0 and cfg.init.step is None:
            raise ConfigError(
                f"the run in {cfg.init.workdir} has trained nothing yet: its one "
                "checkpoint is of step 0; give --config.init.step=0 to start from it"
            )
        params = restore_encoder(cfg.init.workdir, step, cfg.init.weights)
    except RunError as error:  # of the other run; no work of this one was done
        raise ConfigError(f"config.init.workdir: {error}") from error
    source = read_settings(cfg.init.workdir)
    last = read_num_steps(cfg.init.workdir)
    grid, own = source.grid, cfg.grid
    if "pos_embed" in params:
        table = np.asarray(params["pos_embed"])
        params = params | {"pos_embed": resample_positions(table, grid, own)}
    note = f"Encoder from {cfg.init.workdir}, {cfg.init.weights} at step {step:,}"
    if last is not None and step < last:
        note += f" of {last:,}; WARNING: it is not trained to its end"
    if grid != own:
        note += f"; its {say(grid)} positions are read at {say(own)}"
    if isinstance(source, FinetuneConfig) and source.head.use_cameras:
        note += "; WARNING: it was fine-tuned with camera embeddings, which stay behind"
    return params, (note + ".",)
