"""One step of training without labels: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from personmae_jax import sharding
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.program import Batch, Metrics
from personmae_jax.models import batch_norm, personmae
from personmae_jax.optim import Schedule, updated
from personmae_jax.reid.features import unit
from personmae_jax.sharding import matmul_dtype
from personmae_jax.unsupervised import memory, model
from personmae_jax.unsupervised.memory import Memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class UnsupervisedState:
    """State before step `step`; a run resumed in mid-round finds its labels here."""

    step: Int[Array, ""] | PyTree  # updates made
    params: dict[str, Any]  # of unsupervised/model.py
    statistics: dict[str, Any]  # running "mean" and "var" of the batch norm
    opt_state: PyTree
    memory: Memory | PyTree  # of the round's clusters
    labels: Int[Array, " n"] | PyTree  # cluster of every image of the target, or -1


def make_train_step(
    cfg: UnsupervisedConfig,
    tx: optax.GradientTransformation,
    learning_rate: Schedule,
    mesh: Mesh,
) -> Callable[[UnsupervisedState, Batch], tuple[UnsupervisedState, Metrics]]:
    """Returns the pure (state, batch) -> (state, metrics); the engine jits it."""
    dtype, gather = matmul_dtype(cfg.train.matmul_dtype, mesh), sharding.gather(mesh)

    def loss_fn(
        params: PyTree, statistics: PyTree, bank: Memory, batch: Batch, key: Array
    ):
        params, labels = gather(params), batch["label"]
        mask = personmae.sample_drop_path_mask(
            key, cfg.encoder.depth, cfg.head.drop_path, len(labels), mesh
        )
        features = model.encode(
            cfg, params, batch["image"], drop_path_mask=mask, dtype=dtype
        )
        scale = params["bottleneck"]["scale"]
        features, statistics = batch_norm.batch_norm(features, scale, statistics)
        features = unit(features)
        logits = memory.similarities(features, bank, cfg.memory.temperature)
        if cfg.memory.camera_proxies:
            loss = memory.proxy_loss(logits, labels, bank, cfg.memory)
        else:
            loss = memory.contrast_loss(logits, labels)
        found = bank.clusters[jnp.argmax(logits, axis=1)]
        is_right = (found == bank.clusters[labels]).astype(jnp.float32)
        metrics = {"loss": loss, "accuracy": jnp.mean(is_right)}
        return loss, (metrics, statistics, features)

    def train_step(state: UnsupervisedState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(cfg.train.seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, (metrics, statistics, features)), grads = grad_fn(
            state.params, state.statistics, state.memory, batch, key
        )
        params, opt_state, norms = updated(tx, grads, state.opt_state, state.params)
        bank: Any = state.memory
        vectors = memory.updated(
            bank.vectors, features, batch["label"], cfg.memory.momentum
        )
        metrics |= {"lr": learning_rate(state.step), **norms}
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
            memory=bank._replace(vectors=vectors),
        )
        return state, metrics

    return train_step
