"""Promises of reading a ViT's file as it is: nothing but the file says how."""

import numpy as np
import pytest
import torch_files
from exported import small_config, trained_like, vit_config
from safetensors.numpy import save_file
from torch_files import learned_table

from personmae_jax.config import Config
from personmae_jax.errors import ConfigError
from personmae_jax.pytorch import weights
from personmae_jax.pytorch.export import describe_export, encoder_tensors
from personmae_jax.pytorch.importer import read_encoder, read_settings
from personmae_jax.pytorch.layouts import LAYOUTS


@pytest.fixture
def file(tmp_path):
    return tmp_path / "vit.safetensors"


def vit() -> Config:
    """Heads of 64, on 16 x 8 patches of 4 pixels."""
    cfg = vit_config(128, 2, 2, patch_size=4, mlp_ratio=3)
    cfg.data.height, cfg.data.width = 64, 32
    return cfg


def architecture(cfg: Config) -> tuple[int, ...]:
    encoder = cfg.encoder
    sizes = (encoder.width, encoder.depth, encoder.num_heads, encoder.mlp_ratio)
    return (*sizes, encoder.patch_size, cfg.data.height, cfg.data.width)


def test_a_strangers_file_tells_architecture_and_size(file):
    save_file(torch_files.make_tensors(vit()), file)
    cfg = read_settings(str(file))
    assert architecture(cfg) == architecture(vit())
    assert not cfg.encoder.learned_positions
    assert cfg.data.mean == Config().data.mean
    read_encoder(cfg)


@pytest.mark.parametrize(("patches", "size"), [(196, (56, 56)), (128, (64, 32))])
def test_a_learned_table_is_taken_for_its_own_grid(file, patches, size):
    tensors = torch_files.make_tensors(vit())
    table = learned_table(vit(), patches)
    save_file(tensors | {"pos_embed": table}, file)
    cfg = read_settings(str(file))
    assert (cfg.data.height, cfg.data.width) == size
    np.testing.assert_array_equal(read_encoder(cfg).params["pos_embed"], table)


def test_a_given_size_wins_and_the_codes_keep_their_coordinates(file):
    save_file(torch_files.make_tensors(vit()), file)
    cfg = read_settings(str(file), (96, 32))
    assert (cfg.grid, cfg.pos_embed_grid) == ((24, 8), (16, 8))
    assert "pos_embed" not in read_encoder(cfg).params


def test_our_export_tells_heads_grid_and_statistics_as_well(file):
    cfg = small_config()
    cfg.data.mean, cfg.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    tensors = encoder_tensors(cfg, trained_like(cfg.encoder), (5, 5))
    about = {"git_revision": None, "versions": {}, "config": {}}
    meta = describe_export(cfg, (5, 5), "student", 0, about)
    LAYOUTS["safetensors"].write(file, tensors, meta)
    found = read_settings(str(file))
    assert architecture(found) == architecture(cfg)  # heads of 8
    assert (found.grid, found.pos_embed_grid) == (cfg.grid, cfg.grid)
    assert (found.data.mean, found.data.std) == (cfg.data.mean, cfg.data.std)


def refusal(file, size=None) -> str:
    with pytest.raises(ConfigError) as error:
        read_encoder(read_settings(str(file), size))
    return str(error.value)


def test_a_table_whose_grid_cannot_be_told_is_refused_unless_the_size_is_given(file):
    tensors = torch_files.make_tensors(vit())
    save_file(tensors | {"pos_embed": learned_table(vit(), 150)}, file)
    assert "150 patches, whose rows and columns cannot be told" in refusal(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cls_token": (1, 1, 0)}, "is unknown here: 0 wide"),
        ({"cls_token": (1, 1, 130)}, "130 wide"),
        ({"patch_embed.proj.weight": (128, 3, 4, 0)}, "is unknown here"),
        ({"pos_embed": (1, 129, 64)}, "shape mismatch: pos_embed"),
        ({"pos_embed": (129, 128)}, "shape mismatch: pos_embed"),
        ({"blocks.700.norm1.bias": (128,)}, "missing keys: blocks.10.attn"),
    ],
)
def test_hostile_shapes_are_refused_in_a_sentence(file, changes, words):
    tensors = torch_files.make_tensors(vit())
    strange = {name: np.zeros(shape, "f4") for name, shape in changes.items()}
    save_file(tensors | strange, file)
    assert words in refusal(file)


@pytest.mark.parametrize(
    "meta",
    [
        {"num_heads": "0"},
        {"num_heads": "-2"},
        {"num_heads": "5"},
    ],
)
def test_hostile_words_about_heads_are_refused(file, meta):
    save_file(torch_files.make_tensors(vit()), file, metadata=meta)
    assert "is unknown here" in refusal(file)


@pytest.mark.parametrize("value", ["[1, 2]", '"a"', "[NaN, 0.5, 0.5]", "{}", "[[[["])
def test_statistics_that_are_none_are_left_aside(file, value):
    meta = {"mean": value, "std": value, "trained_grid": value}
    save_file(torch_files.make_tensors(vit()), file, metadata=meta)
    cfg = read_settings(str(file))
    assert (cfg.data.mean, cfg.data.std) == (Config().data.mean, Config().data.std)
    shapes = weights.tensor_shapes(cfg.encoder, cfg.grid)
    assert shapes["pos_embed"] == (1, 129, 128)


@pytest.mark.parametrize(
    ("width", "depth", "heads"),
    [(1280, 1, 16), (1408, 1, 16), (768, 8, 8), (768, 1, 12), (128, 2, 2)],
)
def test_heads_that_no_tensor_tells_are_those_of_the_known_vit_and_called_a_guess(
    file, width, depth, heads
):
    cfg = vit_config(width, depth, heads, patch_size=4, mlp_ratio=1)
    cfg.data.height, cfg.data.width = 8, 4
    save_file(torch_files.make_tensors(cfg), file)
    found = read_settings(str(file))
    assert found.encoder.num_heads == heads
    assert f"GUESS: it has {heads} heads; no tensor tells." in read_encoder(found).notes


def test_a_config_json_of_transformers_beside_the_file_tells_the_heads(file):
    save_file(torch_files.make_tensors(vit()), file)
    config = file.parent / "config.json"
    config.write_text('{"model_type": "vit", "num_attention_heads": 8}')
    found = read_settings(str(file))
    assert found.encoder.num_heads == 8
    assert not [note for note in read_encoder(found).notes if "GUESS" in note]
    for heads in ('"8"', "0", "-1", "true", "1e400", "[" * 10**5):
        text = f'{{"model_type": "vit", "num_attention_heads": {heads}}}'
        config.write_text(text)
        assert read_settings(str(file)).encoder.num_heads == 2


def test_a_refusal_is_no_longer_than_a_screen(file):
    names = {f"strange.{i}": np.zeros(1, "f4") for i in range(5000)}
    save_file(torch_files.make_tensors(vit()) | names, file)
    text = refusal(file)
    assert " and 4988 more" in text
    assert len(text) < 1500
