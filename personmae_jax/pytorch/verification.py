"""Does a file make in PyTorch what the checkpoint makes in JAX?"""

import contextlib
import copy
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from personmae_jax import pixels
from personmae_jax.config import ModelConfig
from personmae_jax.data.images import Box, crop_resize
from personmae_jax.errors import RunError, first_line
from personmae_jax.models import personmae
from personmae_jax.models.batch_norm import normalise
from personmae_jax.pixels import patchify
from personmae_jax.pytorch import layouts, read
from personmae_jax.pytorch.state_dict import recognise
from personmae_jax.pytorch.stored import Stored
from personmae_jax.synthetic.pedestrian import render_pedestrian

Tensors = dict[str, np.ndarray]

TOLERANCE = 1e-4  # of any value of any token after the final norm; 1e-5 is usual
NUM_NOISE, NUM_PEDESTRIANS = 2, 4


class Examples(NamedTuple):
    """What a file is examined with."""

    # Normalised; noise first, then synthetic pedestrians.
    images: Float32[np.ndarray, "b height width 3"]
    # JAX's answers after the final norm, cls first, computed in float32.
    tokens: Float32[np.ndarray, "b t d"]
    # The cls token after the batch norm, of unit length; None: there is none.
    features: Float32[np.ndarray, "b d"] | None = None


def make_examples(
    cfg: ModelConfig,
    params: dict[str, Any],
    grid: tuple[int, int],
    pos_embed: Float32[np.ndarray, "1 t d"],
) -> Examples:
    """Returns images of a grid's size and the answers of the encoder in JAX.

    On the grid of `cfg` the encoder has its own positions; on another one, which it
    was not built for, it is given `pos_embed`.
    """
    if grid != cfg.grid:
        cfg, patch = copy.deepcopy(cfg), cfg.encoder.patch_size
        cfg.data.height, cfg.data.width = grid[0] * patch, grid[1] * patch
        cfg.encoder.learned_positions = True
        params = params | {"pos_embed": pos_embed}
    images = _images(cfg)
    with jax.default_matmul_precision("highest"):
        patches = patchify(jnp.asarray(images), cfg.encoder.patch_size)
        arrays = jax.tree.map(jnp.asarray, params)
        tokens = personmae.encode(cfg.encoder, cfg.grid, arrays, patches).tokens
    return Examples(images, np.array(tokens))


def with_features(examples: Examples, head: dict[str, Any]) -> Examples:
    """Adds what the batch norm of `checkpoint.restore_head` makes of the cls tokens."""
    features = normalise(
        jnp.asarray(examples.tokens[:, 0]),
        jnp.asarray(head["params"]["bottleneck"]["scale"]),
        jax.tree.map(jnp.asarray, head["statistics"]),
    )
    lengths = jnp.linalg.norm(features, axis=1, keepdims=True)
    return examples._replace(features=np.array(features / lengths))


def read_back(path: pathlib.Path) -> tuple[Tensors, Tensors]:
    """The encoder's tensors in a file or folder of ours, and those of its batch norm.

    They are found as in files of others, by what is asked of every import; torch reads
    its own files.

    Raises:
      RunError: They are not there.
    """
    is_torch = path.suffix in (".pth", ".pt") and path.is_file()
    with _telling():
        tree = _load_torch(path) if is_torch else read.open_file(path).tree
        layouts.check_parts(tree.get("model", tree))
        found = recognise(tree).tensors.items()
        encoder = {name: tensor.read() for name, tensor in found}
        neck = {
            name.rpartition(".")[2]: tensor.read()
            for name, tensor in tree.get("state_dict", tree).items()
            if "bottleneck." in name
        }
    return encoder, neck


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Makes a RunError of whatever torch and safetensors raise."""
    try:
        yield
    except Exception as e:  # torch and safetensors raise whatever they meet
        raise RunError(
            f"the file that was written cannot be read back ({first_line(e)}); it was "
            "removed, please report this"
        ) from e


def _load_torch(path: pathlib.Path) -> dict[str, Any]:
    import torch

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(key, inner) for key, inner in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_contiguous():
            raise RunError(f"{name} is not contiguous")
        array = value.numpy()
        return Stored(array.shape, array.dtype.name, lambda: array)

    return convert("", torch.load(path, map_location="cpu", weights_only=True))


def verify(
    verified: str, path: pathlib.Path, cfg: ModelConfig, examples: Examples
) -> str:
    """Reads a file back and runs it in plain PyTorch; returns what came out.

    `verified` is what is said if all is well.

    Raises:
      RunError: It cannot be read, or a value of a token or of a feature differs by over
        `TOLERANCE`.
    """
    from personmae_jax.pytorch import vit

    tensors, neck = read_back(path)
    with _telling():
        tokens = vit.encode(cfg.encoder, tensors, examples.images)
        differences, what = np.abs(tokens - examples.tokens).max(axis=(1, 2)), ""
        if examples.features is not None:
            features = vit.batch_norm(neck, tokens[:, 0])
            after = np.abs(features - examples.features).max(axis=1)
            differences = np.maximum(differences, after)
            what = " and the feature of unit length after the batch norm"
    noise, real = differences[:NUM_NOISE].max(), differences[NUM_NOISE:].max()
    if not max(noise, real) <= TOLERANCE:  # NaN is not
        raise RunError(
            f"in PyTorch the file gives other tokens than the checkpoint in JAX (by "
            f"{noise:.1e} on noise, {real:.1e} on synthetic pedestrians; at most "
            f"{TOLERANCE:.0e} is right); it was removed, please report this"
        )
    return (
        f"{verified}: read back and run in plain PyTorch, every token after the "
        f"final norm{what} is within {noise:.1e} (noise) and {real:.1e} (synthetic "
        "pedestrians) of JAX's, in float32."
    )


def verify_without_torch(path: pathlib.Path, tensors: Tensors) -> str:
    """Reads a file back; says that nothing more could be done.

    Raises:
      RunError: It does not hold exactly `tensors`.
    """
    found, _ = read_back(path)
    if found.keys() != tensors.keys() or not all(
        np.array_equal(found[name], tensors[name]) for name in tensors
    ):
        raise RunError("the file that was written reads back otherwise; try again")
    return (
        "NOT verified: it holds the checkpoint's numbers, but without torch it could "
        "not be run; pip install -r requirements-torch.txt and export again to know."
    )


def _images(cfg: ModelConfig) -> Float32[np.ndarray, "b height width 3"]:
    size = (cfg.data.height, cfg.data.width, 3)
    noise = np.random.default_rng(0).standard_normal((NUM_NOISE, *size), np.float32)
    drawn = np.empty((NUM_PEDESTRIANS, *size), np.uint8)
    for identity, out in enumerate(drawn):
        image = render_pedestrian(0, identity, camera=identity, shot=0)
        crop_resize(image, Box(0, 0, *image.shape[:2]), out)
    images = pixels.normalise(jnp.asarray(drawn), cfg.data.mean, cfg.data.std)
    return np.concatenate([noise, np.array(images)])
