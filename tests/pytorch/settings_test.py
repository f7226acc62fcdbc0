"""Promises of reading a ViT's file as it is: nothing but the file says how."""

import numpy as np
import pytest
import torch_files
from exported import small_config, trained_like, vit_config
from safetensors.numpy import save_file
from torch_files import learned_table, save_torch

from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneInitConfig
from personmae_jax.errors import ConfigError
from personmae_jax.pytorch import file_settings, weights
from personmae_jax.pytorch.export import encoder_tensors
from personmae_jax.pytorch.importer import read_encoder, settings_of_file
from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.model_card import describe_export
from personmae_jax.pytorch.positions import resample_positions
from personmae_jax.pytorch.read import open_file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "vit.safetensors"


def vit() -> Config:
    """Heads of 64, on 16 x 8 patches of 4 pixels."""
    cfg = vit_config(128, 2, 2, patch_size=4, mlp_ratio=3)
    cfg.data.height, cfg.data.width = 64, 32
    return cfg


def settings_of(file, size=None, **told):
    return settings_of_file(FinetuneInitConfig(torch_weights=str(file), **told), size)


def architecture(cfg: Config) -> tuple[int, ...]:
    encoder = cfg.encoder
    sizes = (encoder.width, encoder.depth, encoder.num_heads, encoder.mlp_ratio)
    return (*sizes, encoder.patch_size, cfg.data.height, cfg.data.width)


def test_what_a_file_says_of_itself_is_no_tuple_of_tuples(tmp_path):
    nested = ()
    for _ in range(60):  # as text 2**60 brackets
        nested = (nested, nested)
    meta = {"num_heads": nested, "layer_norm_eps": nested}
    path = save_torch(tmp_path / "f.pth", {"meta": meta})
    assert file_settings._own_meta(open_file(path)) == {}


def test_a_strangers_file_tells_architecture_and_size(file):
    save_file(torch_files.make_tensors(vit()), file)
    cfg = settings_of(file)
    assert architecture(cfg) == architecture(vit())
    assert not cfg.encoder.learned_positions
    assert cfg.data.mean == Config().data.mean
    read_encoder(cfg)


@pytest.mark.parametrize(("patches", "size"), [(196, (56, 56)), (128, (64, 32))])
def test_a_learned_table_is_taken_for_its_own_grid(file, patches, size):
    tensors = torch_files.make_tensors(vit())
    table = learned_table(vit(), patches)
    save_file(tensors | {"pos_embed": table}, file)
    cfg = settings_of(file)
    assert (cfg.data.height, cfg.data.width) == size
    np.testing.assert_array_equal(read_encoder(cfg)[0]["pos_embed"], table)


def test_a_given_size_wins_and_the_codes_keep_their_coordinates(file):
    save_file(torch_files.make_tensors(vit()), file)
    cfg = settings_of(file, (96, 32))
    assert (cfg.grid, cfg.pos_embed_grid) == ((24, 8), (16, 8))
    assert "pos_embed" not in read_encoder(cfg)[0]


def test_our_export_tells_heads_grid_and_statistics_as_well(file):
    cfg = small_config()
    cfg.data.mean, cfg.data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    tensors = encoder_tensors(cfg, trained_like(cfg.encoder), (5, 5))
    about = {"git_revision": None, "versions": {}, "config": {}}
    meta = describe_export(cfg, (5, 5), "student", 0, about)
    LAYOUTS["safetensors"].write(file, tensors, meta)
    found = settings_of(file)
    assert architecture(found) == architecture(cfg)  # heads of 8
    assert (found.grid, found.pos_embed_grid) == (cfg.grid, cfg.grid)
    assert (found.data.mean, found.data.std) == (cfg.data.mean, cfg.data.std)


def refusal(file, size=None) -> str:
    with pytest.raises(ConfigError) as error:
        read_encoder(settings_of(file, size))
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
        ({"blocks.70.norm1.bias": (128,)}, "missing keys: blocks.10.attn"),
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
    cfg = settings_of(file)
    assert (cfg.data.mean, cfg.data.std) == (Config().data.mean, Config().data.std)
    shapes = weights.tensor_shapes(cfg.encoder, cfg.grid)
    assert shapes["pos_embed"] == (1, 129, 128)


