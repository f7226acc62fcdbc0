"""The ViT against PyTorch's, with all patches and with the visible ones."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax import losses
from personmae_jax.models.encoder import Encoder
from personmae_jax.patches import patchify

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
    return losses.normalise(patches, MEAN, STD)


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
