"""What training without labels computes, assembled from its settings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.program import Program, assemble
from personmae_jax.models import batch_norm
from personmae_jax.optim import layerwise_optimizer, stepwise
from personmae_jax.unsupervised import model
from personmae_jax.unsupervised.clustering import OUTLIER
from personmae_jax.unsupervised.memory import Memory
from personmae_jax.unsupervised.step import UnsupervisedState, make_train_step

_LR_IMAGES = 256  # images a step at which `base_lr` is meant


def build(
    cfg: UnsupervisedConfig, mesh: Mesh, *, num_images: int
) -> Program[UnsupervisedConfig]:
    """Assembles the run; compiles and allocates nothing.

    The memory has a row for each of `num_images`, those of the target.
    """
    optim, num_steps = cfg.optim, cfg.num_steps
    learning_rate = stepwise(
        peak=optim.base_lr * cfg.batch_size / _LR_IMAGES,
        warmup=optim.warmup,
        every=optim.decay_every,
        factor=optim.decay,
        num_steps=num_steps,
    )
    tx = layerwise_optimizer(optim, learning_rate, cfg.encoder.depth)

    def init(encoder: PyTree | None = None) -> UnsupervisedState:
        params = model.init_params(cfg, jax.random.key(cfg.train.seed), encoder)
        width = model.width(cfg)
        return UnsupervisedState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            statistics=batch_norm.init_statistics(width),
            opt_state=tx.init(params),
            memory=Memory(  # no row is used before the first clustering
                vectors=jnp.zeros((num_images, width)),
                clusters=jnp.zeros(num_images, jnp.int32),
                cameras=jnp.zeros(num_images, jnp.int32),
                num_rows=jnp.zeros((), jnp.int32),
            ),
            labels=jnp.full(num_images, OUTLIER, jnp.int32),
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
        },
    )