@pytest.mark.parametrize(
    ("width", "depth", "heads"),
    [
        (1152, 1, 16),
        (1280, 1, 16),
        (1408, 1, 16),
        (768, 8, 8),
        (768, 1, 12),
        (128, 2, 2),
    ],
)
def test_heads_that_no_tensor_tells_are_those_of_the_known_vit_and_called_a_guess(
    file, width, depth, heads
):
    cfg = vit_config(width, depth, heads, patch_size=4, mlp_ratio=1)
    cfg.data.height, cfg.data.width = 8, 4
    save_file(torch_files.make_tensors(cfg), file)
    found = settings_of(file)
    assert found.encoder.num_heads == heads
    assert guess_of(found).startswith(f"GUESS: it was made for {heads} heads, pixels")


def guess_of(cfg) -> str:
    notes = read_encoder(cfg)[1]
    return " ".join(note for note in notes if note.startswith("GUESS"))


def test_what_no_tensor_tells_is_called_a_guess_until_somebody_says_it(file):
    save_file(torch_files.make_tensors(vit()), file)
    assert guess_of(settings_of(file)) == (
        "GUESS: it was made for 2 heads, pixels of mean (0.485, 0.456, 0.406) and std "
        "(0.229, 0.224, 0.225), LayerNorm's eps 1e-06; no tensor tells."
    )
    half = (0.5, 0.5, 0.5)
    found = settings_of(file, num_heads=8, mean=half, std=half)
    assert (found.encoder.num_heads, found.data.mean, found.data.std) == (8, half, half)
    assert guess_of(found).startswith("GUESS: it was made for LayerNorm's eps 1e-06;")


def test_what_is_said_by_a_setting_overrules_what_the_file_says(file):
    meta = {"num_heads": "4", "mean": "[0.1, 0.2, 0.3]", "std": "[0.1, 0.2, 0.3]"}
    save_file(torch_files.make_tensors(vit()), file, metadata=meta)
    assert settings_of(file).encoder.num_heads == 4
    found = settings_of(file, num_heads=8, mean=(0.5, 0.4, 0.3))
    assert (found.encoder.num_heads, found.data.mean) == (8, (0.5, 0.4, 0.3))
    assert found.data.std == (0.1, 0.2, 0.3)
    assert not [note for note in read_encoder(found)[1] if "WARNING" in note]


@pytest.mark.parametrize("grid", [(16, 12), (24, 8), (12, 16)])
def test_a_grid_that_is_said_is_that_of_the_learned_positions(file, grid):
    cfg = vit()
    table = learned_table(cfg, 192)
    save_file(torch_files.make_tensors(cfg) | {"pos_embed": table}, file)
    found = settings_of(file, grid=grid)
    assert found.grid == grid
    np.testing.assert_array_equal(read_encoder(found)[0]["pos_embed"], table)
    assert "positions" not in guess_of(found)
    # Of another size they are resampled from there, also where the size has as many.
    for size in ((64, 32), (96, 32)):
        found = settings_of(file, size, grid=grid)
        expected = resample_positions(table, grid, found.grid)
        positions = read_encoder(found)[0]["pos_embed"]
        np.testing.assert_array_equal(positions, expected)


def test_a_grid_of_another_number_of_patches_is_refused(file):
    save_file(torch_files.make_tensors(vit()) | learned(196), file)
    with pytest.raises(ConfigError, match=r"196 patches.*\(not 16 x 12\)"):
        settings_of(file, grid=(16, 12))


def test_another_grid_than_that_of_fixed_codes_is_refused(file):
    save_file(torch_files.make_tensors(vit()), file)
    read_encoder(settings_of(file, grid=(16, 8)))
    with pytest.raises(ConfigError, match="codes of 16 x 8 patches, not of 8 x 16"):
        read_encoder(settings_of(file, grid=(8, 16)))


