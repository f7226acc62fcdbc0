"""Every file that people start from becomes our encoder, bit for bit, or is refused."""

import jax
import numpy as np
import pytest
import torch_files
from safetensors.numpy import save_file
from tiny import init_params, tiny_config
from torch_files import noise, prefixed, save_torch, training_state

from personmae_jax.config import Config
from personmae_jax.errors import ConfigError
from personmae_jax.pytorch import layouts, weights
from personmae_jax.pytorch.importer import read_encoder
from personmae_jax.pytorch.model_card import describe_export

OWN_META = describe_export(
    tiny_config(),
    (4, 2),
    "student",
    0,
    {"git_revision": None, "versions": {}, "config": {}},
)
DINO_HEAD = noise("head.mlp.0.weight", "head.last_layer.weight_g")


def mae(tensors):
    extras = noise("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")
    return {"model": tensors | extras | noise("decoder_embed.weight")}


def dino(tensors):
    other = prefixed("module.backbone.", {n: v + 1 for n, v in tensors.items()})
    return {
        "student": other | prefixed("module.", DINO_HEAD),
        "teacher": prefixed("backbone.", tensors) | DINO_HEAD,
        **training_state(),
        # DINO's learning rates are numpy's.
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3) * 2}]},
    }


def fine_tuned(tensors):
    head = noise("bottleneck.running_mean", "classifier.weight", "classifier_1.weight")
    return prefixed("base.", tensors | noise("fc.weight")) | head


