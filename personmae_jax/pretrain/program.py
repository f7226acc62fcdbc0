"""What pretraining computes, assembled from its settings; run and tools share it."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, PyTree, UInt8

from personmae_jax import optim, pixels, sharding
from personmae_jax.config import Config
from personmae_jax.engine.program import Batch, Program, assemble
from personmae_jax.errors import ConfigError
from personmae_jax.pixels import unpatchify
from personmae_jax.pretrain import losses
from personmae_jax.pretrain.state import TrainState, create_state
from personmae_jax.pretrain.train_step import make_train_step, predict_region_b
from personmae_jax.sharding import matmul_dtype


def build(cfg: Config, mesh: jax.sharding.Mesh, num_steps: int) -> Program[Config]:
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
    learning_rate = optim.learning_rate_schedule(cfg.optim, cfg.train, num_steps)
    tx = optim.make_optimizer(cfg.optim, learning_rate)

    def init(encoder: PyTree | None) -> TrainState:
        return create_state(cfg, tx, jax.random.key(cfg.train.seed), encoder)

    return assemble(
        *(cfg, mesh),
        num_steps=num_steps,
        batch_size=cfg.train.batch_size,
        init=init,
        step=make_train_step(
            cfg,
            tx,
            learning_rate=learning_rate,
            ema_decay=optim.ema_decay_schedule(cfg.teacher, num_steps),
            feature_weight=optim.feature_weight_schedule(cfg.loss, num_steps),
            dtype=matmul_dtype(cfg.train.matmul_dtype, mesh),
            gather=sharding.gather(mesh),
        ),
        batch=batch_structure(cfg),
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


def make_reconstruct(
    cfg: Config, program: Program[Config]
) -> Callable[[PyTree, Batch], UInt8[Array, "b height width 3"]]:
    """Returns the jitted (params, batch) -> predicted RegionB in RGB, for pictures.

    Every device makes all rows.
    """
    dtype = matmul_dtype(cfg.train.matmul_dtype, program.mesh)

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

    replicated = sharding.replicated(program.mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    return jax.jit(
        reconstruct, in_shardings=(where, replicated), out_shardings=replicated
    )
