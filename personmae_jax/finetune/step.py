"""One step of fine-tuning: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from personmae_jax import sharding
from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.engine.program import Batch, Metrics
from personmae_jax.finetune import losses, model
from personmae_jax.models import batch_norm, personmae
from personmae_jax.optim import Schedule, updated
from personmae_jax.sharding import matmul_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneState:
    """State before step `step`."""

    step: Int[Array, ""] | PyTree  # updates made
    params: dict[str, Any]  # of finetune/model.py
    statistics: dict[str, Any]  # running "mean" and "var" of the batch norm
    opt_state: PyTree


def make_train_step(
    cfg: FinetuneConfig,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    mesh: Mesh,
) -> Callable[[FinetuneState, Batch], tuple[FinetuneState, Metrics]]:
    """Returns the pure (state, batch) -> (state, metrics); `build` jits it."""
    dtype, gather = matmul_dtype(cfg.train.matmul_dtype, mesh), sharding.gather(mesh)

    def loss_fn(params: PyTree, statistics: PyTree, batch: Batch, key: Array):
        params = gather(params)
        mask = personmae.sample_drop_path_mask(
            key, cfg.encoder.depth, cfg.head.drop_path, len(batch["label"]), mesh
        )
        features = model.encode(
            *(cfg, params, batch["image"], batch["camera"]),
            drop_path_mask=mask,
            dtype=dtype,
        )
        normalised, statistics = batch_norm.batch_norm(
            features, params["bottleneck"]["scale"], statistics
        )
        logits = normalised @ params["classifier"]["kernel"]
        identity = losses.identity_loss(
            logits, batch["label"], cfg.loss.label_smoothing
        )
        triplet = losses.triplet_loss(features, batch["label"])
        total = cfg.loss.identity_weight * identity + cfg.loss.triplet_weight * triplet
        is_right = jnp.argmax(logits, axis=1) == batch["label"]
        metrics = {
            "loss": total,
            "identity_loss": identity,
            "triplet_loss": triplet,
            "accuracy": jnp.mean(is_right.astype(jnp.float32)),
        }
        return total, (metrics, statistics)

    def train_step(state: FinetuneState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(cfg.train.seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (metrics, statistics)), grads = grad_fn(
            state.params, state.statistics, batch, key
        )
        params, opt_state, norms = updated(tx, grads, state.opt_state, state.params)
        metrics |= {"lr": learning_rate(state.step), **norms}
        state = FinetuneState(
            step=state.step + 1,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
        )
        return state, metrics

    return train_step
