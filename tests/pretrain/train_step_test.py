"""Losses, gradients and updates of the real step: what may flow where."""

import runpy
from pathlib import Path

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import init_params, tiny_batch, tiny_config

from personmae_jax.config import Config, EncoderConfig, PredictorConfig
from personmae_jax.config_check import check
from personmae_jax.data import images, regions
from personmae_jax.pretrain.train_step import (
    average_micro_batches,
    make_loss_fn,
    predict_region_b,
)

ROOT = Path(__file__).resolve().parents[2]


def total_fn(cfg, dtype="float32"):
    """The real loss of (params, teacher, batch), the teacher part way up its ramp."""
    loss_fn = make_loss_fn(cfg, jnp.dtype(dtype))
    return lambda params, teacher, batch: loss_fn(params, teacher, 0.7, batch)


GRADIENT = {}  # jitted (loss, gradients) of the tiny network by settings


def gradient_fn(dtype="float32", **loss_settings):
    """(params, teacher, batch) -> ((loss, aux), gradients), jitted once."""
    name = (dtype, *sorted(loss_settings.items()))
    if name not in GRADIENT:
        cfg = tiny_config()
        for field, value in loss_settings.items():
            setattr(cfg.loss, field, value)
        GRADIENT[name] = jax.jit(jax.value_and_grad(total_fn(cfg, dtype), has_aux=True))
    return GRADIENT[name]


@pytest.fixture(scope="module")
def params():
    cfg = tiny_config()
    return jax.jit(lambda: init_params(cfg, jax.random.key(0)))()


@pytest.fixture(scope="module")
def teacher(params):
    """Another network's weights: a teacher that is not the student."""
    return jax.tree.map(lambda x: 0.9 * x + 0.01, params["encoder"])


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, tiny_batch(tiny_config()))


def assert_bitwise(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def norm(tree):
    return np.sqrt(sum(np.square(np.float64(x)).sum() for x in jax.tree.leaves(tree)))


# --- Against PyTorch ---------------------------------------------------------------


def golden_config():
    cfg = Config(
        encoder=EncoderConfig(width=8, depth=2, num_heads=2, patch_size=2),
        pixel_predictor=PredictorConfig(depth=1, memory_blocks=(0, -1)),
        feature_predictor=PredictorConfig(depth=1),
    )
    cfg.data.height, cfg.data.width = 8, 4
    cfg.loss.feature_blocks, cfg.loss.feature_instance_norm = 1, False
    cfg.loss.cls_weight = 0.0
    return cfg


def golden_batch(arrays, b="b"):
    boxes = zip(arrays["boxes_a"].tolist(), arrays[f"boxes_{b}"].tolist(), strict=True)
    geometry = [
        regions.relative_geometry(images.Box(*box_a), images.Box(*box_b), (4, 2))
        for box_a, box_b in boxes
    ]
    return {
        "region_a": jnp.asarray(arrays["region_a"]),
        "region_b": jnp.asarray(arrays[f"region_{b}"]),
        "visible": jnp.asarray(arrays["visible"]),
        "geometry": jnp.stack(geometry),
    }


def mae_config() -> Config:
    """configs/mae_vitb.py with everything about the method, on a tiny network."""
    cfg = runpy.run_path(str(ROOT / "configs/mae_vitb.py"))["get_config"]()
    tiny = tiny_config()
    cfg.encoder, cfg.data, cfg.train = tiny.encoder, tiny.data, tiny.train
    cfg.pixel_predictor.width = 64  # 16 heads of 4
    return cfg


def test_losses_and_every_gradient_are_pytorchs():
    arrays = goldens.load("personmae")
    loss_fn = make_loss_fn(golden_config(), jnp.float32)
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        goldens.linen_params(arrays, "student/"),
        goldens.linen_params(arrays, "teacher/")["encoder"],
        0.7,
        golden_batch(arrays),
    )
    # Float32 against float64 through the whole network.
    for name in ("pixel_loss", "feature_loss"):
        np.testing.assert_allclose(metrics[name], arrays[name], rtol=1e-5)
    expected = goldens.linen_params(arrays, "grad/")
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        grads,
        expected,
    )


