"""Everything that a run carries from step to step: arrays only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from personmae_jax.config import Config
from personmae_jax.models import personmae


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """State before step `step`; no keys and no functions, those follow from config."""

    step: Int[Array, ""] | PyTree  # updates made
    # "encoder", "pixel_predictor" and, unless off, "feature_predictor" and "cls_head".
    params: dict[str, Any]
    teacher_params: dict[str, Any]  # moving average of `params["encoder"]`
    opt_state: PyTree


def create_state(
    cfg: Config,
    tx: optax.GradientTransformation,
    key: Array,
    encoder: dict[str, Any] | None = None,
) -> TrainState:
    """Returns the initial state; the teacher starts as a copy of the student.

    Args:
      cfg: The settings.
      tx: The optimizer.
      key: Of the random parameters.
      encoder: The student's encoder, if it is not to be random.
    """
    params = personmae.init_params(
        *(cfg.encoder, cfg.predictors, cfg.grid, key),
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
