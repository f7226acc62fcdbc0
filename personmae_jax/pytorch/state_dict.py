"""Finds a ViT's tensors in files of other projects and gives them timm's names.

Facts about such files, by the code that writes them:
  MAE, HAP, MALE: {"model": ...} with `decoder_*` and `mask_token`.
  DeiT: {"model": ...} with `head.*`; distilled ones with `dist_token`, `head_dist.*`
    and a second row of positions. timm: a bare dict, `head.*`, `fc_norm.*`,
    `pre_logits.*`; from its train.py {"state_dict", "state_dict_ema"}.
  DINO and its kin TransReID-SSL, PASS, PersonViT: {"student", "teacher", ...} with
    `module.`, `backbone.` and `head.*`; their convert_model_dino.py writes a bare dict.
  PASS: `cls_pos` apart from `pos_embed`, `part_token1..3`, `part1..3_pos`.
  TransReID and its kin, fine-tuned: `base.`, `fc.*`, `bottleneck*`, `classifier*`.
  BEiT: `attn.q_bias` and `attn.v_bias` in the place of `attn.qkv.bias`.
  transformers' ViTModel: names of its own, `pooler.*`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from personmae_jax.pytorch import layouts
from personmae_jax.pytorch.stored import Stored

# Parts of a file's network that are not an encoder's.
_DROPPED = re.compile(
    r"decoder_.*|decoder\..*|(embeddings\.)?mask_token|masked_embed"
    r"|head\..*|head_dist\..*|dist_token|(embeddings\.)?distillation_token"
    r"|pre_logits\..*|lm_head\..*"
    r"|pooler\..*|fc\..*|classifier(_\w+)?\..*|bottleneck(_\w+)?\..*"
    r"|part_token[123]|part[123]_pos|sie_embed"
)

_MAX_DEPTH = 16  # of dicts in dicts; files of training frameworks have 4
_MAX_PREFIX = 4096  # characters; a long one would be repeated for every dict below it

# Heads of known ViTs, by width, where they are not 64 wide: So400m; MAE's ViT-H; timm's
# ViT-g; open_clip's ViT-bigG.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


class Recognised(NamedTuple):
    """The encoder's tensors in a file."""

    # By timm's names; what no encoder of ours has is still among them.
    tensors: dict[str, Stored]
    dropped: list[str]  # names of what was left out, as in the file
    where: str  # what their names begin with, keys of dicts included, e.g. "model"
    others: Sequence[str] = ()  # what the names of other ViTs in the file begin with


def recognise(tree: Mapping[Any, Any], prefix: str | None = None) -> Recognised:
    """Returns the encoder's tensors in a file.

    Of several ViTs it is the one that is an average of others, as of a teacher, which
    their own users take; where that leaves none or several, `prefix` must choose.
    Inside the ViT nothing is left out but what `_DROPPED` names: the caller refuses
    other names.

    Args:
      tree: As `read.open_file` returns it.
      prefix: What all names of the ViT begin with, keys of dicts included.

    Raises:
      ValueError: The end of a sentence on the file.
    """
    found = dict(_find_vits(tree))
    names = sorted(found)
    if prefix is not None:
        names = [name for name in names if name.strip(".") == prefix.strip(".")]
    elif len(names) > 1:
        names = [name for name in names if _is_average(name)]
    if len(names) == 1:
        others = sorted(found.keys() - {*names})
        return _select(names[0], *found[names[0]])._replace(others=others)
    if not found:
        top = some([*map(str, tree)]) or "no names"
        raise ValueError(
            f"holds no ViT: nothing is called cls_token; at its top: {top}"
        )
    there = some([name.strip(".") or "(the top)" for name in sorted(found)])
    if prefix is None:
        raise ValueError(
            f"holds several ViTs; choose one with --config.init.prefix, of: {there}"
        )
    raise ValueError(
        f"holds no ViT below config.init.prefix={prefix[:200]}; there are: {there}"
    )


def _find_vits(tree: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[Mapping, str]]]:
    """The whole prefix of every ViT, its dict, and the prefix inside that."""
    waiting, seen = [("", tree, 0)], set()
    for keys, inner, depth in waiting:  # grows
        if id(inner) in seen or depth > _MAX_DEPTH:  # it may be shared, or hold itself
            continue
        seen.add(id(inner))
        for key, value in inner.items():
            if len(keys) + len(str(key)) > _MAX_PREFIX:
                continue
            if isinstance(value, dict):
                waiting.append((f"{keys}{key}.", value, depth + 1))
            elif isinstance(value, Stored) and str(key).split(".")[-1] == "cls_token":
                own = str(key).removesuffix("cls_token").removesuffix("embeddings.")
                yield keys + own, (inner, own)


def _is_average(name: str) -> bool:
    words = re.split(r"[._]", name)
    return "ema" in words or "teacher" in words or "target_encoder" in name


