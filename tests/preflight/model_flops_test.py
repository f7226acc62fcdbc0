"""FLOPs of the method against hand counts, the network's own products and XLA."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from tiny import init_params, tiny_batch, tiny_config

from personmae_jax.config import Config
from personmae_jax.models import personmae
from personmae_jax.preflight.model_flops import model_flops_per_image
from personmae_jax.pretrain.train_step import make_loss_fn


def products(jaxpr) -> int:
    """FLOPs of all matrix products of a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = 2 * equation.outvars[0].aval.size
            for axis in contracted:
                size *= left[axis]
            total += size
        total += sum(map(products, jaxprs_in_params(equation.params)))
    return total


def traced(cfg: Config, fn=lambda loss: loss):
    """The loss, or what `fn` makes of it, and arguments without data."""
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    arguments = (params, params["encoder"], 1.0, tiny_batch(cfg))
    return fn(make_loss_fn(cfg, jnp.float32)), arguments


def test_the_default_vit_b_counts_75_6_gflop_an_image():
    assert model_flops_per_image(Config()) == 75_580_210_176


def other_config(name: str) -> Config:
    cfg = tiny_config()
    if name == "pixels only":
        cfg.loss.feature_weight = 0.0
    if name == "no self-attention":
        cfg.pixel_predictor.use_self_attention = False
        cfg.feature_predictor.use_self_attention = False
    if name.startswith("cls"):
        cfg.loss.cls_weight = 0.1
    if name == "cls without features":
        cfg.loss.feature_weight = 0.0
    if name == "masks, mlp and depths":
        cfg.masks.ratio, cfg.encoder.mlp_ratio, cfg.encoder.depth = 0.25, 3, 3
        cfg.feature_predictor.depth = 2
        cfg.feature_predictor.memory_blocks = (0, 1, 2)
    return cfg


NAMES = [
    *("tiny", "pixels only", "no self-attention", "masks, mlp and depths"),
    *("cls", "cls without features"),
]


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_makes_just_these_products(name):
    """The count with the factor three taken off everything that is trained."""
    cfg = other_config(name)
    loss, arguments = traced(cfg)
    forward = products(jax.make_jaxpr(loss)(*arguments).jaxpr)
    counted = model_flops_per_image(cfg) * cfg.train.batch_size
    teacher = 0
    if cfg.loss.feature_weight or cfg.loss.cls_weight:
        encode = jax.make_jaxpr(
            lambda p, x: personmae.encode(cfg.encoder, cfg.grid, p, x)
        )
        patches = jnp.zeros((cfg.train.batch_size, cfg.num_patches, 3 * 4**2))
        teacher = products(encode(arguments[1], patches).jaxpr)
    assert counted == 3 * (forward - teacher) + teacher


def test_xla_counts_about_as_much_for_the_plain_step():
    """XLA counts norms, softmax and GELU too, and no gradient of the pixels."""
    cfg = tiny_config()
    cfg.encoder.width, cfg.pixel_predictor.width = 256, 256
    gradient, arguments = traced(cfg, lambda loss: jax.grad(loss, has_aux=True))
    compiled = jax.jit(gradient).lower(*arguments).compile()
    by_xla = compiled.cost_analysis()["flops"]
    counted = model_flops_per_image(cfg) * cfg.train.batch_size
    assert by_xla == pytest.approx(counted, rel=0.05)
