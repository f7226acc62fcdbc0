"""A run's encoder as a file for PyTorch, examined before it appears.

The tensors are written to a temporary folder beside the target, read back, and run in
the plain PyTorch ViT of `vit.py`; only if every token agrees with what JAX
makes of the checkpoint does the file get its name.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from personmae_jax.config import Config, ModelConfig
from personmae_jax.config_check import MAX_PATCHES
from personmae_jax.config_json import Settings
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.checkpoint import describe, restore_encoder, restore_head
from personmae_jax.engine.storage import open_new
from personmae_jax.engine.trees import named_leaves
from personmae_jax.engine.workdir import read_settings
from personmae_jax.errors import ConfigError, RunError, first_line
from personmae_jax.pytorch import verification
from personmae_jax.pytorch import weights as torch_weights
from personmae_jax.pytorch.head import head_tensors
from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.model_card import describe_export, model_card
from personmae_jax.pytorch.positions import resample_positions
from personmae_jax.pytorch.recipes import instructions


def export(
    workdir: os.PathLike[str] | str,
    out: os.PathLike[str] | str,
    *,
    step: int | None = None,
    weights: str | None = None,
    grid: tuple[int, int] | None = None,
    layout: str = "mae",
    reference: os.PathLike[str] | str | None = None,
) -> str:
    """Writes the encoder of a run, and a model card beside it.

    Args:
      workdir: Of the run, a folder or gs://...; it is only read.
      out: File, or folder of the layout "huggingface". An older file is replaced.
      step: Of the checkpoint; by default the latest.
      weights: "student" or "teacher"; by default as the run's settings say.
      grid: Rows and columns of patches that the positions are for; by default those
        of the run.
      layout: A key of `layouts.LAYOUTS`.
      reference: A .npz file for the example images and JAX's tokens.

    Returns:
      What to tell the user, in Markdown: what was verified, and how to load the file.

    Raises:
      ConfigError: No run is there, or an argument cannot be; nothing was done.
      RunError: The checkpoint is missing or damaged, or what was read back differs;
        nothing was written.
    """
    cfg = read_settings(workdir)
    _check_layout(layout, cfg)
    target = _check_target(out, "--out", LAYOUTS[layout].suffixes)
    if reference is not None:
        if target in pathlib.Path(reference).expanduser().absolute().parents:
            raise ConfigError(f"--reference={reference} lies in --out; name it outside")
        reference = _check_target(reference, "--reference", (".npz",))
    grid = cfg.grid if grid is None else grid
    if math.prod(grid) > MAX_PATCHES:
        raise ConfigError(
            f"--grid={grid[0]}x{grid[1]} makes {math.prod(grid)} patches; attention "
            f"takes {MAX_PATCHES}"
        )
    if weights is None:  # a fine-tuned run has no teacher
        weights = cfg.export.weights if isinstance(cfg, Config) else "student"
    step, about = describe(workdir, step)
    params = restore_encoder(workdir, step, weights)
    _refuse_non_finite(params, f"the {weights}'s weights at step {step}")

    tensors = encoder_tensors(cfg, params, grid)
    examples = verification.make_examples(cfg, params, grid, tensors["pos_embed"])
    if LAYOUTS[layout].has_neck:
        head = restore_head(workdir, step)
        tensors |= head_tensors(head, step)
        examples = verification.with_features(examples, head)
    meta = describe_export(cfg, grid, weights, step, about)
    try:
        check = _write(target, layout, cfg, tensors, meta, examples, reference)
    except OSError as e:
        raise RunError(f"{target} could not be written ({first_line(e)})") from e
    told = instructions(str(target), layout, meta)
    return f"# {target}\n\n{check}\n\n{told}\nAlso in {_card_of(target)}."


def _write(
    target: pathlib.Path,
    layout: str,
    cfg: ModelConfig,
    tensors: dict[str, np.ndarray],
    meta: dict[str, Any],
    examples: verification.Examples,
    reference: pathlib.Path | None,
) -> str:
    """Writes all files once the first is verified; returns the word on that."""
    chosen = LAYOUTS[layout]
    with _folder_beside(target) as folder:
        file = folder / target.name
        chosen.write(file, tensors, meta)
        if _has_torch():
            check = verification.verify(chosen.verified, file, cfg, examples)
        else:
            check = verification.verify_without_torch(file, tensors)
        if reference is not None:
            arrays = examples._asdict().items()
            with open_new(reference) as opened:
                np.savez(opened, **{name: x for name, x in arrays if x is not None})
        card = model_card(str(target), layout, meta, check, _sha256(file))
        _card_of(file).write_text(card, encoding="utf-8")
        if file.is_file():
            _card_of(file).replace(_card_of(target))
        file.replace(target)
    return check


@contextlib.contextmanager
def _folder_beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Of one name: what an export that was killed left, the next one takes away."""
    folder = target.with_name(f".{target.name}.export")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def encoder_tensors(
    cfg: ModelConfig, params: dict[str, Any], grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, by PyTorch's names, in the order of the network.

    Raises:
      RunError: They are not exactly those of the architecture that `cfg` names.
    """
    if cfg.encoder.learned_positions:
        positions = resample_positions(params["pos_embed"], cfg.grid, grid)
    else:
        positions = torch_weights.position_table(
            cfg.encoder.width, cfg.pos_embed_grid, grid
        )
    tensors = torch_weights.encoder_to_torch(params, positions)
    shapes = torch_weights.tensor_shapes(cfg.encoder, grid)
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise RunError("the checkpoint's arrays are not those of the run's config.json")
    return {name: tensors[name] for name in shapes}


def _check_layout(layout: str, cfg: Settings) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(
            f"--layout={layout} is unknown; choose one of {', '.join(LAYOUTS)}"
        )
    # Before torch, which nobody should install to be refused then.
    feature = cfg.head.feature if isinstance(cfg, UnsupervisedConfig) else "cls"
    if feature != "cls" and LAYOUTS[layout].has_neck:
        raise ConfigError(
            f"--layout={layout} has a batch norm after the cls token, but this run was "
            f"trained with config.head.feature={feature}; take --layout=mae"
        )
    if LAYOUTS[layout].needs_torch and not _has_torch():
        raise ConfigError(
            f"--layout={layout} needs torch; pip install -r requirements-torch.txt, or "
            "choose --layout=safetensors"
        )


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _check_target(
    path: os.PathLike[str] | str, flag: str, suffixes: tuple[str, ...]
) -> pathlib.Path:
    """Returns the absolute path, its parent created; no suffixes: for a new folder."""
    text = os.fspath(path)
    if "://" in text:
        raise ConfigError(f"{flag}={text} is not local; write it here, then copy it")
    target = pathlib.Path(text).expanduser().absolute()
    if suffixes and target.suffix not in suffixes:
        raise ConfigError(f"{flag}={text} must end in {' or '.join(suffixes)}")
    if suffixes and target.is_dir():
        raise ConfigError(f"{flag}={text} is a folder; name a file")
    if not suffixes and (target.is_file() or target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{flag}={text} is there already; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"{flag}={text} cannot be written ({first_line(e)}); name another place"
        ) from e
    return target


def _refuse_non_finite(params: dict[str, Any], what: str) -> None:
    bad = [k for k, v in named_leaves(params).items() if not np.isfinite(v).all()]
    if bad:
        raise RunError(
            f"{what} are not finite ({', '.join(bad[:3])}, {len(bad)} arrays in all); "
            "export an earlier --step"
        )


def _card_of(target: pathlib.Path) -> pathlib.Path:
    if target.is_dir():
        return target / "README.md"
    return target.with_name(target.name + ".md")


def _sha256(target: pathlib.Path) -> str:
    file = target / "model.safetensors" if target.is_dir() else target
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
