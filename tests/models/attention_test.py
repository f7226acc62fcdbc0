"""The fused kernel, interpreted on the CPU, against attention as XLA computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax import sharding
from personmae_jax.models import attention

HEADS, WIDTH = 4, 256


@pytest.fixture
def fused(monkeypatch):
    """Makes every attention that fits use the kernel, whatever its dtype."""
    monkeypatch.setattr(
        attention, "_is_fused", lambda x, d, heads: d == 64 * heads and heads % 2 == 0
    )


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def self_attend(qkv):
    return attention.self_attention(qkv, HEADS)


def cross_attend(q, kv):
    return attention.cross_attention(q, kv, HEADS)


CASES = {
    "self": (self_attend, (normal(0, 4, 9, 3 * WIDTH),)),
    "cross": (cross_attend, (normal(1, 2, 8, WIDTH), normal(2, 2, 13, 2 * WIDTH))),
}


def with_gradients(attend, inputs):
    """The output, and the gradients of a random projection of it."""
    out, pull = jax.vjp(attend, *inputs)
    return out, *pull(normal(7, *out.shape, dtype=out.dtype))


@pytest.mark.parametrize("name", CASES)
def test_fused_attention_and_its_gradients_are_xlas(name, fused, monkeypatch):
    attend, inputs = CASES[name]
    with jax.default_matmul_precision("highest"):
        ours = with_gradients(attend, inputs)
        monkeypatch.undo()
        xlas = with_gradients(attend, inputs)
    for a, b in zip(ours, xlas, strict=True):
        # Sums of 64 products and of 13 weights in float32.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_in_bfloat16_it_is_as_near_to_float32_as_xlas(name, fused, monkeypatch):
    attend, exact_inputs = CASES[name]
    inputs = [x.astype(jnp.bfloat16) for x in exact_inputs]
    exact_inputs = [x.astype(jnp.float32) for x in inputs]
    ours = with_gradients(attend, inputs)
    monkeypatch.undo()
    xlas, exact = (with_gradients(attend, x) for x in (inputs, exact_inputs))

    def error(values):
        return [
            float(np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b))
            for a, b in zip(values, exact, strict=True)
        ]

    for a, b in zip(error(ours), error(xlas), strict=True):
        assert a < max(1.5 * b, 2**-8)  # one rounding to bfloat16


def test_every_device_attends_in_its_own_rows(fused):
    mesh = sharding.make_mesh()
    qkv = normal(0, 16, 5, 3 * WIDTH)

    def attend(qkv):
        with sharding.mesh_context(mesh):
            return self_attend(qkv)

    rows = sharding.batch_sharding(mesh)
    step = jax.jit(attend, in_shardings=rows, out_shardings=rows).lower(qkv).compile()
    assert not {"all-gather", "all-to-all"} & set(step.as_text().split("("))
    np.testing.assert_allclose(step(jax.device_put(qkv, rows)), self_attend(qkv), 1e-6)


def test_the_kernel_multiplies_bfloat16_as_it_is_where_float32_is_exact(monkeypatch):
    monkeypatch.setattr(sharding, "is_on_tpu", lambda: True)
    qkv = normal(0, 16, 5, 3 * WIDTH, dtype=jnp.bfloat16)
    with sharding.mesh_context(sharding.make_mesh()):
        # Mosaic does not compile a product of bfloat16 in the precision of float32.
        assert "HIGHEST" not in str(jax.make_jaxpr(lambda x: self_attend(x))(qkv))
        exact = jax.make_jaxpr(lambda x: x @ x.T)(jnp.zeros((2, 3)))
    assert "Precision.HIGHEST" in str(exact)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (256, 8), (128, 1)])
def test_other_heads_are_left_to_xla(width, heads, monkeypatch):
    monkeypatch.setattr(sharding, "is_on_tpu", lambda: True)
    qkv = normal(0, 2, 5, 3 * width, dtype=jnp.bfloat16)
    assert "pallas_call" not in str(
        jax.make_jaxpr(lambda x: attention.self_attention(x, heads))(qkv)
    )


@pytest.mark.parametrize(
    ("dtype", "is_fused"), [(jnp.bfloat16, True), (jnp.float32, False)]
)
def test_on_tpu_bfloat16_is_fused_and_float32_is_not(dtype, is_fused, monkeypatch):
    qkv = normal(0, 2, 5, 3 * WIDTH, dtype=dtype)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: self_attend(x))(qkv))
    monkeypatch.setattr(sharding, "is_on_tpu", lambda: True)
    assert (
        "pallas_call" in str(jax.make_jaxpr(lambda x: self_attend(x))(qkv))
    ) == is_fused