def _select(name: str, stored: Mapping[Any, Any], prefix: str) -> Recognised:
    """The ViT whose names begin with `prefix`, by timm's names."""
    named, dropped = {}, []
    for key, value in ((str(key), value) for key, value in stored.items()):
        inner = key.removeprefix(prefix)
        is_tensor = isinstance(value, Stored)  # not an epoch, nor another network
        if not (is_tensor and key.startswith(prefix)) or _DROPPED.fullmatch(inner):
            dropped.append(key)
        else:
            new = _rename(inner)
            named[f"{key} (again)" if new in named else new] = value
    # MAE's fine-tuned models have their only final norm behind the pooling.
    for leaf in ("weight", "bias"):
        pooled = named.pop(f"fc_norm.{leaf}", None)
        if pooled is not None and f"norm.{leaf}" in named:
            dropped.append(f"{prefix}fc_norm.{leaf}")
        elif pooled is not None:
            named[f"norm.{leaf}"] = pooled
    has_dist = any(
        key.startswith(prefix) and re.search("dist(illation)?_token$", key)
        for key in dropped
    )
    tensors = _join_positions(_join_qkv(named), has_dist)
    return Recognised(tensors, dropped, name.strip("."))


def some(names: Sequence[str], limit: int = 12) -> str:
    """The first names, and how many more there are: a screen is not to be flooded."""
    more = len(names) - limit
    shown = (repr(name[:200])[1:-1] for name in names[:limit])  # one line
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _rename(name: str) -> str:
    """Timm's name for one of transformers'; others stay."""
    canonical = {theirs: ours for ours, theirs in layouts.HUGGINGFACE.items()}
    canonical["attention.o_proj"] = "attn.proj"  # of version 5, as below
    block = re.match(r"(?:encoder\.layer|layers)\.(\d+)\.", name)
    prefix, inner = (
        (f"blocks.{block[1]}.", name[block.end() :]) if block else ("", name)
    )
    part = re.fullmatch(
        r"attention\.(?:attention\.(query|key|value)|([qkv])_proj)\.(\w+)", inner
    )
    if part:
        return f"{prefix}attn.{(part[1] or part[2])[0]}.{part[3]}"
    module, dot, leaf = inner.rpartition(".")
    if inner in canonical:
        return canonical[inner]
    if module in canonical:
        return prefix + canonical[module] + dot + leaf
    return prefix + inner


def _join_qkv(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Joins attn.q, k and v, and BEiT's attn.q_bias and v_bias (its keys have none)."""
    joined = dict(tensors)
    for name in tensors:
        match = re.fullmatch(r"(.*attn\.)q(\.weight|\.bias|_bias)", name)
        if not match:
            continue
        stem, leaf = match.groups()
        parts = [tensors.get(f"{stem}{part}{leaf}") for part in "qkv"]
        if leaf == "_bias" and parts[1] is None and isinstance(parts[0], Stored):
            shape = parts[0].shape
            parts[1] = Stored(
                shape, "float32", lambda shape=shape: np.zeros(shape, np.float32)
            )
        whole = _concatenate(parts, axis=0)
        target = f"{stem}qkv.{leaf[1:]}"
        if whole is not None and target not in tensors:
            for part in "qkv":
                joined.pop(f"{stem}{part}{leaf}", None)
            joined[target] = whole
    return joined


def _join_positions(tensors: Mapping[str, Stored], has_dist: bool) -> dict[str, Stored]:
    """Puts PASS's `cls_pos` before `pos_embed`; drops a distillation token's row."""
    joined = dict(tensors)
    table = joined.get("pos_embed")
    whole = _concatenate([joined.get("cls_pos"), table], axis=1)
    if whole is not None:
        del joined["cls_pos"]
        joined["pos_embed"] = whole
    elif has_dist and isinstance(table, Stored) and len(table.shape) == 3:
        b, t, d = table.shape
        joined["pos_embed"] = Stored(
            (b, t - 1, d), table.dtype, lambda: np.delete(table.array(), 1, axis=1)
        )
    return joined


def _concatenate(parts: list[Any], axis: int) -> Stored | None:
    """The parts end to end; None unless all are tensors that fit."""
    if not all(isinstance(part, Stored) and len(part.shape) > axis for part in parts):
        return None
    shapes = [list(part.shape) for part in parts]
    length = sum(shape.pop(axis) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        return None
    shape = (*shapes[0][:axis], length, *shapes[0][axis:])
    return Stored(
        shape,
        parts[0].dtype,
        lambda: np.concatenate([part.array() for part in parts], axis),
    )


def architecture(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Returns what shapes tell of an encoder, as fields of `config.EncoderConfig`.

    No shape tells the number of heads: it is that of the known ViT of this width, else
    for heads 64 wide. What there is no tensor for is left out.
    """
    shapes = {
        n: value.shape for n, value in tensors.items() if isinstance(value, Stored)
    }
    blocks = [re.match(r"blocks\.(\d{1,3})\.", name) for name in shapes]
    told = {}
    if width := shapes.get("cls_token", ())[-1:]:
        told = {"width": width[0], "num_heads": max(1, width[0] // 64)}
        told["num_heads"] = _HEADS.get(width[0], told["num_heads"])
        if hidden := shapes.get("blocks.0.mlp.fc1.weight", ())[:1]:
            told["mlp_ratio"] = hidden[0] // max(width[0], 1)
    if depth := [int(block[1]) for block in blocks if block]:
        told["depth"] = 1 + max(depth)
        if (told.get("width"), told["depth"]) == (768, 8):
            told["num_heads"] = 8  # TransReID's own small ViT
    if patch := shapes.get("patch_embed.proj.weight", ())[-1:]:
        told["patch_size"] = patch[0]
    return told
