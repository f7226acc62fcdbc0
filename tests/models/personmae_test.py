"""The whole network: initial weights, and who knows what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import init_params, tiny_config

from personmae_jax.config import Config, PredictorConfig
from personmae_jax.models import personmae


@pytest.fixture(scope="module")
def params():
    cfg = tiny_config()
    return jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))


def leaves(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): np.asarray(x) for path, x in flat}


def test_matrices_start_xavier_uniform(params):
    for name, value in leaves(params).items():
        if name.endswith("kernel") and name != "pixel_predictor/head/kernel":
            bound = np.sqrt(6 / sum(value.shape))  # qkv as one matrix, as in MAE
            assert np.abs(value).max() <= bound, name
            if value.size >= 256:  # the standard deviation of the uniform law
                np.testing.assert_allclose(value.std(), bound / 3**0.5, rtol=0.1)


def test_the_pixel_head_starts_small(params):
    head = params["pixel_predictor"]["head"]["kernel"]
    np.testing.assert_allclose(np.std(head), 0.001, rtol=0.15)  # 384 values


def test_biases_start_at_zero_and_norms_at_one(params):
    for name, value in leaves(params).items():
        if name.endswith("bias"):
            assert not value.any(), name
        if name.endswith("scale"):
            assert (value == 1.0).all(), name


def test_tokens_start_at_a_fiftieth():
    cfg = tiny_config()
    cfg.encoder.width, cfg.encoder.depth = 1024, 1
    cfg.pixel_predictor = PredictorConfig(depth=0)
    cfg.loss.feature_weight = 0.0

    @jax.jit
    def tokens():
        params = init_params(cfg, jax.random.key(0))
        return [params["encoder"]["cls_token"], params["pixel_predictor"]["mask_token"]]

    cls_token, mask_token = tokens()
    assert (cls_token != mask_token).any()
    # Of 1024 normal numbers: 0.02 to 2 %, thrice that for the tails.
    np.testing.assert_allclose(np.std(cls_token), 0.02, rtol=0.07)
    np.testing.assert_allclose(np.std(mask_token), 0.02, rtol=0.07)


def test_all_parameters_are_float32(params):
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_another_key_gives_other_weights(params):
    cfg = tiny_config()
    other = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(1))
    kernel = params["encoder"]["patch_embed"]["kernel"]
    assert (kernel != other["encoder"]["patch_embed"]["kernel"]).any()


def test_without_feature_weight_there_is_no_feature_predictor():
    cfg = tiny_config()
    cfg.loss.feature_weight = 0.0
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    assert params.keys() == {"encoder", "pixel_predictor"}


def test_a_cls_head_changes_no_other_parameter(params):
    cfg = tiny_config()
    cfg.loss.cls_weight = 0.1
    other = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    head = other.pop("cls_head")
    assert {name: x.shape for name, x in head.items()} == {
        "kernel": (16, 16),
        "bias": (16,),
    }
    jax.tree.map(np.testing.assert_array_equal, params, other)


def test_the_encoder_does_not_depend_on_the_predictors(params):
    """So that an ablation of a predictor starts from the same encoder."""
    cfg = tiny_config()
    cfg.loss.feature_weight = 0.0
    other = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], other["encoder"])


def test_the_numbers_of_a_vit_b_are_those_of_timm():
    encoder = jax.eval_shape(
        lambda: personmae.init_encoder(
            Config().encoder, Config().grid, jax.random.key(0)
        )
    )
    # timm's vit_base_patch16 of 224 pixels, without its classifier: 85,798,656,
    # of which 197 * 768 are learned positions; ours are fixed.
    count = sum(x.size for x in jax.tree.leaves(encoder))
    assert count == 85_798_656 - 197 * 768
