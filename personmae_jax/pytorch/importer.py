"""The encoder that a run starts from: a PyTorch file's tensors as our parameters."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from personmae_jax.config import InitConfig, ModelConfig
from personmae_jax.config_check import CHOICES, RANGES, encoder_problems
from personmae_jax.config_finetune import FinetuneInitConfig
from personmae_jax.config_values import range_problems
from personmae_jax.errors import ConfigError
from personmae_jax.pytorch import file_settings, read, weights
from personmae_jax.pytorch.positions import choose_positions, find_grid
from personmae_jax.pytorch.state_dict import Recognised, architecture, recognise, some
from personmae_jax.pytorch.stored import Stored

Tensors = dict[str, np.ndarray]


def read_encoder(cfg: ModelConfig) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the encoder of the file `cfg.init.torch_weights`.

    Returns:
      Its parameters, numpy float32; a sentence each on what was read, left out and
      changed.

    Raises:
      ConfigError: The file cannot be read, holds no ViT, or not the one that `cfg`
        describes; lists all missing keys, unexpected keys and shape mismatches.
    """
    path = str(cfg.init.torch_weights)
    found, meta = _open(cfg.init)
    tensors, problems = _read_tensors(found.tensors, cfg)
    heads = meta.get("num_heads")
    if heads is not None and heads != cfg.encoder.num_heads:  # no shape tells it
        problems.append(f"made for --config.encoder.num_heads={heads}")
    if problems:
        raise ConfigError(
            f"config.init.torch_weights={path} is not the encoder of these settings"
            f"{_hint(found.tensors, cfg)}:\n  " + "\n  ".join(problems)
        )
    table, dtype = tensors.pop("pos_embed"), found.tensors["pos_embed"].dtype
    positions, note = choose_positions(table, dtype, meta, cfg)
    notes = [f"Encoder from {path}{found.where and f' ({found.where})'}.", note]
    notes += file_settings.sentences(meta, cfg)
    if found.others:
        notes.append(f"It also has {some(found.others)}; config.init.prefix chooses.")
    if found.dropped:
        notes.append(f"Left out of it: {some(found.dropped)}.")
    if cfg.init.fold_normalisation:
        tensors |= fold_normalisation(
            tensors["patch_embed.proj.weight"],
            tensors["patch_embed.proj.bias"],
            cfg.data.mean,
            cfg.data.std,
        )
        notes.append("Its patch embedding was changed from pixels in -1..1 to ours.")
    params = weights.encoder_from_torch(tensors)
    if cfg.encoder.learned_positions:
        params["pos_embed"] = positions
    return params, tuple(notes)


def settings_of_file(
    init: FinetuneInitConfig, size: tuple[int, int] | None = None
) -> ModelConfig:
    """Returns settings with which `read_encoder` reads the encoder in a file as it is.

    The architecture is that of the file's shapes. What no tensor tells is what `init`
    says, else the file, else the JSON files of transformers beside it, else a guess:
    the heads of the known ViT of this width, or 64 wide; ImageNet's mean and std.

    Args:
      init: Its `torch_weights` is a .pth, .pt or .safetensors file.
      size: Height and width of the images in pixels; None: what its positions are for.

    Raises:
      ConfigError: The file cannot be read or holds no ViT; we have no such ViT, or the
        size that its positions are for cannot be told.
    """
    found, meta = _open(init)
    path, cfg = init.torch_weights, ModelConfig(init=init)
    for name, value in architecture(found.tensors).items():
        setattr(cfg.encoder, name, value)
    if isinstance(heads := meta.get("num_heads"), int):
        cfg.encoder.num_heads = heads
    for name in ("mean", "std"):
        values = getattr(init, name) or file_settings.numbers(meta.get(name))
        if values is not None:
            setattr(cfg.data, name, values)
    _check_architecture(cfg)
    table = found.tensors.get("pos_embed")
    if not isinstance(table, Stored) or not _is_table(table.shape, cfg.encoder.width):
        return cfg  # `read_encoder` lists whatever does not fit
    try:
        array = table.array()
    except ValueError as e:
        raise ConfigError(f"config.init.torch_weights={path}: pos_embed is {e}") from e
    patch = cfg.encoder.patch_size
    if size is not None:
        cfg.data.height, cfg.data.width = size
    grid, cfg.encoder.learned_positions = find_grid(array, table.dtype, meta, cfg)
    if size is None:
        cfg.data.height, cfg.data.width = grid[0] * patch, grid[1] * patch
    problems = [*range_problems(cfg, CHOICES, RANGES)]
    if problems := problems or [*encoder_problems(cfg)]:
        raise ConfigError("\n".join(problems))
    if not cfg.encoder.learned_positions and cfg.grid != grid:
        cfg.encoder.pos_embed_grid = grid
    return cfg


