"""What pretraining computes, assembled from its settings; run and tools share it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree, UInt8

from personmae_jax import optim, pixels, sharding
from personmae_jax.config import Config
from personmae_jax.engine.program import Batch, Program, assemble
from personmae_jax.errors import ConfigError
from personmae_jax.models import personmae
from personmae_jax.pixels import unpatchify
from personmae_jax.pretrain import losses
from personmae_jax.pretrain.train_step import (
    TrainState,
    make_train_step,
    predict_region_b,
)
from personmae_jax.sharding import matmul_dtype


def build(cfg: Config, mesh: jax.sharding.Mesh, num_steps: int) -> Program[Config]:
    """Assembles the run of checked settings; compiles and allocates nothing.

    Raises:
      ConfigError: The teacher's schedule does not forget its initial weights in
        `num_steps`.
    """
    optim.check_teacher(cfg.teacher, num_steps)
    learning_rate = optim.learning_rate_schedule(cfg.optim, cfg.train, num_steps)
    tx = optim.make_optimizer(cfg.optim, learning_rate)
    b = cfg.train.batch_size
    image = (b, cfg.data.height, cfg.data.width, 3)
    return assemble(
        *(cfg, mesh),
        num_steps=num_steps,
        batch_size=b,
        init=functools.partial(_init_state, cfg, tx),
        step=make_train_step(cfg, tx, learning_rate, num_steps, mesh),
        batch={
            "region_a": jax.ShapeDtypeStruct(image, np.uint8),
            "region_b": jax.ShapeDtypeStruct(image, np.uint8),
            "visible": jax.ShapeDtypeStruct(
                (b, cfg.num_patches - cfg.num_hidden), np.int32
            ),
            "geometry": jax.ShapeDtypeStruct((b, 4), np.float32),
        },
    )


def _init_state(
    cfg: Config, tx: optax.GradientTransformation, encoder: PyTree | None = None
) -> TrainState:
    """The teacher starts as a copy of the student, whose encoder may be given."""
    params = personmae.init_params(
        *(cfg.encoder, cfg.predictors, cfg.grid, jax.random.key(cfg.train.seed)),
        has_cls_head=bool(cfg.loss.cls_weight),
    )
    if encoder is not None:
        # Copied, because a train step takes the state's memory over.
        params["encoder"] = jax.tree.map(jnp.copy, encoder)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        teacher_params=jax.tree.map(jnp.copy, params["encoder"]),
        opt_state=tx.init(params),
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
