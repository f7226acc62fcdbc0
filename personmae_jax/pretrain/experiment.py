"""Assembles a run from its settings and a mesh; loop, export and tools share it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree, UInt8

from personmae_jax import optim, pixels, sharding
from personmae_jax.config import Config
from personmae_jax.errors import ConfigError
from personmae_jax.pixels import unpatchify
from personmae_jax.pretrain import losses
from personmae_jax.pretrain.state import TrainState, create_state
from personmae_jax.pretrain.train_step import (
    Batch,
    Metrics,
    make_train_step,
    predict_region_b,
)
from personmae_jax.sharding import matmul_dtype, with_sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a run computes, nothing of which has touched data or files.

    Attributes:
      cfg: The settings.
      mesh: Over all devices of all hosts.
      num_steps: Length of the run.
      abstract_state: Shapes, dtypes and shardings of the state.
      abstract_batch: The same of the global batch.
      init_state: Makes the initial state where its sharding says it belongs; takes
        an encoder's parameters, on the devices, to start from instead of random ones.
      train_step: (state, batch) -> (state, metrics), compiled once; takes the
        state's memory over.
      reconstruct: (params, batch) -> predicted RegionB in RGB, for pictures; every
        device makes all rows.
    """

    cfg: Config
    mesh: Mesh
    num_steps: int
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init_state: Callable[..., TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    reconstruct: Callable[[PyTree, Batch], UInt8[Array, "b height width 3"]]


def build(cfg: Config, mesh: Mesh, num_steps: int) -> Experiment:
    """Assembles the run; compiles and allocates nothing.

    Args:
      cfg: Checked for the devices of the mesh.
      mesh: Over all devices of all hosts.
      num_steps: Length of the run.

    Raises:
      ConfigError: The teacher's schedule does not forget its initial weights in
        `num_steps`.
    """
    optim.check_teacher(cfg.teacher, num_steps)
    dtype = matmul_dtype(cfg.train.matmul_dtype, mesh)
    learning_rate = optim.learning_rate_schedule(cfg.optim, cfg.train, num_steps)
    tx = optim.make_optimizer(cfg.optim, learning_rate)

    def init(encoder: PyTree | None = None) -> TrainState:
        return create_state(cfg, tx, jax.random.key(cfg.train.seed), encoder)

    abstract_state = jax.eval_shape(init)
    state_sharding = sharding.state_sharding(mesh, abstract_state)
    batch_sharding = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    step = make_train_step(
        cfg,
        tx,
        learning_rate=learning_rate,
        ema_decay=optim.ema_decay_schedule(cfg.teacher, num_steps),
        feature_weight=optim.feature_weight_schedule(cfg.loss, num_steps),
        dtype=dtype,
        gather=sharding.gather(mesh),
    )

    def step_on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with sharding.mesh_context(mesh):
            return step(state, batch)

    return Experiment(
        cfg=cfg,
        mesh=mesh,
        num_steps=num_steps,
        abstract_state=jax.tree.map(with_sharding, abstract_state, state_sharding),
        abstract_batch={
            name: with_sharding(leaf, batch_sharding)
            for name, leaf in batch_structure(cfg).items()
        },
        init_state=jax.jit(init, out_shardings=state_sharding),
        train_step=jax.jit(
            step_on_mesh,
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, replicated),
            donate_argnums=0,
        ),
        reconstruct=jax.jit(
            _make_reconstruct(cfg, dtype),
            in_shardings=(state_sharding.params, replicated),
            out_shardings=replicated,
        ),
    )


def count_steps(cfg: Config, num_records: int) -> int:
    """Returns config.train.steps, or as many as its epochs take.

    Raises:
      ConfigError: The epochs are less than one batch.
    """
    if cfg.train.steps is not None:
        return cfg.train.steps
    steps = int(cfg.train.epochs * num_records / cfg.train.batch_size)
    if steps < 1:
        raise ConfigError(
            f"config.train.epochs={cfg.train.epochs} of {num_records} records are less "
            f"than one batch of {cfg.train.batch_size}; use a smaller "
            "--config.train.batch_size or set --config.train.steps"
        )
    return steps


def batch_structure(cfg: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what the device sees of a global batch."""
    b = cfg.train.batch_size
    image = (b, cfg.data.height, cfg.data.width, 3)
    return {
        "region_a": jax.ShapeDtypeStruct(image, np.uint8),
        "region_b": jax.ShapeDtypeStruct(image, np.uint8),
        "visible": jax.ShapeDtypeStruct((b, cfg.num_patches - cfg.num_hidden), "int32"),
        "geometry": jax.ShapeDtypeStruct((b, 4), "float32"),
    }


def _make_reconstruct(cfg: Config, dtype: DTypeLike):
    def reconstruct(params: PyTree, batch: Batch) -> Array:
        region_b = predict_region_b(cfg, params, batch, dtype)["pixels"]
        if cfg.loss.pixel_target == "normalised":
            # Shown with the true patch's mean and deviation, as MAE's demo does.
            patches = pixels.normalised_patches(
                batch["region_b"], cfg.encoder.patch_size, cfg.data.mean, cfg.data.std
            )
            patch_mean, patch_std = losses.patch_moments(patches)
            region_b = region_b * patch_std + patch_mean
        region_b = pixels.denormalise(region_b, cfg.data.mean, cfg.data.std)
        return unpatchify(region_b, cfg.grid, cfg.encoder.patch_size)

    return reconstruct
