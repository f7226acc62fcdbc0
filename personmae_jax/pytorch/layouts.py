"""The encoder's tensors in the files that PyTorch code opens: written and read back.

Layouts:
  mae: `{"model": tensors, "meta": ...}`: MAE, TransReID and its kin, HAP, MALE, timm.
  flat: the bare dict of tensors: OML.
  safetensors: the same tensors in a file that needs no torch.
  pass: as mae, with the positions split and three part tokens added: PASS.
  huggingface: a folder for `transformers.ViTModel.from_pretrained`.
  transreid: of a run with a batch norm, the bare dict that TransReID and its kin test:
    the encoder below `base.`, and what `head.head_tensors` returns.
  cluster-contrast: of a run with a batch norm, `{"state_dict": tensors, "meta": ...}`
    as TransReID-SSL's cluster-contrast-reid saves: all below `module.`, no classifier.
"""

import io
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from personmae_jax.errors import RunError
from personmae_jax.pytorch import head

Tensors = dict[str, np.ndarray]
Meta = dict[str, Any]

_PARTS = (1, 2, 3)  # PASS's part tokens
HUGGINGFACE = {  # names of transformers 4; 5 renames them as it reads
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")


class Layout(NamedTuple):
    """How one layout is stored; the meta is that of `model_card.describe_export`."""

    write: Callable[[pathlib.Path, Tensors, Meta], None]
    # Gives the tensors under their canonical names; raises RunError or what the library
    # raises if they are not there.
    read: Callable[[pathlib.Path], Tensors]
    suffixes: tuple[str, ...] = (".pth", ".pt")  # none for a folder
    needs_torch: bool = True  # to be written
    # The batch norm's, by the names of torch.nn.BatchNorm1d; None: there is none.
    read_head: Callable[[pathlib.Path], Tensors] | None = None
    verified: str = "Verified"  # may be said after `read` gave what a plain ViT needs


def split_positions(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns PASS's tensors: one position each for cls and parts, parts like cls."""
    tensors = dict(tensors)
    positions = tensors.pop("pos_embed")
    cls, cls_pos = tensors["cls_token"], positions[:, :1].copy()
    tensors |= {"cls_pos": cls_pos, "pos_embed": positions[:, 1:].copy()}
    for i in _PARTS:
        tensors |= {f"part{i}_pos": cls_pos.copy(), f"part_token{i}": cls.copy()}
    return tensors


def join_positions(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The inverse of `split_positions`; raises RunError if parts differ from cls."""
    tensors = dict(tensors)
    cls_pos = tensors.pop("cls_pos")
    for i in _PARTS:
        token, position = tensors.pop(f"part_token{i}"), tensors.pop(f"part{i}_pos")
        if not (
            np.array_equal(token, tensors["cls_token"])
            and np.array_equal(position, cls_pos)
        ):
            raise RunError(f"part token {i} differs from cls")
    tensors["pos_embed"] = np.concatenate([cls_pos, tensors["pos_embed"]], axis=1)
    return tensors


def to_huggingface(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns the tensors under the names of transformers' ViTModel, qkv split."""
    renamed = {}
    for name, array in tensors.items():
        prefix, inner = _split_block(name, r"blocks\.(\d+)\.", "encoder.layer.")
        module, dot, leaf = inner.rpartition(".")
        if module == "attn.qkv":
            for part, rows in zip(_QKV, np.split(array, 3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{leaf}"] = rows.copy()
        else:
            module, leaf = (module, leaf) if dot else (leaf, "")
            renamed[prefix + HUGGINGFACE[module] + dot + leaf] = array
    return renamed


def from_huggingface(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The inverse of `to_huggingface`; a KeyError names what is missing."""
    canonical = {theirs: ours for ours, theirs in HUGGINGFACE.items()}
    renamed = {}
    for name, array in tensors.items():
        prefix, inner = _split_block(name, r"encoder\.layer\.(\d+)\.", "blocks.")
        module, dot, leaf = inner.rpartition(".")
        if module == "attention.attention.query":
            parts = [tensors[name.replace("query", part)] for part in _QKV]
            renamed[f"{prefix}attn.qkv.{leaf}"] = np.concatenate(parts)
        elif inner in canonical:
            renamed[canonical[inner]] = array
        elif not module.startswith("attention.attention."):
            renamed[prefix + canonical[module] + dot + leaf] = array
    return renamed


def _split_block(name: str, pattern: str, new: str) -> tuple[str, str]:
    """Returns the new prefix of a block, or "", and the rest of the name."""
    match = re.match(pattern, name)
    return (f"{new}{match[1]}.", name[match.end() :]) if match else ("", name)


def _save_torch(path: pathlib.Path, content: dict[str, Any]) -> None:
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(inner) for key, inner in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    # In memory first: a full disk is then an OSError, and the path is not in the file.
    buffer = io.BytesIO()
    torch.save(convert(content), buffer)
    path.write_bytes(buffer.getbuffer())


def _load_torch(path: pathlib.Path, key: str | None) -> Tensors:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if key is not None:
        if content.keys() != {key, "meta"}:
            raise RunError(f"it holds {', '.join(content)}, not {key} and meta")
        content = content[key]
    for name, tensor in content.items():
        if not tensor.is_contiguous():
            raise RunError(f"{name} is not contiguous")
    return {name: tensor.numpy() for name, tensor in content.items()}


def _save_safetensors(path: pathlib.Path, tensors: Tensors, meta: Meta) -> None:
    from safetensors.numpy import save

    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    # Files without a `format` are refused by transformers 4.
    # `save_file` would make a file for nobody but its owner.
    path.write_bytes(save(tensors, metadata=text | {"format": "pt"}))


def _load_safetensors(path: pathlib.Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


def _save_huggingface(path: pathlib.Path, tensors: Tensors, meta: Meta) -> None:
    path.mkdir()
    _save_safetensors(path / "model.safetensors", to_huggingface(tensors), meta)
    height, width = meta["image_size"]
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": meta["width"],
        "num_hidden_layers": meta["depth"],
        "num_attention_heads": meta["num_heads"],
        "intermediate_size": meta["mlp_ratio"] * meta["width"],
        "hidden_act": "gelu",  # with erf
        "layer_norm_eps": meta["layer_norm_eps"],
        "image_size": [height, width],
        "patch_size": meta["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": meta["mean"],
        "image_std": meta["std"],
    }
    for name, content in (("config", config), ("preprocessor_config", preprocessor)):
        text = json.dumps(content, indent=2) + "\n"
        (path / f"{name}.json").write_text(text, encoding="utf-8")


LAYOUTS = {
    "mae": Layout(
        lambda path, tensors, meta: _save_torch(path, {"model": tensors, "meta": meta}),
        lambda path: _load_torch(path, "model"),
    ),
    "flat": Layout(
        lambda path, tensors, _: _save_torch(path, tensors),
        lambda path: _load_torch(path, None),
    ),
    "safetensors": Layout(
        _save_safetensors, _load_safetensors, (".safetensors",), needs_torch=False
    ),
    "pass": Layout(
        lambda path, tensors, meta: _save_torch(
            path, {"model": split_positions(tensors), "meta": meta}
        ),
        lambda path: join_positions(_load_torch(path, "model")),
        verified="Verified without PASS's part tokens, with which its features differ",
    ),
    "transreid": Layout(
        lambda path, tensors, _: _save_torch(path, head.to_transreid(tensors)),
        lambda path: head.from_transreid(_load_torch(path, None)),
        read_head=lambda path: head.batch_norm_in(_load_torch(path, None)),
    ),
    "cluster-contrast": Layout(
        lambda path, tensors, meta: _save_torch(
            path, {"state_dict": head.to_cluster_contrast(tensors), "meta": meta}
        ),
        lambda path: head.from_cluster_contrast(_load_torch(path, "state_dict")),
        read_head=lambda path: head.batch_norm_in(
            _load_torch(path, "state_dict"), "module."
        ),
    ),
    "huggingface": Layout(
        _save_huggingface,
        lambda path: from_huggingface(_load_safetensors(path / "model.safetensors")),
        (),
    ),
}
