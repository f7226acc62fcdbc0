"""The jitted functions of a training, with shapes and shardings; no files, no data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from personmae_jax import sharding
from personmae_jax.errors import ConfigError
from personmae_jax.sharding import with_sharding

# Config, or that of another training.
Settings = TypeVar("Settings")

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Generic[Settings]):
    """The pure functions of a training, and the shapes that they take."""

    cfg: Settings
    mesh: Mesh  # over all devices of all hosts
    num_steps: int  # of the run
    batch_size: int  # images a step, over all devices and hosts
    abstract_state: Any  # shapes, dtypes and shardings
    # The same of the global batch; what else the data pipeline's has stays on the host.
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    # Makes the initial state where its sharding says it belongs; takes an encoder's
    # parameters, on the devices, to start from instead of random ones.
    init_state: Callable[..., Any]
    # (state, batch) -> (state, metrics), compiled once; donates the state's buffers.
    train_step: Callable[[Any, Batch], tuple[Any, Metrics]]


def assemble(
    cfg: Settings,
    mesh: Mesh,
    *,
    num_steps: int,
    batch_size: int,
    init: Callable[..., Any],
    step: Callable[[Any, Batch], tuple[Any, Metrics]],
    batch: Mapping[str, jax.ShapeDtypeStruct],
) -> Program[Settings]:
    """Lays pure functions out on a mesh; compiles and allocates nothing.

    The arguments are those of `Program`; init is (encoder=None) -> state.

    Raises:
      ConfigError: There are more steps than jax's int32 counts.
    """
    if num_steps > np.iinfo(np.int32).max:
        raise ConfigError(
            f"config.train makes {num_steps} steps, more than int32 counts; use fewer "
            "epochs or rounds"
        )

    def step_on_mesh(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        with sharding.mesh_context(mesh):
            return step(state, batch)

    abstract_state = jax.eval_shape(init)
    state_sharding = sharding.state_sharding(mesh, abstract_state)
    batch_sharding = sharding.batch_sharding(mesh)
    return Program(
        cfg=cfg,
        mesh=mesh,
        num_steps=num_steps,
        batch_size=batch_size,
        abstract_state=jax.tree.map(with_sharding, abstract_state, state_sharding),
        abstract_batch={
            name: with_sharding(leaf, batch_sharding) for name, leaf in batch.items()
        },
        init_state=jax.jit(init, out_shardings=state_sharding),
        train_step=jax.jit(
            step_on_mesh,
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, sharding.replicated(mesh)),
            # Old and new state share memory: at ViT-L both would not fit.
            donate_argnums=0,
        ),
    )
