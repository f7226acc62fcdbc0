"""The encoder that a run starts from: a PyTorch file's tensors as our parameters."""

import contextlib
import json
import math
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from personmae_jax import torch_read, torch_weights
from personmae_jax.config import Config
from personmae_jax.errors import ConfigError
from personmae_jax.torch_read import Stored
from personmae_jax.torch_recognise import recognise

Tensors = dict[str, np.ndarray]
Grid = tuple[int, int]

# Largest difference of a sine-cosine table from ours: some compute it in float32, and
# some files are of half precision.
_TABLE_TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
_RATIOS = (1, 2, 3)  # height / width of the grids that ViTs are pretrained on


class Imported(NamedTuple):
    """What a file gives.

    Attributes:
      params: Of the encoder, numpy float32.
      notes: One sentence each on what was read, left out and changed.
    """

    params: dict[str, Any]
    notes: tuple[str, ...]


def read_encoder(cfg: Config) -> Imported:
    """Returns the encoder of the file `cfg.init.torch_weights`.

    Raises:
      ConfigError: The file cannot be read, holds no ViT, or not the one that `cfg`
        describes; lists every tensor that is missing, left over or does not fit.
    """
    path = str(cfg.init.torch_weights)
    opened = torch_read.open_file(path)
    found = recognise(opened.tree)
    if found is None:
        raise ConfigError(
            f"config.init.torch_weights={path} holds no ViT, or several: one name must "
            "be cls_token, after prefixes; at its top are "
            f"{', '.join(map(str, opened.tree)) or 'no names'}"
        )
    tensors, problems = _read_tensors(found.tensors, cfg)
    meta = _own_meta(opened)
    heads = meta.get("num_heads", cfg.encoder.num_heads)
    if heads != cfg.encoder.num_heads:  # no shape tells it
        problems.append(f"made for --config.encoder.num_heads={heads}")
    if problems:
        raise ConfigError(
            f"config.init.torch_weights={path} is not the encoder of these settings"
            f"{_hint(found.tensors, cfg)}:\n  " + "\n  ".join(problems)
        )
    table = tensors.pop("pos_embed")
    tolerance = _TABLE_TOLERANCE[found.tensors["pos_embed"].dtype]
    positions, note = _positions(table, tolerance, meta, cfg)
    notes = [f"Encoder from {path}{found.where and f' ({found.where})'}.", note]
    if found.dropped:
        notes.append(f"Left out of it: {', '.join(found.dropped)}.")
    if cfg.init.fold_normalisation:
        tensors |= fold_normalisation(
            tensors["patch_embed.proj.weight"],
            tensors["patch_embed.proj.bias"],
            cfg.data.mean,
            cfg.data.std,
        )
        notes.append("Its patch embedding was changed from pixels in -1..1 to ours.")
    params = torch_weights.encoder_from_torch(tensors)
    if cfg.encoder.learned_positions:
        params["pos_embed"] = positions
    return Imported(params, tuple(notes))


def _read_tensors(found: dict[str, Any], cfg: Config) -> tuple[Tensors, list[str]]:
    """Returns the tensors that `cfg` asks for, and a line for each kind of misfit."""
    wanted = torch_weights.tensor_shapes(cfg.encoder, cfg.grid)
    unfit = []
    for name in wanted.keys() & found.keys():
        value, shape = found[name], wanted[name]
        if not isinstance(value, Stored):
            unfit.append(f"{name} a {type(value).__name__} instead of a tensor")
            continue
        if name == "pos_embed" and len(value.shape) == 3 and value.shape[1] > 1:
            shape = (1, value.shape[1], shape[2])  # of any number of patches
        if value.shape != shape:
            unfit.append(f"{name} {value.shape} instead of {shape}")
    lines = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(unfit),
    }
    tensors, unusable = {}, []
    for name in wanted if not any(lines.values()) else ():
        try:
            tensors[name] = found[name].array()
        except ValueError as e:
            unusable.append(f"{name} is {e}")
    lines["unusable"] = unusable
    return tensors, [f"{k}: {', '.join(names)}" for k, names in lines.items() if names]


def _hint(found: dict[str, Any], cfg: Config) -> str:
    """The settings that the file's shapes speak for, where they are others."""
    shapes = {n: value.shape for n, value in found.items() if isinstance(value, Stored)}
    if any(name.startswith("patch_embed.conv") for name in shapes):
        return ", its stem is convolutional (the ICS models of TransReID-SSL and PASS)"
    blocks = [re.match(r"blocks\.(\d{1,3})\.", name) for name in shapes]
    width = shapes["cls_token"][-1] if shapes.get("cls_token") else cfg.encoder.width
    patch = shapes.get("patch_embed.proj.weight", ())[-1:]
    hidden = shapes.get("blocks.0.mlp.fc1.weight", ())[:1]
    there = {
        "width": width,
        "depth": 1 + max([int(block[1]) for block in blocks if block], default=-1),
        "num_heads": width // 64,  # as every ViT of these projects has
        "mlp_ratio": hidden[0] // max(width, 1) if hidden else cfg.encoder.mlp_ratio,
        "patch_size": patch[0] if patch else cfg.encoder.patch_size,
    }
    if width == cfg.encoder.width:
        del there["num_heads"]  # no shape tells it
    other = [
        f"--config.encoder.{name}={value}"
        for name, value in there.items()
        if value != getattr(cfg.encoder, name)
    ]
    return f", which seem to be {' '.join(other)}" if other else ""


