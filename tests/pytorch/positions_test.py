"""Positions and input statistics of imported encoders, checked against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from importer_test import assert_encoder, refusal, with_file
from safetensors.numpy import save_file
from tiny import tiny_config
from torch_files import learned_table, prefixed, save_torch

from personmae_jax import pixels
from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneInitConfig
from personmae_jax.errors import ConfigError
from personmae_jax.models import personmae
from personmae_jax.pixels import patchify
from personmae_jax.pytorch import layouts, weights
from personmae_jax.pytorch.importer import (
    fold_normalisation,
    read_encoder,
    settings_of_file,
)
from personmae_jax.pytorch.positions import resample_positions

# Two blocks of float32 sums in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def tensors():
    return torch_files.make_tensors(tiny_config())


def table_of(trained, grid=None):
    return weights.position_table(16, trained, grid or trained)


def our_tokens(cfg: Config, params, images: np.ndarray) -> np.ndarray:
    """Of pixels in 0..1."""
    patches = patchify(jnp.asarray(images), cfg.encoder.patch_size)
    mean, std = (np.tile(x, 16) for x in (cfg.data.mean, cfg.data.std))
    patches = (patches - mean[None, None]) / std[None, None]
    arrays = jax.tree.map(jnp.asarray, params)
    return np.asarray(personmae.encode(cfg.encoder, cfg.grid, arrays, patches).tokens)


def their_tokens(cfg: Config, tensors, images, mean, std) -> np.ndarray:
    pytest.importorskip("torch", reason="torch is not installed")
    from personmae_jax.pytorch import vit

    inputs = ((images - np.array(mean)) / np.array(std)).astype(np.float32)
    return vit.encode(cfg.encoder, tensors, inputs)


@pytest.fixture
def images():
    return np.random.default_rng(3).random((2, 16, 8, 3), np.float32)


@pytest.mark.parametrize("is_learned", [False, True])
def test_an_imported_encoder_answers_as_in_pytorch(
    is_learned, tensors, images, tmp_path
):
    if is_learned:
        tensors["pos_embed"] = learned_table(tiny_config(), 8)
    path = save_torch(tmp_path / "f.pth", tensors)
    cfg = with_file(path, learned_positions=is_learned)
    params = read_encoder(cfg)[0]
    expected = their_tokens(cfg, tensors, images, cfg.data.mean, cfg.data.std)
    np.testing.assert_allclose(our_tokens(cfg, params, images), expected, **TOLERANCE)


def test_folding_the_input_normalisation_leaves_every_answer_as_it_was(
    tensors, images, tmp_path
):
    path = save_torch(tmp_path / "f.pth", tensors)
    cfg, plain = with_file(path), with_file(path)
    cfg.init.fold_normalisation = True
    cfg.data.mean, cfg.data.std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    expected = their_tokens(cfg, tensors, images, (0.5,) * 3, (0.5,) * 3)
    folded = our_tokens(cfg, read_encoder(cfg)[0], images)
    np.testing.assert_allclose(folded, expected, **TOLERANCE)
    wrong = our_tokens(cfg, read_encoder(plain)[0], images)
    assert np.abs(wrong - expected).max() > 0.1


def test_folding_changes_nothing_where_the_statistics_are_the_same(tensors):
    weight, bias = (tensors[f"patch_embed.proj.{leaf}"] for leaf in ("weight", "bias"))
    folded = fold_normalisation(weight, bias, (0.5,) * 3, (0.5,) * 3)
    np.testing.assert_array_equal(folded["patch_embed.proj.weight"], weight)
    np.testing.assert_array_equal(folded["patch_embed.proj.bias"], bias)


def test_pixels_are_normalised_as_the_test_says():
    cfg = tiny_config()
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 8, 3), np.uint8)
    mean, std = np.array(cfg.data.mean), np.array(cfg.data.std)
    np.testing.assert_allclose(
        pixels.normalised_patches(
            jnp.asarray(images), cfg.encoder.patch_size, cfg.data.mean, cfg.data.std
        ),
        patchify(jnp.asarray((images / 255 - mean) / std, jnp.float32), 4),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (table_of((4, 2)), "of 4 x 2 patches, as here."),
        (table_of((14, 14)), "of 14 x 14 patches, here those of 4 x 2 are used."),
        (table_of((3, 7)), "of 3 x 7 patches, here those of 4 x 2 are used."),
        # Our exports for another grid have codes in the trained one's coordinates.
        (table_of((4, 2), (7, 7)), "of 7 x 7 patches, here those of 4 x 2 are used."),
        (table_of((4, 2)) + np.float32(5e-5), "of 4 x 2 patches, as here."),
    ],
)
def test_sine_cosine_tables_of_any_grid_are_recognised_and_replaced(
    table, told, tensors, tmp_path
):
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    params, notes = read_encoder(with_file(path))
    assert_encoder(params, tensors)
    assert notes[1] == f"Its positions are the fixed codes {told}"


def test_an_export_of_another_run_tells_where_its_codes_were_trained(tensors, tmp_path):
    content = {
        "model": tensors | {"pos_embed": table_of((6, 3), (7, 7))},
        "meta": {"trained_grid": [6, 3]},
    }
    path = save_torch(tmp_path / "f.pth", content)
    assert_encoder(read_encoder(with_file(path))[0], tensors)
    del content["meta"]
    path = save_torch(tmp_path / "f.pth", content)
    assert "not the fixed sine-cosine one" in refusal(with_file(path))


@pytest.mark.parametrize(
    "table",
    [
        learned_table(tiny_config(), 8),
        table_of((4, 2)) + np.float32(3e-4),
        # Column by column, and rows coded where columns should be.
        np.concatenate(
            [
                np.zeros((1, 1, 16), np.float32),
                table_of((4, 2))[:, 1:]
                .reshape(4, 2, 16)
                .swapaxes(0, 1)
                .reshape(1, 8, 16),
            ],
            axis=1,
        ),
        np.roll(table_of((4, 2)), 8, axis=2),
    ],
)
def test_other_tables_stop_the_run_and_name_the_setting(table, tensors, tmp_path):
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    text = refusal(with_file(path))
    assert "position table of 8 patches that is not the fixed sine-cosine one" in text
    assert "--config.encoder.learned_positions=true loads" in text


def test_the_code_of_cls_counts_too(tensors, tmp_path):
    table = table_of((4, 2))
    table[0, 0, 3] = 0.5
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    assert "not the fixed sine-cosine one" in refusal(with_file(path))


def test_a_learned_table_of_our_grid_is_loaded_bit_for_bit(tensors, tmp_path):
    table = learned_table(tiny_config(), 8)
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    params, _ = read_encoder(with_file(path, learned_positions=True))
    assert_encoder(params, tensors, pos_embed=table)


def test_a_fixed_table_of_another_grid_starts_learning_from_our_codes(
    tensors, tmp_path
):
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table_of((14, 14))})
    params, _ = read_encoder(with_file(path, learned_positions=True))
    assert_encoder(params, tensors, pos_embed=table_of((4, 2)))


@pytest.mark.parametrize("grid", [(14, 14), (16, 8), (27, 9), (2, 1)])
def test_a_learned_table_of_another_grid_is_resampled_as_torch_does(
    grid, tensors, tmp_path
):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    table = learned_table(tiny_config(), grid[0] * grid[1])
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    params, notes = read_encoder(with_file(path, learned_positions=True))
    patches = torch.from_numpy(table[:, 1:]).reshape(1, *grid, 16).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        patches, size=(4, 2), mode="bilinear", align_corners=False
    )
    patches = patches.permute(0, 2, 3, 1).reshape(1, 8, 16).numpy()
    np.testing.assert_allclose(params["pos_embed"][:, 1:], patches, atol=1e-6)
    np.testing.assert_array_equal(params["pos_embed"][:, 0], table[:, 0])
    assert f"{grid[0]} x {grid[1]} positions were resampled to 4 x 2" in notes[1]


def test_resampling_to_the_same_grid_changes_no_bit():
    table = learned_table(tiny_config(), 8)
    assert resample_positions(table, (4, 2), (4, 2)) is table


def test_pass_keeps_its_own_row_for_cls(tensors, tmp_path):
    table = learned_table(tiny_config(), 8)
    content = torch_files.split_pass(tensors | {"pos_embed": table})
    path = save_torch(tmp_path / "f.pth", content)
    params, _ = read_encoder(with_file(path, learned_positions=True))
    assert_encoder(params, tensors, pos_embed=table)


def test_the_row_of_a_distillation_token_is_left_out(tensors, tmp_path):
    table = learned_table(tiny_config(), 8)
    content = tensors | {"pos_embed": np.insert(table, 1, 5, axis=1)}
    content |= torch_files.noise("dist_token", "head_dist.weight")
    path = save_torch(tmp_path / "f.pth", {"model": content})
    params, notes = read_encoder(with_file(path, learned_positions=True))
    assert_encoder(params, tensors, pos_embed=table)
    assert notes[-1] == "Left out of it: dist_token, head_dist.weight."


def test_so_is_the_row_of_transformers_deit(tensors, tmp_path):
    table = learned_table(tiny_config(), 8)
    content = layouts.to_huggingface(tensors) | {
        "embeddings.position_embeddings": np.insert(table, 1, 5, axis=1),
        "embeddings.distillation_token": np.ones((1, 1, table.shape[2]), "f4"),
    }
    save_file(prefixed("deit.", content), tmp_path / "f.safetensors")
    cfg = with_file(tmp_path / "f.safetensors", learned_positions=True)
    assert_encoder(read_encoder(cfg)[0], tensors, pos_embed=table)


def test_our_export_tells_the_grid_that_its_number_of_patches_does_not(
    tensors, tmp_path
):
    table = learned_table(tiny_config(), 15)
    content = {"model": tensors | {"pos_embed": table}, "meta": {"grid": [5, 3]}}
    path = save_torch(tmp_path / "f.pth", content)
    params, _ = read_encoder(with_file(path, learned_positions=True))
    expected = resample_positions(table, (5, 3), (4, 2))
    assert_encoder(params, tensors, pos_embed=expected)
    path = save_torch(tmp_path / "f.pth", content | {"meta": {"grid": [0, 3]}})
    text = refusal(with_file(path, learned_positions=True))
    assert "learned positions of 15 patches, whose rows and columns cannot be" in text
    assert "neither 1:1 nor 2:1, 3:1 or 4:3" in text


def test_a_number_of_patches_that_fits_two_grids_is_said(tensors, tmp_path):
    content = tensors | {"pos_embed": learned_table(tiny_config(), 192)}
    cfg = with_file(save_torch(tmp_path / "f.pth", content), learned_positions=True)
    assert "(16 x 12 or 24 x 8)" in refusal(cfg)


def test_a_learned_file_of_24_x_8_patches_starts_another_run_by_a_setting(
    tensors, tmp_path
):
    table = learned_table(tiny_config(), 192)
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    cfg = with_file(path, learned_positions=True)
    assert "--config.init.grid=ROWS,COLUMNS" in refusal(cfg)
    cfg.init.grid = (24, 8)
    expected = resample_positions(table, (24, 8), (4, 2))
    assert_encoder(read_encoder(cfg)[0], tensors, pos_embed=expected)


@pytest.mark.parametrize("grid", [(16, 12), (24, 8)])
def test_the_size_that_is_asked_for_tells_the_grid_of_a_learned_table(
    grid, tensors, tmp_path
):
    table = learned_table(tiny_config(), 192)
    path = save_torch(tmp_path / "f.pth", tensors | {"pos_embed": table})
    init = FinetuneInitConfig(torch_weights=str(path))
    cfg = settings_of_file(init, (4 * grid[0], 4 * grid[1]))
    assert cfg.grid == grid
    np.testing.assert_array_equal(read_encoder(cfg)[0]["pos_embed"], table)
    with pytest.raises(ConfigError, match="16 x 12 or 24 x 8"):
        settings_of_file(init)
