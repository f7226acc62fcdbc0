"""Schedules over the steps of a run, the weight-decay mask, and AdamW."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from personmae_jax.config import LossConfig, OptimConfig, TeacherConfig, TrainConfig
from personmae_jax.config_finetune import FinetuneOptimConfig
from personmae_jax.errors import ConfigError

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


def updated(
    tx: optax.GradientTransformation,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
) -> tuple[Any, PyTree, dict[str, Float[Array, ""]]]:
    """One update: new parameters and optimizer state, and the norms of a row."""
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    norms = {
        # Before clipping, which would hide a gradient that grows.
        "grad_norm": optax.tree.norm(grads),
        # Of the new parameters: finite where they may be saved.
        "param_norm": optax.tree.norm(params),
    }
    return params, opt_state, norms


def learning_rate_schedule(
    optim: OptimConfig, train: TrainConfig, num_steps: int
) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to 0 at `num_steps`.

    The peak is `lr`, or base_lr * batch_size / 256. Source: MAE,
    util/lr_sched.py.
    """
    peak = optim.lr
    if peak is None:
        peak = optim.base_lr * train.batch_size / 256
    return warmup_cosine(peak, optim.warmup, num_steps)


def warmup_cosine(peak: float, warmup: float, num_steps: int) -> Schedule:
    """Linear from 0 to `peak` over a share of the steps, then half a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=min(round(warmup * num_steps), num_steps - 1),
        decay_steps=num_steps,
    )


def stepwise(
    peak: float, warmup: float, every: float, factor: float, num_steps: int
) -> Schedule:
    """Constant but for a factor after each share `every` of the steps.

    Source: PyTorch's StepLR, as damo-cv/TransReID-SSL's usl.py uses it.

    Args:
      peak: Before the first of them.
      warmup: Share of the steps in which it rises linearly from 0.
      every: Share of the steps, above 0.
      factor: Of the learning rate, each time.
      num_steps: Of the run.
    """
    times = range(1, int(np.ceil(1 / every)))
    steps = {round(every * num_steps * i): factor for i in times}
    constant = optax.piecewise_constant_schedule(peak, steps)
    warm = round(warmup * num_steps)
    if not warm:
        return constant
    rise = optax.linear_schedule(0.0, 1.0, warm)
    return lambda step: constant(step) * rise(step)


def feature_weight_schedule(loss: LossConfig, num_steps: int) -> Schedule:
    """`feature_weight`, ramped linearly from 0 over the first `feature_ramp`."""
    return optax.linear_schedule(
        init_value=0.0 if loss.feature_ramp * num_steps >= 1 else loss.feature_weight,
        end_value=loss.feature_weight,
        transition_steps=max(1, round(loss.feature_ramp * num_steps)),
    )


def ema_decay_schedule(teacher: TeacherConfig, num_steps: int) -> Schedule:
    """Decay of the teacher's moving average at a step, in 0 .. max_decay.

    It is 1 - 1 / (tau * num_steps), tau rising linearly from start_fraction to
    end_fraction over the first `ramp` of the run. Works on numpy and jax values.
    """
    ramp_steps = max(1.0, teacher.ramp * num_steps)
    start, end = teacher.start_fraction, teacher.end_fraction

    def decay(step):
        xp = jnp if isinstance(step, jax.Array) else np
        tau = start + (end - start) * xp.minimum(step / ramp_steps, 1.0)
        value = 1.0 - 1.0 / xp.maximum(tau * num_steps, 1.0)
        return xp.minimum(value, teacher.max_decay)

    return decay


def check_teacher(teacher: TeacherConfig, num_steps: int) -> None:
    """Refuses a decay that leaves over 1 % of the initial weights in the teacher.

    With decays of 0.999 to 0.9999 a run of 5,000 steps would keep 20 % of them.

    Raises:
      ConfigError: Says what is left and how to forget it.
    """
    # At every step, or in the middle of this many equal parts of a longer run.
    num_parts = min(num_steps, 100_000)
    steps = (np.arange(num_parts) + 0.5) * (num_steps / num_parts) - 0.5
    with np.errstate(divide="ignore"):  # a decay of 0 forgets all at once
        logs = np.log(ema_decay_schedule(teacher, num_steps)(steps))
    remaining = float(np.exp(num_steps * logs.mean()))
    if remaining > 0.01:
        raise ConfigError(
            f"config.teacher leaves {remaining:.0%} of the initial weights in the "
            f"teacher after {num_steps} steps (at most 1 % may be left); use "
            "smaller --config.teacher.start_fraction and end_fraction, or train longer"
        )


def make_optimizer(optim: OptimConfig, learning_rate: Schedule):
    """AdamW after optional clipping of the global gradient norm."""
    adamw = _adamw(optim, learning_rate)
    if optim.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def _adamw(optim: OptimConfig | FinetuneOptimConfig, learning_rate: Schedule):
    return optax.adamw(
        learning_rate,
        b1=optim.beta1,
        b2=optim.beta2,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )


def decay_mask(params):
    """True for matrices alone: no decay on biases, norms, cls and mask tokens; MAE."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def layerwise_optimizer(
    optim: FinetuneOptimConfig, learning_rate: Schedule, depth: int
) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum, with a learning rate for every layer."""
    if optim.optimizer == "adamw":
        inner = _adamw(optim, learning_rate)
    else:  # PyTorch's order: decay, momentum, learning rate
        inner = optax.chain(
            optax.add_decayed_weights(optim.weight_decay, decay_mask),
            optax.trace(optim.momentum),
            optax.scale_by_learning_rate(learning_rate),
        )
    clip = (
        [] if optim.clip_norm is None else [optax.clip_by_global_norm(optim.clip_norm)]
    )
    scale = optax.stateless(
        lambda updates, _: jax.tree.map(
            jnp.multiply, updates, layer_scales(updates, depth, optim.layer_decay)
        )
    )
    return optax.chain(*clip, inner, scale)


def layer_scales(params: PyTree, depth: int, decay: float) -> PyTree:
    """What the learning rate of every parameter is multiplied by.

    decay ** (depth - i) in block i (from 0), decay ** (depth + 1) in what comes before
    the blocks, 1 after them.

    Source: BEiT; `param_groups_lrd` in facebookresearch/mae, util/lr_decay.py, as HAP
    has it.
    """

    def scale(path, _) -> float:
        names = [key.key for key in path]
        if names[0] == "camera_embed" or (
            names[0] == "encoder" and not names[1].startswith(("blocks_", "norm"))
        ):
            return decay ** (depth + 1)
        if names[0] == "encoder" and names[1].startswith("blocks_"):
            return decay ** (depth - int(names[1].removeprefix("blocks_")))
        return 1.0

    return jax.tree_util.tree_map_with_path(scale, params)
