"""The encoder's parameters under the names and in the layouts of PyTorch ViTs.

The names are those of timm, MAE and the TransReID family. Where we hold a matrix as
(inputs, outputs), PyTorch has (outputs, inputs); our patch embedding is a matrix on
patches flattened as (row, column, channel), theirs a convolution. Everything here
only moves numbers: both ways are exact.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from personmae_jax.config import EncoderConfig
from personmae_jax.engine.trees import named_leaves
from personmae_jax.models import personmae

Params = dict[str, Any]
Tensors = dict[str, np.ndarray]

_WEIGHTS = ("kernel", "scale")  # what we call the `weight` of a Dense and of a norm
_PATCH_EMBED = "patch_embed.proj.weight"


def encoder_to_torch(
    params: Params, pos_embed: Float32[np.ndarray, "1 t d"]
) -> Tensors:
    """Returns PyTorch name -> contiguous float32 array, each with its own memory.

    Args:
      params: Of an encoder; a `pos_embed` among them is left out for the given one.
      pos_embed: Codes of cls, then of the patches row by row.
    """
    tensors = {"pos_embed": pos_embed}
    for path, array in named_leaves(params).items():
        *modules, leaf = path.split("/")
        array = np.asarray(array)
        if path == "pos_embed":
            continue
        if path == "patch_embed/kernel":
            patch = math.isqrt(array.shape[0] // 3)
            array = array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
        elif leaf == "kernel":
            array = array.T
        if leaf in _WEIGHTS:
            leaf = "weight"
        name = ".".join([*modules, leaf]).replace("blocks_", "blocks.")
        tensors[name.replace("patch_embed.", "patch_embed.proj.")] = array
    return {
        name: np.array(array, np.float32, order="C") for name, array in tensors.items()
    }


def encoder_from_torch(tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns the encoder's float32 parameters: the inverse of `encoder_to_torch`.

    Args:
      tensors: Those of `tensor_shapes`, `pos_embed` apart; their names and shapes
        are the caller's to check.
    """
    params: Params = {}
    for name, array in tensors.items():
        path = name.replace("blocks.", "blocks_").replace(
            "patch_embed.proj", "patch_embed"
        )
        *modules, leaf = path.split(".")
        if name == _PATCH_EMBED:
            array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        elif leaf == "weight" and array.ndim == 2:
            array = array.T
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        inner = params
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[leaf] = np.array(array, np.float32, order="C")
    return params


def tensor_shapes(
    encoder: EncoderConfig, grid: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of exactly the tensors of a file: 6 and 12 a block."""
    d, hidden = encoder.width, encoder.mlp_ratio * encoder.width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + grid[0] * grid[1], d),
        _PATCH_EMBED: (d, 3, encoder.patch_size, encoder.patch_size),
        "patch_embed.proj.bias": (d,),
    }
    for i in range(encoder.depth):
        for name, shape in {
            "norm1": (d,),
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "norm2": (d,),
            "mlp.fc1": (hidden, d),
            "mlp.fc2": (d, hidden),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}


def position_table(
    width: int, trained_grid: tuple[int, int], grid: tuple[int, int]
) -> Float32[np.ndarray, "1 t {width}"]:
    """Returns the sine-cosine codes of cls (zeros), then of `grid` row by row.

    They are taken at the centres of that grid's patches in the trained grid's
    coordinates, so that no code lies outside the area where codes were trained.

    Args:
      width: Of the encoder.
      trained_grid: Rows and columns in pretraining.
      grid: Rows and columns of patches that the same image is cut into now.
    """
    patches = personmae.position_table(trained_grid, width, at=grid)
    return np.concatenate([np.zeros((1, width), np.float32), patches])[None]
