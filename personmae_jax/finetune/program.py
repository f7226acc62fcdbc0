"""What fine-tuning computes, assembled from its settings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.engine.program import Program, assemble
from personmae_jax.finetune import model
from personmae_jax.finetune.step import FinetuneState, make_train_step
from personmae_jax.models import batch_norm
from personmae_jax.optim import layerwise_optimizer, warmup_cosine

_LR_IMAGES = 64  # images a step at which `base_lr` is meant


def build(
    cfg: FinetuneConfig,
    mesh: Mesh,
    *,
    num_images: int,
    num_identities: int,
    num_cameras: int,
) -> Program[FinetuneConfig]:
    """Assembles the run; compiles and allocates nothing; an epoch is `num_images`."""
    num_steps = cfg.train.steps
    if num_steps is None:
        num_steps = max(1, int(cfg.train.epochs * num_images / cfg.batch_size))
    peak = cfg.optim.base_lr * cfg.batch_size / _LR_IMAGES
    learning_rate = warmup_cosine(peak, cfg.optim.warmup, num_steps)
    tx = layerwise_optimizer(cfg.optim, learning_rate, cfg.encoder.depth)

    def init(encoder: PyTree | None = None) -> FinetuneState:
        key = jax.random.key(cfg.train.seed)
        params = model.init_params(cfg, key, num_identities, num_cameras, encoder)
        return FinetuneState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            statistics=batch_norm.init_statistics(cfg.encoder.width),
            opt_state=tx.init(params),
        )

    b = cfg.batch_size
    image = (b, cfg.data.height, cfg.data.width, 3)
    return assemble(
        *(cfg, mesh),
        num_steps=num_steps,
        batch_size=b,
        init=init,
        step=make_train_step(cfg, tx, learning_rate, mesh),
        batch={
            "image": jax.ShapeDtypeStruct(image, np.uint8),
            "label": jax.ShapeDtypeStruct((b,), np.int32),
            "camera": jax.ShapeDtypeStruct((b,), np.int32),
        },
    )
