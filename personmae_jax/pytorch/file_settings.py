"""What no tensor of a file tells: heads, statistics of pixels, grid, LayerNorm's eps.

It is what the settings say, else the file, else the JSON files of transformers beside
it; what is left is guessed, and said to be.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from personmae_jax import foreign_files
from personmae_jax.config import InitConfig, ModelConfig
from personmae_jax.pytorch.read import Opened

_VIT_TYPES = ("vit", "vit_mae", "deit", "dinov2")
# Files of transformers: which of them count, and their names for what they tell.
_BESIDE = (
    (
        "config.json",
        lambda content: content.get("model_type") in _VIT_TYPES,
        {
            "num_attention_heads": "num_heads",
            "layer_norm_eps": "layer_norm_eps",
            "hidden_act": "activation",
        },
    ),
    (
        "preprocessor_config.json",
        lambda content: content.get("do_normalize") is True,
        {"image_mean": "mean", "image_std": "std"},
    ),
)
_SIZES = {"hidden_size": "width", "num_hidden_layers": "depth"}  # there, and here
_SETTINGS = ("num_heads", "mean", "std", "grid")  # of `init`; they overrule a file
_HALF = (0.5, 0.5, 0.5)
_EPS = 1e-6  # of every LayerNorm here
_GELU = "gelu"  # transformers' name of the exact one, which is ours
# What is told in words; the text of nested tuples doubles with every level.
_TYPES = {"num_heads": int, "layer_norm_eps": float, "activation": str}


def look_up(
    init: InitConfig, opened: Opened, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Returns what is told, by the names of `model_card.describe_export`.

    Args:
      init: Names the file, and what overrules it.
      opened: The file.
      sizes: Of its encoder, by `state_dict.architecture`.
    """
    said = {name: getattr(init, name, None) for name in _SETTINGS}
    said = {name: value for name, value in said.items() if value is not None}
    said, beside = _own_meta(opened) | said, _beside(str(init.torch_weights), sizes)
    return beside | said | {"told_beside": [*beside.keys() - said.keys()]}


def sentences(meta: dict[str, Any], cfg: ModelConfig) -> Iterator[str]:
    """Sentences on what no tensor tells: what is taken, where it is a guess."""
    guesses = []
    if told := meta.get("told_beside"):
        yield f"JSON files beside it tell {', '.join(sorted(told))}."
    if "num_heads" not in meta:
        guesses.append(f"{cfg.encoder.num_heads} heads")
    mean, std = (numbers(meta.get(name)) for name in ("mean", "std"))
    ours = (tuple(cfg.data.mean), tuple(cfg.data.std))
    if cfg.init.fold_normalisation:
        ours = (_HALF, _HALF)
    if mean is None or std is None:
        guesses.append(f"pixels of mean {ours[0]} and std {ours[1]}")
    elif (mean, std) != ours:
        yield (
            f"WARNING: it was made for pixels of mean {mean} and std {std}, and gets "
            f"those of mean {ours[0]} and std {ours[1]}."
        )
    eps = meta.get("layer_norm_eps")
    if eps is None:
        guesses.append(f"LayerNorm's eps {_EPS}")
    elif eps != _EPS:
        yield f"Its LayerNorm has an eps of {str(eps)[:20]}, here it is {_EPS}."
    activation = meta.get("activation")
    if activation not in (None, _GELU, "gelu (erf)"):  # the latter is in our exports
        yield (
            f"WARNING: its activation is {str(activation)[:20]}, here it is {_GELU}: "
            "other features than its own come out."
        )
    if guesses:
        yield f"GUESS: it was made for {', '.join(guesses)}; no tensor tells."


def _beside(path: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What transformers' JSON files, beside the file or in the folder, tell.

    Nothing, if their network has another width or depth: they are of another file.
    """
    file, found = pathlib.Path(path).expanduser(), {}
    folder = file if file.is_dir() else file.parent
    for name, is_ours, fields in _BESIDE:
        try:
            content = foreign_files.read_json(folder / name, limit=2**20)
        except (OSError, ValueError):
            continue
        if not isinstance(content, dict):
            continue
        if any(k in content and content[k] != sizes.get(v) for k, v in _SIZES.items()):
            return {}
        if is_ours(content):
            found |= {
                new: content[old] for old, new in fields.items() if old in content
            }
    if type(heads := found.get("num_heads")) is not int or not 0 < heads < 1000:
        found.pop("num_heads", None)
    if found.get("activation") == _GELU:
        del found["activation"]  # nothing to tell
    return found


def _own_meta(opened: Opened) -> dict[str, Any]:
    """What our exports say of themselves; of other files usually nothing."""
    meta = opened.tree.get("meta", opened.metadata)
    if not isinstance(meta, dict):
        return {}
    found = {}
    for name, value in meta.items():
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)  # safetensors has strings alone
        if name not in _TYPES or type(value) is _TYPES[name]:
            found[name] = value
    return found


def numbers(value: Any) -> tuple[float, float, float] | None:
    """Three finite numbers, of red, green and blue."""
    match value:
        case [float() | int(), float() | int(), float() | int()]:
            with contextlib.suppress(OverflowError):
                r, g, b = map(float, value)
                return (r, g, b) if math.isfinite(r + g + b) else None
    return None
