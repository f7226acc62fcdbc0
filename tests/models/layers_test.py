"""Every layer against the same layer in PyTorch, computed in float64."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax.models import layers

LAYERS = {
    "self_attention": (layers.SelfAttention(2, jnp.float32), ("x",)),
    "cross_attention": (layers.CrossAttention(2, jnp.float32), ("x", "memory")),
    "mlp": (layers.Mlp(32, jnp.float32), ("x",)),
    "encoder_block": (layers.EncoderBlock(2, 4, jnp.float32), ("x",)),
    "decoder_block": (layers.DecoderBlock(2, True, jnp.float32), ("x", "memory")),
}


@pytest.fixture(scope="module")
def arrays():
    return goldens.load("layers")


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_pytorchs(arrays, name):
    layer, inputs = LAYERS[name]
    params = goldens.linen_params(arrays, f"{name}/")
    inputs = [jnp.asarray(arrays[x]) for x in inputs]
    made = jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    # A few float32 sums of 8 to 32 products of order 1.
    np.testing.assert_allclose(
        jax.jit(layer.apply)({"params": params}, *inputs),
        arrays[f"{name}:y"],
        rtol=1e-5,
        atol=5e-6,
    )


@pytest.mark.parametrize("use_self_attention", [True, False])
def test_queries_see_each_other_with_self_attention_alone(arrays, use_self_attention):
    layer = layers.DecoderBlock(2, use_self_attention, jnp.float32)
    params = {"params": goldens.linen_params(arrays, "decoder_block/")}
    x, memory = jnp.asarray(arrays["x"]), jnp.asarray(arrays["memory"])
    changed = x.at[:, 0].add(jnp.arange(8.0))
    apply = jax.jit(layer.apply)
    before, after = (np.asarray(apply(params, q, memory)) for q in (x, changed))
    assert (before[:, 0] != after[:, 0]).any()
    assert (before[:, 1:] != after[:, 1:]).any() == use_self_attention


def test_layer_norm_has_no_mean_and_unit_variance():
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 64)).astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        y = np.asarray(layers.layer_norm(jnp.asarray(x)))
    np.testing.assert_allclose(y.mean(-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1.0, rtol=1e-6)
    assert layers.layer_norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_bfloat16_layers_keep_float32_parameters_and_statistics(arrays):
    layer = layers.EncoderBlock(2, 4, jnp.bfloat16)
    x = jnp.asarray(arrays["x"], jnp.bfloat16)
    y, params = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert y.dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(layer.apply)(params, x))
    # The sums of norms and softmax, and the exponential, are float32.
    for line in program.splitlines():
        if " reduce_sum" in line or " exp " in line or " rsqrt" in line:
            assert "f32" in line.split("=")[0], line


def test_in_bfloat16_the_gradient_of_a_bias_is_the_float32_sum_over_rows():
    rng = np.random.default_rng(0)
    y, shape = jnp.asarray(rng.normal(size=(3, 65, 24)), jnp.bfloat16), (3, 65, 16)
    layer = layers.Dense(24, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), jnp.zeros(shape))

    def loss(params):
        out = layer.apply(params, jnp.zeros(shape))
        return jnp.sum((out * y).astype(jnp.float32))

    gradient = jax.grad(loss)(params)["params"]["bias"]
    assert gradient.dtype == jnp.float32
    exact = np.asarray(y, np.float64).sum((0, 1))
    np.testing.assert_allclose(gradient, exact, atol=1e-4)
