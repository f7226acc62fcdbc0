"""Small stand-ins for the files of other projects, with the names that those have."""

import argparse
import pathlib

import numpy as np
import pytest

from personmae_jax.config import Config
from personmae_jax.pytorch import weights

Tensors = dict[str, np.ndarray]


def make_tensors(cfg: Config, *, seed: int = 0) -> Tensors:
    """Random tensors of an encoder of `cfg` by timm's names, positions fixed."""
    rng = np.random.default_rng(seed)
    shapes = weights.tensor_shapes(cfg.encoder, cfg.grid)
    tensors = {
        name: (0.3 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    table = weights.position_table(cfg.encoder.width, cfg.grid, cfg.grid)
    return tensors | {"pos_embed": table}


def learned_table(cfg: Config, num_patches: int, *, seed: int = 9) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (1, 1 + num_patches, cfg.encoder.width)
    return rng.standard_normal(shape).astype(np.float32)


def noise(*names: str) -> Tensors:
    return {name: np.full((2, 3), 7, np.float32) for name in names}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def split_pass(tensors: Tensors, *, seed: int = 5) -> Tensors:
    """As PASS has them: parts that differ from cls, positions apart."""
    rng, tensors = np.random.default_rng(seed), dict(tensors)
    table = tensors.pop("pos_embed")
    names = [f"part_token{i}" for i in (1, 2, 3)] + [f"part{i}_pos" for i in (1, 2, 3)]
    parts = {n: rng.normal(size=(1, 1, table.shape[2])).astype("f4") for n in names}
    return tensors | parts | {"cls_pos": table[:, :1], "pos_embed": table[:, 1:]}


def split_beit(tensors: Tensors) -> Tensors:
    """As BEiT has them: no bias of the keys."""
    result = {}
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias"):
            query, _, val = np.split(value, 3)
            stem = name.removesuffix("qkv.bias")
            result |= {f"{stem}q_bias": query, f"{stem}v_bias": val}
        else:
            result[name] = value
    return result


def training_state() -> dict:
    """What training checkpoints carry beside the weights."""
    return {
        "optimizer": {"state": {0: {"exp_avg": np.ones(3, "f4")}}, "param_groups": []},
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=1e-3, model="mae", betas=(0.9, 0.95)),
    }


def save_torch(path: pathlib.Path, content, **options) -> pathlib.Path:
    """Writes `content`, its arrays turned into tensors; skips where torch is absent."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(child) for key, child in value.items()}
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value))
        return value

    torch.save(convert(content), path, **options)
    return path