def _open(init: InitConfig) -> tuple[Recognised, dict[str, Any]]:
    """The encoder's tensors in a file, and what is told of them."""
    path = str(init.torch_weights)
    opened = read.open_file(path)
    try:
        found = recognise(opened.tree, init.prefix)
    except ValueError as e:
        raise ConfigError(f"config.init.torch_weights={path} {e}") from e
    return found, file_settings.look_up(init, opened, architecture(found.tensors))


def _read_tensors(found: dict[str, Any], cfg: ModelConfig) -> tuple[Tensors, list[str]]:
    """Returns the tensors that `cfg` asks for, and a line for each kind of misfit."""
    wanted = weights.tensor_shapes(cfg.encoder, cfg.grid)
    unfit = []
    for name in wanted.keys() & found.keys():
        value, shape = found[name], wanted[name]
        if not isinstance(value, Stored):
            unfit.append(f"{name}, which is no plain tensor")
            continue
        if name == "pos_embed" and len(value.shape) == 3 and value.shape[1] > 1:
            shape = (1, value.shape[1], shape[2])  # of any number of patches
        if value.shape != shape:
            unfit.append(f"{name} {value.shape} instead of {shape}")
    lines = {
        "missing keys": sorted(wanted.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - wanted.keys()),
        "shape mismatch": sorted(unfit),
    }
    tensors, unusable = {}, []
    for name in wanted if not any(lines.values()) else ():
        try:
            tensors[name] = found[name].array()
        except ValueError as e:
            unusable.append(f"{name} is {e}")
    lines["unusable"] = unusable
    return tensors, [f"{k}: {some(names)}" for k, names in lines.items() if names]


def _hint(found: dict[str, Any], cfg: ModelConfig) -> str:
    """The settings that the file's shapes speak for, where they are others."""
    if any(name.startswith("patch_embed.conv") for name in found):
        return ", its stem is convolutional (the ICS models of TransReID-SSL and PASS)"
    there = architecture(found)
    if there.get("width", cfg.encoder.width) == cfg.encoder.width:
        there.pop("num_heads", None)  # no shape tells it
    other = [
        f"--config.encoder.{name}={value}"
        for name, value in there.items()
        if value != getattr(cfg.encoder, name)
    ]
    return f", which seem to be {' '.join(other)}" if other else ""


def fold_normalisation(
    weight: Float32[np.ndarray, "d 3 p p"],
    bias: Float32[np.ndarray, " d"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensors:
    """Returns a patch embedding that answers the same to other input statistics.

    The given one takes x = (v - 0.5) / 0.5 of pixels v in 0..1, the returned one
    z = (v - mean) / std: x = 2 std z + (2 mean - 1).
    """
    scale, shift = 2 * np.array(std), 2 * np.array(mean) - 1
    kernel = weight.astype(np.float64)
    moved = bias + np.einsum("dcij,c->d", kernel, shift)
    return {
        "patch_embed.proj.weight": (kernel * scale[:, None, None]).astype(np.float32),
        "patch_embed.proj.bias": moved.astype(np.float32),
    }


def _check_architecture(cfg: ModelConfig) -> None:
    """Raises ConfigError if no encoder of ours is like this."""
    encoder = cfg.encoder
    counts = (encoder.width, encoder.depth, encoder.mlp_ratio, encoder.patch_size)
    heads = encoder.num_heads
    if min(*counts, heads) < 1 or encoder.width % heads or encoder.width % 4:
        raise ConfigError(
            f"config.init.torch_weights={cfg.init.torch_weights} holds a ViT that is "
            f"unknown here: {encoder.width} wide, {encoder.depth} blocks, {heads} heads"
        )


def _is_table(shape: tuple[int, ...], width: int) -> bool:
    return len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] == width
