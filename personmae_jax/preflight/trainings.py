"""The run of any kind of training, put together without its data."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.config_check import check
from personmae_jax.config_finetune import FinetuneConfig, check_finetuning
from personmae_jax.config_unsupervised import UnsupervisedConfig, check_unsupervised
from personmae_jax.data.records import SyntheticRecords
from personmae_jax.engine.program import Program
from personmae_jax.finetune import program as finetuning
from personmae_jax.pretrain import program as pretraining
from personmae_jax.reid.datasets import open_people
from personmae_jax.unsupervised import program as unsupervised
from personmae_jax.unsupervised.step import UnsupervisedState

Settings = Config | FinetuneConfig | UnsupervisedConfig

_LUPERSON = 4_180_243  # images; Fu et al., arXiv 2012.03753
# To train on in Market-1501; Zheng et al., ICCV 2015.
_IMAGES, _IDENTITIES, _CAMERAS = 12_936, 751, 6


def assume(cfg: Settings, num_records: int | None) -> tuple[int, str]:
    """Returns how many images there are to train on, and a sentence on the data."""
    name, default = "Market-1501", _IMAGES
    if isinstance(cfg, Config):
        name, default = "LUPerson", _LUPERSON
    if num_records is not None:
        return num_records, f"a data set of {num_records:,} images"
    if _place(cfg) == "synthetic":
        if isinstance(cfg, Config):
            count = len(SyntheticRecords(cfg.data.synthetic))
        else:
            count = len(open_people(cfg.data, is_scored=False).train)
        return count, f"{count:,} synthetic images"
    return default, f"{default:,} images, as {name} has (else: --num_records)"


def build(cfg: Settings, devices: list[Any], num_records: int) -> Program[Any]:
    """Assembles the run of settings on devices; compiles nothing.

    Fine-tuning has as many identities and cameras as Market-1501 has.

    Raises:
      ConfigError: The settings do not fit together, or not the devices.
    """
    # Named, or the check would ask for it; synthetic images are of no folder.
    path = cfg.data.path or ("DIR" if _place(cfg) != "synthetic" else None)
    data = dataclasses.replace(cfg.data, path=path)
    named = dataclasses.replace(cfg, data=data)
    if isinstance(named, Config):
        check(named, len(devices))
        num_steps = pretraining.count_steps(named, num_records)
        return pretraining.build(named, _mesh(named, devices), num_steps)
    if isinstance(named, UnsupervisedConfig):
        check_unsupervised(named, len(devices))
        mesh = _mesh(named, devices)
        return unsupervised.build(named, mesh, num_images=num_records)
    check_finetuning(named, len(devices))
    return finetuning.build(
        *(named, _mesh(named, devices)),
        num_images=num_records,
        num_identities=_IDENTITIES,
        num_cameras=_CAMERAS,
    )


def _place(cfg: Settings) -> str:
    return cfg.data.source if isinstance(cfg, Config) else cfg.data.layout


def _mesh(cfg: Settings, devices: list[Any]) -> jax.sharding.Mesh:
    return sharding.make_mesh(cfg.mesh, devices)


def initial_state(program: Program[Any]) -> Any:
    """Makes the initial state, which can be trained on.

    The memory of training without labels has a row for each cluster of a batch, as if
    there had been a first round: without any its loss is not finite.
    """
    state = program.init_state()
    if not isinstance(state, UnsupervisedState):
        return state
    used = jax.device_put(
        np.int32(program.cfg.sampling.clusters), sharding.replicated(program.mesh)
    )
    return dataclasses.replace(state, memory=state.memory._replace(num_rows=used))


def batch_setting(cfg: Settings) -> str:
    """Names the setting that makes batches smaller."""
    if isinstance(cfg, Config):
        return "train.batch_size"
    is_labelled = isinstance(cfg, FinetuneConfig)
    return "sampling.identities" if is_labelled else "sampling.clusters"


def batch_unit(cfg: Settings, num_devices: int) -> int:
    """Returns what the images of a smaller batch are a multiple of."""
    if isinstance(cfg, Config):
        return num_devices * cfg.train.accumulate
    return math.lcm(num_devices, 2 * cfg.sampling.images)  # of two people or more


def with_batch_size(cfg: Settings, batch_size: int) -> Settings:
    """Returns the settings with so many images a step, a multiple of `batch_unit`."""
    section, name = batch_setting(cfg).split(".")
    if not isinstance(cfg, Config):
        batch_size //= cfg.sampling.images
    smaller = dataclasses.replace(getattr(cfg, section), **{name: batch_size})
    return dataclasses.replace(cfg, **{section: smaller})
