"""The name table: exact names and shapes, exact numbers, positions on any grid."""

import exported
import jax
import numpy as np
import pytest

from personmae_jax.config import EncoderConfig
from personmae_jax.models import personmae
from personmae_jax.pytorch import weights

GRIDS = [(16, 8), (24, 8), (14, 14)]


def names_and_shapes(tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def assert_same_tree(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def export(cfg, params):
    grid, width = cfg.grid, cfg.encoder.width
    table = weights.position_table(width, grid, grid)
    return weights.encoder_to_torch(params, table)


def zeros(cfg):
    shapes = weights.tensor_shapes(cfg.encoder, cfg.grid)
    del shapes["pos_embed"]
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("size", exported.SIZES)
def test_a_vit_of_12_blocks_has_exactly_these_150_tensors(size):
    cfg = exported.vit_config(*exported.SIZES[size])
    d = cfg.encoder.width
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 129, d),
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for i in range(12):
        shapes |= {
            f"blocks.{i}.norm1.weight": (d,),
            f"blocks.{i}.norm1.bias": (d,),
            f"blocks.{i}.attn.qkv.weight": (3 * d, d),
            f"blocks.{i}.attn.qkv.bias": (3 * d,),
            f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.attn.proj.bias": (d,),
            f"blocks.{i}.norm2.weight": (d,),
            f"blocks.{i}.norm2.bias": (d,),
            f"blocks.{i}.mlp.fc1.weight": (4 * d, d),
            f"blocks.{i}.mlp.fc1.bias": (4 * d,),
            f"blocks.{i}.mlp.fc2.weight": (d, 4 * d),
            f"blocks.{i}.mlp.fc2.bias": (d,),
        }
    assert len(shapes) == 150
    params = weights.encoder_from_torch(zeros(cfg))
    assert names_and_shapes(export(cfg, params)) == shapes
    assert weights.tensor_shapes(cfg.encoder, cfg.grid) == shapes


def test_the_table_holds_every_parameter_of_the_network():
    cfg = exported.small_config()
    network = jax.eval_shape(
        lambda: personmae.init_encoder(cfg.encoder, cfg.grid, jax.random.key(0))
    )
    built = weights.encoder_from_torch(zeros(cfg))
    assert jax.tree.structure(built) == jax.tree.structure(network)
    assert jax.tree.map(np.shape, built) == jax.tree.map(
        lambda leaf: leaf.shape, network
    )


def test_there_and_back_changes_no_bit():
    cfg = exported.small_config()
    params = exported.trained_like(cfg.encoder)
    tensors = export(cfg, params)
    table = tensors.pop("pos_embed")
    back = weights.encoder_from_torch(tensors)
    assert_same_tree(back, params)
    again = weights.encoder_to_torch(back, table)
    for name, tensor in tensors.items():
        assert again[name].tobytes() == tensor.tobytes()


def test_tensors_are_float32_contiguous_and_share_no_memory():
    cfg = exported.small_config()
    params = exported.trained_like(cfg.encoder)
    leaves = jax.tree.leaves(params)
    for name, tensor in export(cfg, params).items():
        assert tensor.dtype == np.float32, name
        assert tensor.flags.c_contiguous, name
        assert tensor.flags.owndata, name
        assert not any(np.shares_memory(tensor, leaf) for leaf in leaves), name


def test_learned_positions_of_the_parameters_give_way_to_the_given_ones():
    cfg = exported.small_config()
    params = exported.trained_like(cfg.encoder)
    table = weights.position_table(32, cfg.grid, (3, 3))
    learned = params | {"pos_embed": np.ones((1, 33, 32), np.float32)}
    tensors = weights.encoder_to_torch(learned, table)
    np.testing.assert_array_equal(tensors["pos_embed"], table)


def test_a_convolution_with_the_patch_weights_is_our_patch_embedding():
    encoder = EncoderConfig(width=8, depth=1, num_heads=2, patch_size=2)
    params = exported.trained_like(encoder)
    tensors = weights.encoder_to_torch(params, np.zeros((1, 2, 8), np.float32))
    patch = np.random.default_rng(1).standard_normal((2, 2, 3))  # row, column, channel
    weight = tensors["patch_embed.proj.weight"]
    np.testing.assert_allclose(
        np.einsum("dcyx,yxc->d", weight, patch),
        patch.reshape(-1) @ params["patch_embed"]["kernel"],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_row_0_of_the_positions_is_zeros_and_the_rest_raster_order(grid):
    table = weights.position_table(64, (16, 8), grid)
    assert table.dtype == np.float32
    assert table.shape == (1, 1 + grid[0] * grid[1], 64)
    assert not table[0, 0].any()
    codes = table[0, 1:].reshape(*grid, 64)
    # The first half codes x alone, the second y.
    assert np.array_equal(codes[0, :, :32], codes[-1, :, :32])
    assert np.array_equal(codes[:, 0, 32:], codes[:, -1, 32:])


@pytest.mark.parametrize("trained", GRIDS)
def test_on_the_trained_grid_the_positions_are_those_of_the_network(trained):
    table = weights.position_table(64, trained, trained)
    np.testing.assert_array_equal(table[0, 1:], personmae.position_table(trained, 64))


@pytest.mark.parametrize("grid", [(14, 14), (24, 8), (32, 16), (8, 4)])
def test_another_grid_is_coded_at_its_patch_centres_in_trained_coordinates(grid):
    table = weights.position_table(8, (16, 8), grid)[0, 1:].reshape(*grid, 8)
    i, j = grid[0] - 1, 1
    y, x = (i + 0.5) * 16 / grid[0] - 0.5, (j + 0.5) * 8 / grid[1] - 0.5
    expected = [np.sin(x), np.sin(x / 100), np.cos(x), np.cos(x / 100)]
    expected += [np.sin(y), np.sin(y / 100), np.cos(y), np.cos(y / 100)]
    np.testing.assert_allclose(table[i, j], expected, rtol=0, atol=1e-6)


def resize_bilinearly(table, grid, new_grid):
    """As `interpolate(mode="bilinear")` of PyTorch, on a table without cls."""

    def matrix(old: int, new: int):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))

    rows, columns = (matrix(*sides) for sides in zip(grid, new_grid, strict=True))
    planes = table.reshape(*grid, -1)
    return np.einsum("yi,xj,ijd->yxd", rows, columns, planes).reshape(
        new_grid[0] * new_grid[1], -1
    )


def test_a_14x14_export_resized_to_16x8_finds_every_patch_again():
    table = weights.position_table(384, (16, 8), (14, 14))[0, 1:]
    trained = weights.position_table(384, (16, 8), (16, 8))[0, 1:]
    resized = resize_bilinearly(table, (14, 14), (16, 8))
    assert np.abs(resized - trained).max() < 0.2
    distances = np.linalg.norm(resized[:, None] - trained[None], axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), np.arange(128))