FILES = {
    "MAE": mae,
    "MAE, a training checkpoint": lambda t: mae(t) | training_state(),
    "HAP": lambda t: mae(t) | training_state() | {"arch": "pose_mae_vit_base_patch16"},
    "DeiT": lambda t: {"model": t | noise("head.weight", "head.bias")},
    "timm, bare": lambda t: t | noise("head.weight", "pre_logits.fc.weight"),
    "timm, global pool beside its norm": lambda t: t | noise("fc_norm.weight"),
    "timm, trained": lambda t: {
        "state_dict": {n: v + 1 for n, v in t.items()},
        "state_dict_ema": prefixed("module.", t),
    },
    "TransReID-SSL": dino,
    "TransReID-SSL, teacher in DDP": lambda t: {
        "teacher": prefixed("module.backbone.", t) | prefixed("module.", DINO_HEAD)
    },
    "TransReID-SSL, student alone": lambda t: {
        "student": prefixed("module.backbone.", t) | prefixed("module.", DINO_HEAD)
    },
    "TransReID, fine-tuned": fine_tuned,
    "PASS": lambda t: {
        "teacher": prefixed("backbone.", torch_files.split_pass(t))
        | noise("head.mlp_pt1.0.weight", "head.last_layer_cls.weight_v")
    },
    "PASS, converted": torch_files.split_pass,
    "PersonViT": lambda t: {
        "teacher": prefixed("backbone.", t | noise("masked_embed"))
        | DINO_HEAD
        | noise("head.mlp2.0.weight", "head.last_layer2.weight_v")
    },
    "MAE, fine-tuned with pooling": lambda t: {
        "model": {
            n.replace("norm.", "fc_norm.") if n[:5] == "norm." else n: v
            for n, v in t.items()
        }
        | noise("head.weight")
    },
    "I-JEPA": lambda t: {
        "encoder": prefixed("module.", {n: v + 1 for n, v in t.items()}),
        "target_encoder": prefixed("module.", t),
    },
    "DeepSpeed": lambda t: {"module": t},
    "net": lambda t: {"net": t},
    "Lightning": lambda t: {
        "state_dict": prefixed("model.", t) | noise("criterion.prototypes"),
        "pytorch-lightning_version": "2.5",
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "fast-reid": lambda t: {
        "model": prefixed("backbone.", t)
        | noise("heads.bottleneck.0.weight", "heads.weight", "pixel_mean"),
        **training_state(),
    },
    "compiled": lambda t: {"model": prefixed("_orig_mod.", t)},
    "transformers, with a head": lambda t: (
        prefixed("vit.", layouts.to_huggingface(t) | noise("pooler.dense.weight"))
        | noise("classifier.weight")
    ),
}


def with_file(path, **encoder) -> Config:
    cfg = tiny_config()
    for name, value in encoder.items():
        setattr(cfg.encoder, name, value)
    cfg.init.torch_weights = str(path)
    return cfg


def assert_encoder(params, tensors, pos_embed=None):
    """`params` are bit for bit those of `tensors`, and as our network names them."""
    cfg = tiny_config()
    cfg.encoder.learned_positions = pos_embed is not None
    names = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, names["encoder"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    back = weights.encoder_to_torch(params, tensors["pos_embed"])
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name, strict=True)
    if pos_embed is not None:
        np.testing.assert_array_equal(params["pos_embed"], pos_embed, strict=True)


@pytest.fixture
def tensors():
    return torch_files.make_tensors(tiny_config())


@pytest.mark.parametrize("kind", FILES)
def test_the_files_of_other_projects_become_our_encoder(kind, tensors, tmp_path):
    path = save_torch(tmp_path / "file.pth", FILES[kind](tensors))
    params, notes = read_encoder(with_file(path))
    assert_encoder(params, tensors)
    assert notes[0].startswith(f"Encoder from {path}")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_our_own_exports_come_back_bit_for_bit(layout, tensors, tmp_path):
    chosen = layouts.LAYOUTS[layout]
    if chosen.needs_torch:
        pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / f"export{chosen.suffixes[0] if chosen.suffixes else ''}"
    chosen.write(path, tensors, OWN_META)
    cfg = with_file(path if path.is_file() else path / "model.safetensors")
    assert_encoder(read_encoder(cfg)[0], tensors)


@pytest.mark.parametrize("kind", ["MAE", "TransReID-SSL", "PASS", "PersonViT"])
def test_what_is_left_out_is_told_by_name(kind, tensors, tmp_path):
    path = save_torch(tmp_path / "file.pth", FILES[kind](tensors))
    notes = read_encoder(with_file(path))[1]
    left_out = notes[-1]
    names = {
        "MAE": "mask_token, decoder_pos_embed, decoder_blocks.0.norm1.weight, "
        "decoder_embed.weight",
        "TransReID-SSL": "head.mlp.0.weight, head.last_layer.weight_g",
        "PASS": ", ".join(
            [f"backbone.part_token{i}" for i in (1, 2, 3)]
            + [f"backbone.part{i}_pos" for i in (1, 2, 3)]
            + ["head.mlp_pt1.0.weight", "head.last_layer_cls.weight_v"]
        ),
        "PersonViT": "backbone.masked_embed, head.mlp.0.weight, "
        "head.last_layer.weight_g, head.mlp2.0.weight, head.last_layer2.weight_v",
    }
    assert left_out == f"Left out of it: {names[kind]}."


def test_beits_biases_are_joined_with_zeros_for_the_keys(tensors, tmp_path):
    path = save_torch(tmp_path / "b.pth", {"model": torch_files.split_beit(tensors)})
    for i in range(2):
        tensors[f"blocks.{i}.attn.qkv.bias"][16:32] = 0
    assert_encoder(read_encoder(with_file(path))[0], tensors)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_no_file_needs_torch_to_be_read(kind, tensors, tmp_path, monkeypatch):
    path = tmp_path / "file"
    if kind == "torch":
        save_torch(path, {"model": tensors})
    else:
        save_file(tensors | noise("head.weight"), path)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # cannot be imported
    assert_encoder(read_encoder(with_file(path))[0], tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_other_precisions_become_float32(kind, dtype, tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    halves = {
        name: torch.from_numpy(value).to(getattr(torch, dtype))
        for name, value in tensors.items()
    }
    path = tmp_path / "file"
    if kind == "torch":
        torch.save(halves, path)
    else:
        from safetensors import torch as safetensors_torch

        safetensors_torch.save_file(halves, path)
    expected = {name: value.float().numpy() for name, value in halves.items()}
    assert_encoder(read_encoder(with_file(path))[0], expected)


def test_strided_and_shared_tensors_are_read_as_they_look(tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    content = {name: torch.from_numpy(value) for name, value in tensors.items()}
    name = "blocks.0.attn.proj.weight"
    content[name] = content[name].t()
    content["blocks.1.norm1.bias"] = content["blocks.0.norm1.bias"]
    content["norm.bias"] = content["blocks.0.mlp.fc1.bias"][3:19]
    torch.save(content, tmp_path / "file.pth")
    tensors[name] = tensors[name].T
    tensors["blocks.1.norm1.bias"] = tensors["blocks.0.norm1.bias"]
    tensors["norm.bias"] = tensors["blocks.0.mlp.fc1.bias"][3:19]
    assert_encoder(read_encoder(with_file(tmp_path / "file.pth"))[0], tensors)


def refusal(cfg) -> str:
    with pytest.raises(ConfigError) as error:
        read_encoder(cfg)
    return str(error.value)


def test_missing_unexpected_and_misshapen_tensors_are_listed(tensors, tmp_path):
    del tensors["norm.bias"], tensors["blocks.1.attn.qkv.weight"]
    tensors |= noise("blocks.0.gamma_1", "time_embed", "blocks.2.norm1.weight")
    tensors["blocks.0.mlp.fc1.bias"] = np.zeros(3, np.float32)
    tensors["note"] = "text"  # no tensor: left out
    path = save_torch(tmp_path / "file.pth", {"model": tensors})
    first, *lines = refusal(with_file(path)).split("\n  ")
    assert "is not the encoder of these settings" in first
    assert lines == [
        "missing keys: blocks.1.attn.qkv.weight, norm.bias",
        "unexpected keys: blocks.0.gamma_1, blocks.2.norm1.weight, time_embed",
        "shape mismatch: blocks.0.mlp.fc1.bias (3,) instead of (64,)",
    ]


def test_names_beside_the_encoder_are_left_out_and_told(tensors, tmp_path):
    content = prefixed("visual.", tensors) | noise("norm.weight", "text.proj")
    params, notes = read_encoder(with_file(save_torch(tmp_path / "f.pth", content)))
    assert_encoder(params, tensors)
    assert notes[-1] == "Left out of it: norm.weight, text.proj."
    del content["visual.norm.weight"]  # the other is not taken in its place
    text = refusal(with_file(save_torch(tmp_path / "f.pth", content)))
    assert text.endswith("missing keys: norm.weight")


@pytest.mark.parametrize(
    ("encoder", "hint"),
    [
        ({"width": 128, "num_heads": 2}, "encoder.width=128 --config.encoder.depth=2"),
        ({"depth": 3}, "seem to be --config.encoder.depth=3:"),
        ({"patch_size": 2}, "seem to be --config.encoder.patch_size=2:"),
        ({"mlp_ratio": 2}, "seem to be --config.encoder.mlp_ratio=2:"),
    ],
)
def test_an_encoder_of_another_size_is_refused_with_the_right_settings(
    encoder, hint, tmp_path
):
    there, here = with_file("x", **encoder), {"depth": 1} if "width" in encoder else {}
    path = save_torch(tmp_path / "f.pth", torch_files.make_tensors(there))
    text = refusal(with_file(path, **here))
    assert hint in text
    assert "shape mismatch: " in text or "unexpected keys: blocks.2." in text


def test_a_convolutional_stem_is_named(tensors, tmp_path):
    tensors |= noise("patch_embed.conv.0.weight")
    path = save_torch(tmp_path / "f.pth", tensors)
    text = refusal(with_file(path))
    assert "stem is convolutional" in text
    assert "unexpected keys: patch_embed.conv.0.weight" in text


def test_a_number_of_heads_that_our_export_tells_must_be_the_runs(tensors, tmp_path):
    path = save_torch(tmp_path / "f.pth", {"model": tensors, "meta": {"num_heads": 4}})
    assert "--config.encoder.num_heads=4" in refusal(with_file(path))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"weight": 1}}])
def test_a_file_without_a_vit_is_refused(content, tmp_path):
    path = save_torch(tmp_path / "f.pth", content)
    assert "holds no ViT: nothing is called cls_token" in refusal(with_file(path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(value, tensors, tmp_path):
    tensors["blocks.1.mlp.fc2.weight"][3, 4] = value
    path = save_torch(tmp_path / "f.pth", tensors)
    text = refusal(with_file(path))
    assert "blocks.1.mlp.fc2.weight is not finite in 1 of 1024 places" in text


def test_integers_are_refused_by_name(tensors, tmp_path):
    tensors["norm.bias"] = np.arange(16)
    path = save_torch(tmp_path / "f.pth", tensors)
    assert "norm.bias is of type int64" in refusal(with_file(path))
