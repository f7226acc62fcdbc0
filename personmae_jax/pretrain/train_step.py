"""One optimizer step of PersonMAE, a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from personmae_jax import optim, pixels, sharding
from personmae_jax.config import Config
from personmae_jax.engine.program import Batch, Metrics
from personmae_jax.models import personmae
from personmae_jax.pixels import patchify
from personmae_jax.pretrain import losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """State before step `step`; no keys and no functions, those follow from config."""

    step: Int[Array, ""] | PyTree  # updates made
    # "encoder", "pixel_predictor" and, unless off, "feature_predictor" and "cls_head".
    params: dict[str, Any]
    teacher_params: dict[str, Any]  # moving average of `params["encoder"]`
    opt_state: PyTree


def predict_region_b(
    cfg: Config, params: PyTree, batch: Batch, dtype: DTypeLike
) -> dict[str, Float[Array, "b *n _"]]:
    """Predicts all of RegionB from RegionA's visible patches; see `personmae.predict`.

    Args:
      cfg: The settings.
      params: Of the whole network.
      batch: `region_a` (uint8, b height width 3), `visible` (int32, b v) and
        `geometry` (float32, b 4) of `data/pipeline.py`.
      dtype: Of matrix products and activations.
    """
    patches = patchify(batch["region_a"], cfg.encoder.patch_size)
    # Hidden patches are dropped before anything is computed of them: half the work.
    visible = jnp.take_along_axis(patches, batch["visible"][:, :, None], axis=1)
    encoded = personmae.encode(
        cfg.encoder,
        cfg.grid,
        params["encoder"],
        pixels.normalise(visible, cfg.data.mean, cfg.data.std),
        batch["visible"],
        dtype=dtype,
        remat=cfg.train.remat,
    )
    return personmae.predict(
        cfg.encoder,
        cfg.predictors,
        cfg.grid,
        params,
        encoded,
        batch["geometry"],
        dtype=dtype,
        remat=cfg.train.remat,
    )


def make_loss_fn(
    cfg: Config, dtype: DTypeLike, gather: Callable[[PyTree], PyTree] = lambda x: x
) -> Callable:
    """Returns loss(params, teacher_params, feature_weight, batch).

    `gather` makes parameters whole that are split over devices. The loss returns
    (scalar, metrics).
    """

    def loss_fn(params, teacher_params, feature_weight, batch: Batch):
        predicted = predict_region_b(cfg, gather(params), batch, dtype)
        patches_b = pixels.normalised_patches(
            batch["region_b"], cfg.encoder.patch_size, cfg.data.mean, cfg.data.std
        )
        pixel = losses.pixel_loss(
            predicted["pixels"],
            patches_b,
            cfg.loss.pixel_target,
            _pixel_weights(cfg, batch),
        )
        metrics = {"pixel_loss": pixel}
        total = cfg.loss.pixel_weight * pixel
        if "features" in predicted or "cls" in predicted:
            blocks = _teacher_blocks(cfg, gather(teacher_params), patches_b, dtype)
        if "cls" in predicted:
            cls = losses.feature_loss(predicted["cls"], losses.cls_target(blocks))
            metrics["cls_loss"] = cls
            total += cfg.loss.cls_weight * cls
        if "features" in predicted:
            target = losses.feature_target(blocks, cfg.loss.feature_instance_norm)
            feature = losses.feature_loss(predicted["features"], target)
            metrics["feature_loss"] = feature
            metrics |= losses.target_statistics(target, feature)
            total += feature_weight * feature
        return total, metrics | {"loss": total}

    return loss_fn


def _teacher_blocks(
    cfg: Config, teacher: PyTree, patches_b: Float[Array, "b n p"], dtype: DTypeLike
) -> list[Float[Array, "b n d"]]:
    """Patch tokens of the whole RegionB after the teacher's upper blocks."""
    encoded = personmae.encode(
        *(cfg.encoder, cfg.grid, teacher, patches_b),
        dtype=dtype,
        remat=cfg.train.remat,
    )
    upper = encoded.blocks[-cfg.loss.feature_blocks :]
    # The teacher learns by averaging alone; a gradient would let it meet the student
    # half way, at a constant.
    return jax.lax.stop_gradient([tokens[:, 1:] for tokens in upper])


def _pixel_weights(cfg: Config, batch: Batch) -> Float[Array, "b n"] | None:
    """Weights of RegionB's patches in the pixel loss; None: all count alike."""
    shown_weight = cfg.loss.visible_pixel_weight
    if shown_weight == 1:
        return None
    shown = losses.visible_share(batch["geometry"], batch["visible"], cfg.grid)
    return 1 - (1 - shown_weight) * shown


def make_train_step(
    cfg: Config,
    tx: optax.GradientTransformation,
    learning_rate: optim.Schedule,
    num_steps: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the pure (state, batch) -> (state, metrics); program.py jits it."""
    dtype = sharding.matmul_dtype(cfg.train.matmul_dtype, mesh)
    loss_fn = make_loss_fn(cfg, dtype, sharding.gather(mesh))
    ema_decay = optim.ema_decay_schedule(cfg.teacher, num_steps)
    feature_weight = optim.feature_weight_schedule(cfg.loss, num_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # A traced scalar, not a constant: the ramp would compile every step anew.
        weight = feature_weight(state.step)

        def micro_step(micro_batch: Batch):
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (_, metrics), grads = grad_fn(
                state.params, state.teacher_params, weight, micro_batch
            )
            return grads, metrics

        grads, metrics = average_micro_batches(micro_step, batch, cfg.train.accumulate)
        params, opt_state, norms = optim.updated(
            tx, grads, state.opt_state, state.params
        )
        # After the update, as BYOL and MoCo do: an average of what the student now is.
        decay = ema_decay(state.step)
        teacher_params: Any = optax.incremental_update(
            params["encoder"], state.teacher_params, 1.0 - decay
        )
        metrics |= {
            "lr": learning_rate(state.step),
            "ema_decay": decay,
            "feature_weight": weight,
            **norms,
        }
        state = TrainState(
            step=state.step + 1,
            params=params,
            teacher_params=teacher_params,
            opt_state=opt_state,
        )
        return state, metrics

    return train_step


def average_micro_batches(fn: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """Averages fn over `count` equal parts of a batch, one part in memory at a time.

    Part j holds rows j, j + count, ...: every device keeps the rows that it has.
    A statistic over rows, such as `teacher_std`, becomes the mean of the parts' own.
    """
    if count == 1:
        return fn(batch)

    def split(x: Array) -> Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(split, batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts)),
    )
    total, _ = jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, fn(part)), None), zeros, parts
    )
    return jax.tree.map(lambda x: x / count, total)
