"""The ViT against PyTorch's, with all patches and with the visible ones."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax import pixels
from personmae_jax.models.encoder import Encoder
from personmae_jax.pixels import patchify

# Two blocks of float32 sums of order 1 to 10 against float64.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def arrays():
    return goldens.load("personmae")


@pytest.fixture(scope="module")
def encoder():
    return Encoder(width=8, depth=2, num_heads=2, mlp_ratio=4, grid=(4, 2))


@pytest.fixture(scope="module")
def params(arrays):
    return {"params": goldens.linen_params(arrays, "student/encoder.")}


def patches_of(arrays):
    patches = jnp.asarray(patchify(arrays["region_a"], 2))
    return pixels.normalise(patches, MEAN, STD)


def test_encoder_of_all_patches_is_pytorchs(arrays, encoder, params):
    encoded = jax.jit(encoder.apply)(params, patches_of(arrays))
    np.testing.assert_allclose(
        np.stack(encoded.blocks), arrays["full_blocks"], **TOLERANCE
    )
    np.testing.assert_allclose(encoded.tokens, arrays["full_tokens"], **TOLERANCE)


def test_encoder_of_visible_patches_is_pytorchs(arrays, encoder, params):
    visible = jnp.asarray(arrays["visible"])
    patches = jnp.take_along_axis(patches_of(arrays), visible[:, :, None], axis=1)
    encoded = jax.jit(encoder.apply)(params, patches, visible)
    np.testing.assert_allclose(np.stack(encoded.blocks), arrays["blocks"], **TOLERANCE)
    np.testing.assert_allclose(encoded.tokens, arrays["tokens"], **TOLERANCE)


def test_all_patches_named_one_by_one_are_all_patches(arrays, encoder, params):
    patches = patches_of(arrays)
    everything = jnp.tile(jnp.arange(8), (3, 1))
    for a, b in zip(
        jax.tree.leaves(jax.jit(encoder.apply)(params, patches)),
        jax.tree.leaves(jax.jit(encoder.apply)(params, patches, everything)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_parameter_names_are_those_of_the_pytorch_encoder(arrays, encoder, params):
    made = jax.eval_shape(encoder.init, jax.random.key(0), patches_of(arrays))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def learned(encoder):
    return encoder.clone(learned_positions=True)


@pytest.mark.parametrize("is_partial", [False, True])
def test_learned_positions_start_as_the_fixed_ones(arrays, encoder, is_partial):
    patches = patches_of(arrays)
    visible = jnp.asarray(arrays["visible"]) if is_partial else None
    if is_partial:
        patches = jnp.take_along_axis(patches, visible[:, :, None], axis=1)
    key = jax.random.key(0)
    fixed, params = encoder.init_with_output(key, patches, visible)
    free, free_params = learned(encoder).init_with_output(key, patches, visible)
    table = free_params["params"].pop("pos_embed")
    assert table.shape == (1, 1 + 8, 8)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, free_params))
    np.testing.assert_array_equal(fixed.tokens, free.tokens)


def test_learned_positions_are_those_of_the_visible_patches(arrays, encoder, params):
    """Row 0 is for cls, row 1 + i for patch i; those of hidden patches do nothing."""
    visible = jnp.asarray(arrays["visible"])
    patches = jnp.take_along_axis(patches_of(arrays), visible[:, :, None], axis=1)
    table = jax.random.normal(jax.random.key(1), (1, 9, 8))

    def last_block(table):
        both = {"params": params["params"] | {"pos_embed": table}}
        return learned(encoder).apply(both, patches, visible).blocks[-1]

    seen = {0, *(1 + visible[0]).tolist()}
    for row in range(9):
        moved = last_block(table.at[0, row].add(1.0))[0]
        assert jnp.array_equal(moved, last_block(table)[0]) == (row not in seen)
