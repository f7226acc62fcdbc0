"""Targets and losses: arrays in, scalars out; everything in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from personmae_jax.models.personmae import layer_norm


def patch_moments(
    patches: Float[Array, "b n p"],
) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """Returns the mean of every patch and its standard deviation, never below 1e-3.

    Source: `norm_pix_loss` in facebookresearch/mae, models_mae.py: the unbiased
    variance plus 1e-6, square root.
    """
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    var = jnp.var(patches, axis=-1, keepdims=True, ddof=1)  # torch.var is unbiased
    return mean, jnp.sqrt(var + 1e-6)


def pixel_loss(
    predicted: Float[Array, "b n p"],
    patches: Float[Array, "b n p"],
    target: str = "normalised",
) -> Float[Array, ""]:
    """Mean squared error over all patches of RegionB.

    Args:
      predicted: Of the pixel predictor; patches in raster order, p = 3 * patch**2.
      patches: RegionB's normalised pixels.
      target: "normalised": every patch brought to zero mean and unit variance;
        "raw": as given.

    Source: `forward_loss` in facebookresearch/mae, with every patch counted.
    """
    if target == "normalised":
        mean, std = patch_moments(patches)
        patches = (patches - mean) / std
    return jnp.mean(jnp.square(predicted - patches))


def feature_target(features: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Normalises each of the teacher's tokens over its channels; BootMAE."""
    return layer_norm(features)


def feature_loss(
    predicted: Float[Array, "b n d"], target: Float[Array, "b n d"]
) -> Float[Array, ""]:
    """Mean squared error of the normalised prediction against a normalised target.

    Args:
      predicted: Of the feature predictor, before normalisation.
      target: Of `feature_target`.

    Source: BootMAE.
    """
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
