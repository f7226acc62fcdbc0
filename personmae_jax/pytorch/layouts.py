"""The encoder's tensors in the files that PyTorch code opens.

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
    suffixes: tuple[str, ...] = (".pth", ".pt")  # none for a folder
    needs_torch: bool = True  # to be written
    has_neck: bool = False  # the batch norm's tensors stand in it, too
    verified: str = "Verified"  # may be said of a file that a plain ViT agrees with


def split_positions(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns PASS's tensors: one position each for cls and parts, parts like cls."""
    tensors = dict(tensors)
    positions = tensors.pop("pos_embed")
    cls, cls_pos = tensors["cls_token"], positions[:, :1].copy()
    tensors |= {"cls_pos": cls_pos, "pos_embed": positions[:, 1:].copy()}
    for i in _PARTS:
        tensors |= {f"part{i}_pos": cls_pos.copy(), f"part_token{i}": cls.copy()}
    return tensors


def check_parts(tensors: Mapping[str, Any]) -> None:
    """Raises RunError if part tokens or positions of PASS are there and not cls's."""
    for i in _PARTS:
        for part, cls in ((f"part_token{i}", "cls_token"), (f"part{i}_pos", "cls_pos")):
            if part not in tensors:
                continue
            if not np.array_equal(tensors[part].read(), tensors[cls].read()):
                raise RunError(f"{part} differs from {cls}")


def to_huggingface(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Returns the tensors under the names of transformers' ViTModel, qkv split."""
    renamed = {}
    for name, array in tensors.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        prefix = f"encoder.layer.{block[1]}." if block else ""
        inner = name[block.end() :] if block else name
        module, dot, leaf = inner.rpartition(".")
        if module == "attn.qkv":
            for part, rows in zip(_QKV, np.split(array, 3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{leaf}"] = rows.copy()
        else:
            module, leaf = (module, leaf) if dot else (leaf, "")
            renamed[prefix + HUGGINGFACE[module] + dot + leaf] = array
    return renamed


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


def _save_safetensors(path: pathlib.Path, tensors: Tensors, meta: Meta) -> None:
    from safetensors.numpy import save

    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()}
    # Files without a `format` are refused by transformers 4.
    # `save_file` would make a file for nobody but its owner.
    path.write_bytes(save(tensors, metadata=text | {"format": "pt"}))


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
        lambda path, tensors, meta: _save_torch(path, {"model": tensors, "meta": meta})
    ),
    "flat": Layout(lambda path, tensors, _: _save_torch(path, tensors)),
    "safetensors": Layout(_save_safetensors, (".safetensors",), needs_torch=False),
    "pass": Layout(
        lambda path, tensors, meta: _save_torch(
            path, {"model": split_positions(tensors), "meta": meta}
        ),
        verified="Verified without PASS's part tokens, with which its features differ",
    ),
    "transreid": Layout(
        lambda path, tensors, _: _save_torch(path, head.to_transreid(tensors)),
        has_neck=True,
    ),
    "cluster-contrast": Layout(
        lambda path, tensors, meta: _save_torch(
            path, {"state_dict": head.to_cluster_contrast(tensors), "meta": meta}
        ),
        has_neck=True,
    ),
    "huggingface": Layout(_save_huggingface, ()),
}