def test_a_grid_that_was_guessed_from_a_number_is_said(file):
    save_file(torch_files.make_tensors(vit()) | learned(192), file)
    found = settings_of(file, (96, 32))
    assert guess_of(found).startswith("GUESS: its 192 positions are of 24 x 8. Its")


def learned(patches):
    return {"pos_embed": learned_table(vit(), patches)}


@pytest.mark.parametrize("size", [(64, 31), (63, 32)])
def test_a_size_that_is_no_multiple_of_the_files_patches_is_refused(file, size):
    save_file(torch_files.make_tensors(vit()), file)
    with pytest.raises(ConfigError, match="not a multiple of .*patch_size=4; use e.g."):
        settings_of(file, size)


def test_statistics_that_cannot_normalise_are_refused(file):
    save_file(torch_files.make_tensors(vit()), file, metadata={"std": "[0, 1, 1]"})
    assert "must be in 0.001 .. 1" in refusal(file)
    with pytest.raises(ConfigError, match="must be in 0.001 .. 1"):
        settings_of(file, std=(0.5, -1.0, 0.5))


def test_the_json_files_of_transformers_beside_the_file_tell_the_rest(file):
    save_file(torch_files.make_tensors(vit()), file)
    for name, text in (
        ("config", '{"model_type": "vit", "layer_norm_eps": 1e-12}'),
        (
            "preprocessor_config",
            """{"do_normalize": true, "image_mean": [0.5, 0.5, 1],
            "image_std": [0.5, 0.5, 0.25]}""",
        ),
    ):
        (file.parent / f"{name}.json").write_text(text)
    found = settings_of(file)
    assert found.data.mean == (0.5, 0.5, 1.0)
    assert guess_of(found) == "GUESS: it was made for 2 heads; no tensor tells."
    notes = " ".join(read_encoder(found)[1])
    assert "Its LayerNorm has an eps of 1e-12, here it is 1e-06." in notes
    found.data.mean = (0.4, 0.4, 0.4)  # as a pretraining has its own
    assert "WARNING: it was made for pixels of mean (0.5, 0.5, 1.0)" in " ".join(
        read_encoder(found)[1]
    )


def test_a_config_json_of_transformers_beside_the_file_tells_the_heads(file):
    save_file(torch_files.make_tensors(vit()), file)
    config = file.parent / "config.json"
    config.write_text('{"model_type": "vit", "num_attention_heads": 8}')
    found = settings_of(file)
    assert found.encoder.num_heads == 8
    assert "heads" not in guess_of(found)
    assert "JSON files beside it tell num_heads." in read_encoder(found)[1]
    for other in ("hidden_size", "num_hidden_layers"):  # of a network of another size
        config.write_text(
            f'{{"model_type": "vit", "num_attention_heads": 8, "{other}": 1024}}'
        )
        assert settings_of(file).encoder.num_heads == 2
    for heads in ('"8"', "0", "-1", "true", "1e400", "[" * 10**5):
        text = f'{{"model_type": "vit", "num_attention_heads": {heads}}}'
        config.write_text(text)
        assert settings_of(file).encoder.num_heads == 2


def test_another_activation_than_the_exact_gelu_is_said(file):
    save_file(torch_files.make_tensors(vit()), file)
    for activation, is_said in (("gelu", False), ("quick_gelu", True), ("relu", True)):
        text = f'{{"model_type": "vit", "hidden_act": "{activation}"}}'
        (file.parent / "config.json").write_text(text)
        notes = " ".join(read_encoder(settings_of(file))[1])
        assert (f"WARNING: its activation is {activation}, here" in notes) == is_said


def test_a_refusal_is_no_longer_than_a_screen(file):
    names = {f"strange.{i}": np.zeros(1, "f4") for i in range(5000)}
    save_file(torch_files.make_tensors(vit()) | names, file)
    text = refusal(file)
    assert " and 4988 more" in text
    assert len(text) < 1500
