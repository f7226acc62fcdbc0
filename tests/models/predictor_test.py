"""The decoder against PyTorch's, and what it may not know."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax.data import images, regions
from personmae_jax.models.encoder import Encoded
from personmae_jax.models.predictor import Predictor

SETTINGS = {
    "width": 8,
    "depth": 1,
    "num_heads": 2,
    "use_self_attention": True,
    "grid": (4, 2),
}
PREDICTORS = {
    "pixels": Predictor(memory_blocks=(0, 1), outputs=12, **SETTINGS),
    "features": Predictor(memory_blocks=(1,), outputs=8, **SETTINGS),
}


@pytest.fixture(scope="module")
def arrays():
    return goldens.load("personmae")


@pytest.fixture(scope="module")
def encoded(arrays):
    blocks = tuple(jnp.asarray(arrays["blocks"], jnp.float32))
    return Encoded(blocks, jnp.asarray(arrays["tokens"], jnp.float32))


@pytest.fixture(scope="module")
def geometry(arrays):
    boxes = zip(arrays["boxes_a"].tolist(), arrays["boxes_b"].tolist(), strict=True)
    return jnp.stack(
        [
            regions.relative_geometry(images.Box(*a), images.Box(*b), (4, 2))
            for a, b in boxes
        ]
    )


def params_of(arrays, name):
    return {"params": goldens.linen_params(arrays, f"student/{name[:-1]}_predictor.")}


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor_is_pytorchs(arrays, encoded, geometry, name):
    # One block of float32 sums of order 1 against float64; codes to 1e-6.
    np.testing.assert_allclose(
        jax.jit(PREDICTORS[name].apply)(params_of(arrays, name), encoded, geometry),
        arrays[name],
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("name", PREDICTORS)
def test_parameter_names_and_shapes_are_those_of_the_golden(
    arrays, encoded, geometry, name
):
    init = PREDICTORS[name].init
    made = jax.eval_shape(init, jax.random.key(0), encoded, geometry)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(
        jnp.shape, params_of(arrays, name)
    )


def test_predictions_are_float32_when_products_are_bfloat16(encoded, geometry):
    predictor = PREDICTORS["pixels"].clone(dtype=jnp.bfloat16)
    made = jax.eval_shape(
        predictor.init_with_output, jax.random.key(0), encoded, geometry
    )
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}


def test_the_memory_ends_in_the_encoders_own_norm(arrays):
    """Only so are the norm and the cls token trained that every user applies."""
    names = params_of(arrays, "pixels")["params"].keys()
    assert {"memory_norm_0", "memory_proj_0", "memory_proj_1"} <= names
    assert "memory_norm_1" not in names


def test_every_number_of_where_b_lies_matters(arrays, encoded, geometry):
    apply = jax.jit(PREDICTORS["pixels"].apply)
    params = params_of(arrays, "pixels")
    before = np.asarray(apply(params, encoded, geometry))
    for i in range(4):
        moved = apply(params, encoded, geometry.at[:, i].add(0.5))
        assert (np.asarray(moved) != before).any()
