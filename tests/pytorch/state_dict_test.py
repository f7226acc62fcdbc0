"""Which ViT of a file is taken, wherever it lies and however its tensors are called."""

import json

import pytest
import torch_files
from importer_test import assert_encoder, refusal, with_file
from safetensors.numpy import save_file
from tiny import tiny_config
from torch_files import noise, prefixed, save_torch

from personmae_jax.pytorch import layouts, state_dict
from personmae_jax.pytorch.importer import read_encoder
from personmae_jax.pytorch.stored import Stored


@pytest.fixture
def tensors():
    return torch_files.make_tensors(tiny_config())


def several(tensors):
    other = {name: value + 1 for name, value in tensors.items()}
    return {
        "a": prefixed("module.", other),
        "net": {"b": prefixed("x.", tensors) | prefixed("y.", other)},
        "optimizer": {"state": {}},
    }


def test_of_several_encoders_a_prefix_chooses_and_the_refusal_lists_them(
    tensors, tmp_path
):
    path = save_torch(tmp_path / "f.pth", several(tensors))
    cfg = with_file(path)
    assert refusal(cfg).endswith(
        "holds several ViTs; choose one with --config.init.prefix, of: a.module, "
        "net.b.x, net.b.y"
    )
    for prefix in ("net.b.x", "net.b.x."):
        cfg.init.prefix = prefix
        params, notes = read_encoder(cfg)
        assert_encoder(params, tensors)
        assert notes[0] == f"Encoder from {path} (net.b.x)."
    cfg.init.prefix = "net.b"
    assert refusal(cfg).endswith(
        "holds no ViT below config.init.prefix=net.b; there are: a.module, net.b.x, "
        "net.b.y"
    )


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("student", "teacher"),
        ("encoder", "target_encoder"),
        ("state_dict.student.net", "state_dict.teacher.net"),
    ],
)
def test_of_a_model_and_its_average_the_average_is_taken_and_that_is_said(
    plain, average, tensors, tmp_path
):
    other = {name: value + 1 for name, value in tensors.items()}
    content = {
        plain.split(".")[0]: prefixed(plain.partition(".")[2] + ".", other)
        if "." in plain
        else other
    }
    key, _, prefix = average.partition(".")
    content[key] = content.get(key, {}) | prefixed(prefix and prefix + ".", tensors)
    path = save_torch(tmp_path / "f.pth", content)
    params, notes = read_encoder(with_file(path))
    assert_encoder(params, tensors)
    assert notes[0] == f"Encoder from {path} ({average})."
    assert f"It also has {plain}.; config.init.prefix chooses." in notes


def test_a_name_that_means_the_same_as_another_is_refused(tensors, tmp_path):
    for content in (
        tensors | noise("layernorm.weight"),  # transformers' norm.weight
        noise("layernorm.weight") | tensors,
    ):
        path = save_torch(tmp_path / "f.pth", content)
        assert "norm.weight (again)" in refusal(with_file(path))


def test_a_module_of_transformers_5_that_torch_saved_is_read(tensors, tmp_path):
    names = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "encoder.layer": "layers",
    }
    content = {}
    for name, value in layouts.to_huggingface(tensors).items():
        for old, new in names.items():
            name = name.replace(old, new)
        content[name] = value
    content |= noise("embeddings.mask_token", "pooler.dense.weight")
    path = save_torch(tmp_path / "f.pth", prefixed("vit.", content))
    assert_encoder(read_encoder(with_file(path))[0], tensors)


def test_dicts_that_lie_deep_inside_dicts_are_not_searched(tensors):
    for depth, found in ((3, True), (3000, False)):
        tree = {
            n: Stored(a.shape, "float32", lambda a=a: a) for n, a in tensors.items()
        }
        for _ in range(depth):
            tree = {"a": tree}
        assert bool([*state_dict._find_vits(tree)]) == found


def test_a_long_name_is_not_repeated_for_all_that_is_below_it(tensors):
    stored = {n: Stored(a.shape, "float32", lambda a=a: a) for n, a in tensors.items()}
    for length, found in ((4000, True), (5000, False)):
        tree = {"k" * length: stored}
        assert bool([*state_dict._find_vits(tree)]) == found


def test_a_model_in_parts_is_read_by_its_index(tensors, tmp_path):
    names, index = [*tensors], tmp_path / "model.safetensors.index.json"
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "1.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, tmp_path / "2.safetensors")
    parts = {n: f"{1 + i % 2}.safetensors" for i, n in enumerate(names)}
    index.write_text(json.dumps({"weight_map": parts}))
    for path in (index, tmp_path):
        assert_encoder(read_encoder(with_file(path))[0], tensors)
    (tmp_path / "2.safetensors").unlink()
    assert "2.safetensors: there is no such file" in refusal(with_file(index))


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_an_index_that_is_none_is_refused(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert "is no index of a model in parts" in refusal(with_file(index))


@pytest.mark.parametrize(
    "name",
    [
        "../w",
        "/etc/w",
        "",
        "model.safetensors.index.json",
        "b.index.json",
        "a\0b",
        "\ud800",
    ],
)
def test_an_index_names_only_files_beside_it(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "is no index of a model in parts" in refusal(with_file(index))


def test_what_is_no_tensor_beside_them_is_left_out(tensors, tmp_path):
    path = save_torch(tmp_path / "f.pth", tensors | {"epoch": 3, "args": {"lr": 0.1}})
    params, _ = read_encoder(with_file(path))
    assert_encoder(params, tensors)


def test_names_that_a_refusal_lists_stay_on_its_line(tensors, tmp_path):
    path = save_torch(tmp_path / "f.pth", tensors | {"a\nb": tensors["norm.bias"]})
    assert "a\\nb" in refusal(with_file(path))
    assert len(refusal(with_file(path)).splitlines()) < 5
