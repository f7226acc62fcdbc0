"""Targets and losses: arrays in, scalars out; everything in float32."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from personmae_jax.models.personmae import layer_norm


def patch_moments(
    patches: Float[Array, "b n p"],
) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Returns the mean of every patch and its standard deviation, never below 1e-3.

    Source: `norm_pix_loss` in facebookresearch/mae, models_mae.py: the unbiased
    variance plus 1e-6, square root.
    """
    # So that patches of high contrast do not dominate; 1e-6 is for flat ones.
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    var = jnp.var(patches, axis=-1, keepdims=True, ddof=1)  # torch.var is unbiased
    return mean, jnp.sqrt(var + 1e-6)


def pixel_loss(
    predicted: Float[Array, "b n p"],
    patches: Float[Array, "b n p"],
    target: str = "normalised",
    weights: Float[Array, "b n"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error over all patches of RegionB, or their weighted mean.

    Args:
      predicted: Of the pixel predictor; patches in raster order, p = 3 * patch**2.
      patches: RegionB's normalised pixels.
      target: "normalised": every patch brought to zero mean and unit variance;
        "raw": as given.
      weights: Of every patch, not all 0 over the batch; None: all count alike.

    Source: `forward_loss` in facebookresearch/mae, whose weights are 1 where a patch
    is hidden and 0 elsewhere.
    """
    if target == "normalised":
        mean, std = patch_moments(patches)
        patches = (patches - mean) / std
    error = jnp.square(predicted - patches)
    if weights is None:
        return jnp.mean(error)
    total = jnp.sum(weights * jnp.mean(error, axis=-1))
    return total / jnp.maximum(jnp.sum(weights), 1e-6)


def visible_share(
    geometry: Float[Array, "b 4"], visible: Int[Array, "b v"], grid: tuple[int, int]
) -> Float[Array, "b n"]:
    """How much of each patch of RegionB the encoder sees: 0 nothing, 1 all of it.

    Args:
      geometry: (y_offset, x_offset, y_scale, x_scale) of `regions.relative_geometry`.
      visible: Raster indices of RegionA's visible patches.
      grid: Rows and columns of either region.

    Returns:
      Shares of the area; exactly 0 or 1 where RegionB is RegionA.
    """
    rows, columns = grid
    patch = jnp.arange(rows * columns)[None, None]
    is_visible = jnp.any(visible[:, :, None] == patch, axis=1)
    shown = is_visible.reshape(-1, rows, columns).astype(jnp.float32)
    down = _overlaps(geometry[:, 0], geometry[:, 2], rows)
    across = _overlaps(geometry[:, 1], geometry[:, 3], columns)
    # Sums, not matrix products: a TPU would round their factors to bfloat16.
    shown = jnp.sum(down[:, :, :, None] * shown[:, None], axis=2)
    shown = jnp.sum(across[:, None] * shown[:, :, None], axis=3)
    return shown.reshape(-1, rows * columns)


def _overlaps(
    offset: Float[Array, " b"], scale: Float[Array, " b"], size: int
) -> Float[Array, "b {size} {size}"]:
    """Fraction of each of B's rows or columns (axis 1) that lies in each of A's."""
    offset, scale = offset[:, None, None], scale[:, None, None]
    of_a = jnp.arange(size, dtype=jnp.float32)[None, None]
    start = of_a.swapaxes(1, 2) * scale + offset
    low, high = jnp.maximum(start, of_a), jnp.minimum(start + scale, of_a + 1)
    return jnp.maximum(high - low, 0) / scale


def feature_target(
    blocks: Sequence[Float[Array, "b n d"]], instance_norm: bool = False
) -> Float[Array, "b n d"]:
    """The mean of the teacher's upper blocks, each token normalised over its channels.

    Args:
      blocks: Patch tokens of RegionB after each of these blocks.
      instance_norm: Bring each block first to zero mean and unit variance over the
        patches of an image, channel by channel.

    Source: BootMAE for one block as it is, data2vec and data2vec 2.0 for several.
    """
    tokens = [x.astype(jnp.float32) for x in blocks]
    if instance_norm:
        tokens = [layer_norm(x, axis=1) for x in tokens]  # over patches, by channel
    return layer_norm(sum(tokens[1:], tokens[0]) / len(tokens))


def cls_target(blocks: Sequence[Float[Array, "b n d"]]) -> Float[Array, "b d"]:
    """The mean of RegionB's patch tokens over the teacher's upper blocks, normalised.

    Not of tokens that `feature_target` has brought to zero mean over the image: this
    mean would be zero.

    Source: `cls_loss` of data2vec 2.0.
    """
    means = [jnp.mean(x.astype(jnp.float32), axis=1) for x in blocks]
    return layer_norm(sum(means[1:], means[0]) / len(means))


def feature_loss(
    predicted: Float[Array, "*lead d"], target: Float[Array, "*lead d"]
) -> Float[Array, ""]:
    """Mean squared error of a prediction, normalised here, against a normalised target.

    Source: BootMAE.
    """
    # Both normalised: else the cheapest way to a small loss is a small teacher.
    return jnp.mean(jnp.square(layer_norm(predicted) - target))


def target_statistics(
    target: Float[Array, "b n d"], mse: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Two numbers that tell learning from collapse.

    Args:
      target: Of `feature_target`.
      mse: Mean squared error of the normalised prediction against it.

    Returns:
      teacher_std: Standard deviation over images at one position, averaged over
        positions and channels; near 0 the teacher says the same of every image.
      feature_explained: 1 - mse / variance around the batch mean of each channel;
        0 is what a learned constant gets.
    """
    variance = jnp.mean(jnp.var(target, axis=(0, 1)))
    return {
        "teacher_std": jnp.mean(jnp.std(target, axis=0)),
        "feature_explained": 1.0 - mse / jnp.maximum(variance, 1e-12),
    }