def test_b_equal_to_a_without_features_is_plain_mae_over_all_patches():
    arrays = goldens.load("personmae")
    cfg = golden_config()
    cfg.loss.feature_weight = 0.0
    params = goldens.linen_params(arrays, "student/")
    loss, metrics = jax.jit(make_loss_fn(cfg, jnp.float32))(
        params, params["encoder"], 0.0, golden_batch(arrays, "a")
    )
    np.testing.assert_allclose(loss, arrays["mae_loss"], rtol=1e-5)
    assert metrics.keys() == {"pixel_loss", "loss"}


def test_the_mae_config_has_maes_loss_on_hidden_patches_only():
    """`forward_loss` of facebookresearch/mae in numpy, float64."""
    cfg = mae_config()
    check(cfg)
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    params["pixel_predictor"]["head"]["kernel"] *= 1000  # errors of every size
    batch = tiny_batch(cfg)
    batch["region_b"] = batch["region_a"]
    batch["geometry"] = np.tile(np.array([0, 0, 1, 1], np.float32), (8, 1))
    loss, metrics = jax.jit(make_loss_fn(cfg, jnp.float32))(
        params, params["encoder"], 0.0, batch
    )
    predicted = jax.jit(lambda x: predict_region_b(cfg, params, x, jnp.float32))(batch)
    image = (batch["region_a"] / 255 - cfg.data.mean) / cfg.data.std
    target = np.einsum("nhpwqc->nhwpqc", image.reshape(8, 4, 4, 2, 4, 3))
    target = target.reshape(8, 8, 48)
    var = target.var(axis=-1, keepdims=True, ddof=1)
    target = (target - target.mean(axis=-1, keepdims=True)) / (var + 1e-6) ** 0.5
    mask = np.ones((8, 8))
    np.put_along_axis(mask, batch["visible"], 0, axis=1)
    assert mask.sum() == 8 * 6  # three quarters
    error = ((np.float64(predicted["pixels"]) - target) ** 2).mean(axis=-1)
    expected = (error * mask).sum() / mask.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert abs(error.mean() - expected) > 1e-3 * expected  # visible ones would matter
    assert params.keys() == {"encoder", "pixel_predictor"}
    assert metrics.keys() == {"pixel_loss", "loss"}


# --- Who knows what ----------------------------------------------------------------


def test_no_gradient_reaches_the_teacher(params, teacher, batch):
    grad_fn = jax.grad(total_fn(tiny_config()), argnums=1, has_aux=True)
    grads, _ = jax.jit(grad_fn)(params, teacher, batch)
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


def test_the_teacher_does_matter(params, teacher, batch):
    (loss, _), _ = gradient_fn()(params, teacher, batch)
    (other, _), _ = gradient_fn()(params, params["encoder"], batch)
    assert loss != other


def test_hidden_pixels_of_region_a_have_no_influence(params, teacher, batch):
    cfg = tiny_config()
    patch, (_, columns) = cfg.encoder.patch_size, cfg.grid
    changed = np.array(batch["region_a"])
    for image, visible in zip(changed, np.array(batch["visible"]), strict=True):
        for i in set(range(cfg.num_patches)) - set(visible.tolist()):
            y, x = i // columns * patch, i % columns * patch
            image[y : y + patch, x : x + patch] ^= 255
    assert (changed != np.array(batch["region_a"])).mean() > 0.4
    assert_bitwise(
        gradient_fn()(params, teacher, batch),
        gradient_fn()(params, teacher, batch | {"region_a": jnp.asarray(changed)}),
    )


def test_region_b_pixels_influence_the_loss_but_never_the_prediction(
    params, teacher, batch
):
    changed = batch | {"region_b": batch["region_b"] ^ 255}
    predict = jax.jit(lambda x: predict_region_b(tiny_config(), params, x, jnp.float32))
    assert_bitwise(predict(batch), predict(changed))
    (loss, _), _ = gradient_fn()(params, teacher, batch)
    (other, _), _ = gradient_fn()(params, teacher, changed)
    assert loss != other


def test_visible_pixels_of_region_a_do_have_influence(params, batch):
    changed = batch | {"region_a": batch["region_a"] ^ 255}
    predict = jax.jit(lambda x: predict_region_b(tiny_config(), params, x, jnp.float32))
    before, after = predict(batch), predict(changed)
    assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize("feature_weight", [1.0, 0.0])