def _positions(
    table: Float32[np.ndarray, "1 t d"],
    tolerance: float,
    meta: dict[str, Any],
    cfg: Config,
) -> tuple[np.ndarray, str]:
    """Returns the positions to start from, with the cls row, and a note on them.

    Raises:
      ConfigError: They would have to be learned, or their grid cannot be told.
    """
    codes = torch_weights.position_table(cfg.encoder.width, cfg.grid, cfg.grid)
    trained = {cfg.grid, _meta_grid(meta, "trained_grid") or cfg.grid}
    coded = _sine_cosine_grids(table, tolerance, trained)
    here, count = _say(cfg.grid), table.shape[1] - 1
    if not cfg.encoder.learned_positions:
        if coded is None:
            raise ConfigError(
                f"config.init.torch_weights={cfg.init.torch_weights} has a position "
                f"table of {count} patches that is not the fixed sine-cosine one; "
                "--config.encoder.learned_positions=true loads, resamples and trains it"
            )
        is_same = coded == (cfg.grid, cfg.grid)
        return (
            codes,
            f"Its positions are the fixed codes of {_say(coded[0])} patches, "
            + ("as here." if is_same else f"here those of {here} are used."),
        )
    grid = coded[0] if coded else _learned_grid(count, _meta_grid(meta, "grid"), cfg)
    if grid == cfg.grid:
        return table, f"Its {here} positions are loaded and will be trained."
    if coded:
        return codes, f"Its positions are fixed codes; those of {here} will be trained."
    return resample_positions(table, grid, cfg.grid), (
        f"Its {_say(grid)} positions were resampled to {here} and will be trained."
    )


def _sine_cosine_grids(
    table: Float32[np.ndarray, "1 t d"], tolerance: float, trained: set[Grid]
) -> tuple[Grid, Grid] | None:
    """The grid whose codes `table` holds, and the one in whose coordinates."""
    count, width = table.shape[1] - 1, table.shape[2]
    for rows in range(1, count + 1):
        if count % rows:
            continue
        grid = (rows, count // rows)
        for coordinates in {grid} | trained:
            codes = torch_weights.position_table(width, coordinates, grid)
            if np.abs(table - codes).max() <= tolerance:
                return grid, coordinates
    return None


def _learned_grid(count: int, told: Grid | None, cfg: Config) -> Grid:
    """The grid of a learned table, by our exports' word or by its number of patches."""
    grids = {cfg.grid} if cfg.num_patches == count else set()
    for ratio in _RATIOS:
        columns = math.isqrt(count // ratio)
        if ratio * columns**2 == count:
            grids.add((ratio * columns, columns))
    if told and told[0] * told[1] == count:
        grids = {told}
    if len(grids) == 1:
        return grids.pop()
    could = " or ".join(map(_say, sorted(grids))) or "neither 1:1 nor 2:1 nor 3:1"
    raise ConfigError(
        f"config.init.torch_weights={cfg.init.torch_weights} has learned positions of "
        f"{count} patches, whose rows and columns cannot be told ({could}); export it "
        "for the grid of this run"
    )


def resample_positions(
    table: Float32[np.ndarray, "1 t d"], grid: Grid, new: Grid
) -> Float32[np.ndarray, "1 u d"]:
    """Returns a learned table on another grid over the same image; cls keeps its row.

    Bilinear between patch centres, constant beyond the outermost.

    Source: TransReID, vit_pytorch.py, `resize_pos_embed` (MAE and HAP take bicubic).
    """
    if new == grid:
        return table
    patches = table[0, 1:].astype(np.float64).reshape(*grid, -1)
    zoom = (new[0] / grid[0], new[1] / grid[1], 1)
    patches = np.asarray(
        ndimage.zoom(patches, zoom, order=1, mode="nearest", grid_mode=True), np.float32
    )
    return np.concatenate(
        [table[:, :1], patches.reshape(1, -1, table.shape[2])], axis=1
    )


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


def _own_meta(opened: torch_read.Opened) -> dict[str, Any]:
    """What our exports say of themselves; of other files usually nothing."""
    meta = opened.tree.get("meta", opened.metadata)
    if not isinstance(meta, dict):
        return {}
    found = {}
    for name, value in meta.items():
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)  # safetensors has strings alone
        found[name] = value
    return found


def _meta_grid(meta: dict[str, Any], name: str) -> Grid | None:
    match meta.get(name):
        case [int(rows), int(columns)] if 0 < rows < 1000 and 0 < columns < 1000:
            return rows, columns
    return None


def _say(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
