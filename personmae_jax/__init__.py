"""PersonMAE pretraining for person re-identification, in JAX.

For JAX users who want the encoder and not the training:

    params, apply = personmae_jax.load_encoder("runs/quickstart")
    images = personmae_jax.load_images(files, 128, 64)  # uint8 RGB
    tokens = apply(params, images)  # cls and patch tokens
"""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, Float, UInt8

    Apply = Callable[
        [dict[str, Any], UInt8[Array, "b height width 3"]], Float[Array, "b t d"]
    ]

__all__ = ["load_encoder", "load_images"]


def load_encoder(
    workdir: str, step: int | None = None, weights: str = "student"
) -> "tuple[dict[str, Any], Apply]":
    """Loads the encoder of a run, finished or not, without touching the run.

    Args:
      workdir: Of the run, a folder or gs://...
      step: Of the checkpoint; None: the latest. 0 is the untrained network.
      weights: "student", or "teacher" for its moving average.

    Returns:
      The parameters as numpy arrays, and apply(params, images) -> tokens, a pure
      function to jit, differentiate or fine-tune. It takes uint8 RGB images of the
      size that the run was trained on, normalises them as the run did, and returns
      float32 tokens after the final norm: cls first, then patches row by row.

    Raises:
      ConfigError: There is no run in `workdir`, or it has no such weights.
      RunError: The checkpoint is missing or damaged.
    """
    # Not above: `import personmae_jax.config` has to work before jax is imported.
    import jax.numpy as jnp

    from personmae_jax.config_finetune import FinetuneConfig
    from personmae_jax.engine.checkpoint import restore_encoder
    from personmae_jax.engine.workdir import read_settings
    from personmae_jax.reid.features import encode_tokens

    cfg = read_settings(workdir)
    if isinstance(cfg, FinetuneConfig) and cfg.head.use_cameras:
        warnings.warn(
            f"the run in {workdir} was fine-tuned with camera embeddings, which its "
            "encoder lacks: other tokens than its own come out",
            stacklevel=2,
        )
    params = restore_encoder(workdir, step, weights)

    def apply(params: dict[str, Any], images: "Array") -> "Array":
        expected = (cfg.data.height, cfg.data.width, 3)
        if (
            images.ndim != 4
            or images.shape[1:] != expected
            or images.dtype != jnp.uint8
        ):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}; this encoder takes "
                f"uint8 RGB of shape [batch, {cfg.data.height}, {cfg.data.width}, 3]"
            )
        return encode_tokens(cfg.encoder, cfg.data, params, jnp.asarray(images))

    return params, apply


def load_images(
    files: "Sequence[str | os.PathLike[str]]", height: int, width: int
) -> "UInt8[np.ndarray, 'n {height} {width} 3']":
    """Reads image files as evaluation reads them: upright, in RGB, resized.

    Args:
      files: JPEG, PNG, BMP, GIF, WebP, TIFF or PPM.
      height: In pixels, as the encoder takes it.
      width: The same.

    Raises:
      RunError: A file cannot be read or is no image; names it.
    """
    import numpy as np

    from personmae_jax.config import ImageConfig
    from personmae_jax.data.records import ListedRecords
    from personmae_jax.reid.datasets import read_resized

    records = ListedRecords("", [os.fsencode(file) for file in files])
    pixels = np.empty((len(files), height, width, 3), np.uint8)
    for index, row in enumerate(pixels):
        read_resized(records, index, ImageConfig(), row)
    return pixels