def test_every_exported_tensor_receives_a_gradient(
    params, teacher, batch, feature_weight
):
    if not feature_weight:
        params = {k: v for k, v in params.items() if k != "feature_predictor"}
    _, grads = gradient_fn(feature_weight=feature_weight)(params, teacher, batch)
    flat = jax.tree_util.tree_leaves_with_path(grads)
    silent = [jax.tree_util.keystr(path) for path, x in flat if not np.any(x)]
    assert silent == []


def test_the_cls_token_learns_from_its_own_loss(params, teacher, batch):
    cfg = tiny_config()
    cfg.loss.cls_weight = 0.3
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    fn = jax.jit(jax.value_and_grad(total_fn(cfg), has_aux=True))
    (loss, metrics), grads = fn(params, teacher, batch)
    (without, others), before = gradient_fn()(
        {k: v for k, v in params.items() if k != "cls_head"}, teacher, batch
    )
    np.testing.assert_allclose(loss, without + 0.3 * metrics["cls_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["pixel_loss"], others["pixel_loss"], rtol=1e-5)
    assert all(np.any(x) for x in jax.tree.leaves(grads["cls_head"]))
    cls, was = (g["encoder"]["cls_token"] for g in (grads, before))
    assert norm(cls - was) > 0.01 * norm(was)
    teacher_grads, _ = jax.grad(total_fn(cfg), argnums=1, has_aux=True)(
        params, teacher, batch
    )
    assert all(not np.any(x) for x in jax.tree.leaves(teacher_grads))


def test_upper_blocks_and_their_instance_norm_change_the_target(params, teacher, batch):
    found = [gradient_fn()(params, teacher, batch)[0][1]["feature_loss"]]
    for settings in ({"feature_blocks": 2}, {"feature_instance_norm": True}):
        (_, metrics), _ = gradient_fn(**settings)(params, teacher, batch)
        found.append(metrics["feature_loss"])
    assert len({float(x) for x in found}) == 3


# --- Rows, devices and micro-batches -----------------------------------------------


def test_order_of_rows_does_not_matter(params, teacher, batch):
    order = np.random.default_rng(0).permutation(8)
    permuted = jax.tree.map(lambda x: x[order], batch)
    (loss, _), grads = gradient_fn()(params, teacher, batch)
    (other, _), others = gradient_fn()(params, teacher, permuted)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    difference = norm(jax.tree.map(lambda a, b: a - b, grads, others))
    assert difference < 1e-6 * norm(grads)  # sums in another order


def test_averaged_micro_batches_equal_the_whole_batch(params, teacher, batch):
    fn = gradient_fn()
    (loss, metrics), grads = fn(params, teacher, batch)

    @jax.jit
    def in_four(batch):
        return average_micro_batches(lambda rows: fn(params, teacher, rows), batch, 4)

    (other, other_metrics), others = in_four(batch)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    for name in ("loss", "pixel_loss", "feature_loss"):
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-6)
    difference = norm(jax.tree.map(lambda a, b: a - b, grads, others))
    assert difference < 1e-6 * norm(grads)


def test_micro_batches_together_hold_every_row_once():
    def count(batch):
        return jax.nn.one_hot(batch["row"], 12).sum(0)

    seen = average_micro_batches(count, {"row": jnp.arange(12)}, 4)
    np.testing.assert_allclose(seen, 1 / 4)


# --- Precision ---------------------------------------------------------------------


def test_bfloat16_products_agree_with_float32(params, teacher, batch):
    (loss, _), grads = gradient_fn()(params, teacher, batch)
    (rough, _), roughs = gradient_fn("bfloat16")(params, teacher, batch)
    # bfloat16 keeps 8 bits: 0.4 % a product; losses average over thousands.
    np.testing.assert_allclose(rough, loss, rtol=5e-3)
    assert {x.dtype for x in jax.tree.leaves(roughs)} == {jnp.dtype("float32")}
    dot = sum(
        np.vdot(a, b)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(roughs), strict=True)
    )
    assert dot > 0.999 * norm(grads) * norm(roughs)


def test_the_pixel_loss_starts_at_the_variance_of_its_target(params, teacher, batch):
    (_, metrics), _ = gradient_fn()(params, teacher, batch)
    p = 3 * tiny_config().encoder.patch_size ** 2
    # Unbiased variance: the mean square of the target is (p - 1) / p.
    np.testing.assert_allclose(metrics["pixel_loss"], (p - 1) / p, rtol=0.01)
