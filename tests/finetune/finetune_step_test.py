"""Promises about one step of fine-tuning: what each parameter learns, and from whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetuning import tiny_finetuning

from personmae_jax import sharding
from personmae_jax.config import MeshConfig
from personmae_jax.config_finetune import FinetuneOptimConfig
from personmae_jax.engine.trees import named_leaves
from personmae_jax.finetune import model
from personmae_jax.finetune.program import build
from personmae_jax.models import batch_norm, personmae
from personmae_jax.optim import layer_scales, layerwise_optimizer


def make(cfg, num_devices: int = 1, fsdp: int = 1):
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:num_devices])
    return build(cfg, mesh, num_images=32, num_identities=8, num_cameras=2)


def noise(cfg, seed: int = 0) -> dict[str, np.ndarray]:
    rng, b = np.random.default_rng(seed), cfg.batch_size
    size = (b, cfg.data.height, cfg.data.width, 3)
    return {
        "image": rng.integers(0, 256, size, np.uint8),
        "label": (np.arange(b) // 4).astype(np.int32),
        "camera": (np.arange(b) % 2).astype(np.int32),
    }


def with_cameras():
    cfg = tiny_finetuning()
    cfg.head.use_cameras = True
    cfg.optim.optimizer, cfg.optim.base_lr, cfg.optim.warmup = "sgd", 0.01, 0.0
    return cfg


@pytest.fixture(scope="module")
def alone():
    """One device: the state after 0, 1 and 2 steps, and the metrics of these."""
    run = make(with_cameras())
    states, metrics = [run.init_state()], []
    for seed in range(2):
        batch = sharding.to_devices(noise(run.cfg, seed), run.mesh)
        given = jax.tree.map(jnp.copy, states[-1])  # a step takes its memory over
        state, numbers = run.train_step(given, batch)
        states.append(state)
        metrics.append(numbers)
    return states, metrics


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_do_what_one_does(alone, fsdp):
    """Statistics, pairs and what is dropped are of the global batch."""
    states, numbers = alone
    run = make(with_cameras(), 8, fsdp)
    state = run.init_state()
    for seed in range(2):
        batch = sharding.to_devices(noise(run.cfg, seed), run.mesh)
        state, metrics = run.train_step(state, batch)
    for name, value in numbers[-1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    one, eight = (named_leaves((s.params, s.statistics)) for s in (states[-1], state))
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=1e-5, err_msg=name)


def test_two_hosts_drop_the_same_branches_of_the_same_images_as_one(alone, monkeypatch):
    run, batch = make(with_cameras()), noise(with_cameras())
    laid = {n: np.concatenate([x[::2], x[1::2]]) for n, x in batch.items()}
    state, on_devices = run.init_state(), sharding.to_devices(laid, run.mesh)
    halves = dict(enumerate(np.arange(len(batch["label"])).reshape(2, -1)))
    monkeypatch.setattr(sharding, "rows_of_hosts", lambda *_: halves)
    _, metrics = run.train_step(state, on_devices)
    for name, value in alone[1][0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_every_parameter_learns(alone):
    first, _, last = (named_leaves(state.params) for state in alone[0])
    assert not [n for n in first if np.array_equal(first[n], last[n])]


def test_a_layers_learning_rate_falls_with_its_distance_from_the_head():
    cfg = with_cameras()
    scales = named_leaves(layer_scales(make(cfg).abstract_state.params, 2, 0.5))
    for name, scale in scales.items():
        expected = {
            "encoder/blocks_0": 0.25,
            "encoder/blocks_1": 0.5,
            "encoder/norm": 1.0,
            "encoder/cls_token": 0.125,
            "encoder/patch_embed": 0.125,
            "camera_embed": 0.125,
            "bottleneck/scale": 1.0,
            "classifier/kernel": 1.0,
        }
        assert scale == next(v for k, v in expected.items() if name.startswith(k)), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_updates_are_those_of_the_optimizer_times_the_layers_scale(optimizer):
    params = {
        "encoder": {"blocks_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
        "classifier": {"kernel": jnp.full((2, 2), 2.0)},
    }
    grads = jax.tree.map(lambda x: 0.3 * x, params)
    optim = FinetuneOptimConfig(
        optimizer=optimizer, weight_decay=0.1, layer_decay=0.5, beta1=0.8, momentum=0.8
    )
    tx = layerwise_optimizer(optim, lambda _: 0.01, depth=1)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)

    def expected(kernel: float, decays: bool) -> float:
        gradient, decay = 0.3 * kernel, 0.1 * kernel * decays
        if optimizer == "adamw":  # a constant gradient is its own average
            return -0.01 * (1.0 + decay)
        return -0.01 * 1.8 * (gradient + decay)

    block = updates["encoder"]["blocks_0"]
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(block["kernel"], 0.5 * expected(1, True), **close)
    np.testing.assert_allclose(block["bias"], 0.5 * expected(1, False), **close)
    head = updates["classifier"]["kernel"]
    np.testing.assert_allclose(head, expected(2, True), **close)


def test_the_learning_rate_is_in_proportion_to_the_batch(alone):
    """16 images, a quarter of the 64 that base_lr is meant for; a cosine over 8."""
    expected = [0.01 / 4, 0.01 / 4 * (1 + np.cos(np.pi / 8)) / 2]
    np.testing.assert_allclose([m["lr"] for m in alone[1]], expected, rtol=1e-5)


def test_epochs_are_counted_in_training_images():
    cfg = tiny_finetuning()
    cfg.train.steps, cfg.train.epochs = None, 5.0
    assert make(cfg).num_steps == 10  # of 16 images, out of 32
    cfg.train.epochs = 0.1
    assert make(cfg).num_steps == 1


def test_drop_path_rates_grow_from_zero_and_keep_the_mean():
    scales = personmae.sample_drop_path_mask(
        jax.random.key(0), 3, 0.4, 20_000, sharding.make_mesh()
    )
    assert scales.shape == (3, 2, 20_000)
    for block, rate in zip(np.asarray(scales), (0.0, 0.2, 0.4), strict=True):
        kept = np.float32(1 / (1 - rate))
        assert set(np.unique(block)) <= {np.float32(0), kept}
        np.testing.assert_allclose((block == 0).mean(axis=1), rate, atol=0.02)


def test_a_dropped_branch_leaves_its_image_and_no_other_as_it_was(alone):
    cfg = with_cameras()
    params = alone[0][0].params["encoder"]
    patches = jax.random.normal(jax.random.key(1), (2, 8, 192))

    @jax.jit
    def encode(scales):
        return personmae.encode(
            cfg.encoder, cfg.grid, params, patches, drop_path_mask=scales
        )

    plain, ones = encode(None), encode(jnp.ones((2, 2, 2)))
    np.testing.assert_allclose(plain.tokens, ones.tokens, atol=1e-6)
    dropped = encode(jnp.ones((2, 2, 2)).at[1, :, 0].set(0.0))
    first, last = dropped.blocks
    np.testing.assert_array_equal(last[0], first[0])  # the second block did nothing
    np.testing.assert_allclose(last[1], plain.blocks[1][1], atol=1e-6)


def test_the_batch_norm_is_that_of_pytorch():
    torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")
    norm = torch.nn.BatchNorm1d(5)
    features = np.random.default_rng(0).standard_normal((3, 12, 5), np.float32) * 3 + 1
    scale, running = jnp.arange(1.0, 6.0), batch_norm.init_statistics(5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 6.0))
    for batch in features:
        ours, running = batch_norm.batch_norm(jnp.asarray(batch), scale, running)
        theirs = norm(torch.from_numpy(batch)).detach().numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(running["mean"], norm.running_mean, rtol=1e-5)
    np.testing.assert_allclose(running["var"], norm.running_var, rtol=1e-5)
    ours = model.normalise(jnp.asarray(features[0]), scale, running)
    theirs = norm.eval()(torch.from_numpy(features[0])).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def inputs(cfg):
    batch = noise(cfg)
    return jnp.asarray(batch["image"]), jnp.asarray(batch["camera"])


@pytest.mark.parametrize("feature", ["before", "after"])
def test_people_are_sought_before_or_after_the_batch_norm(alone, feature):
    cfg, state = with_cameras(), alone[0][-1]
    cfg.head.feature = feature
    given = {"params": state.params, "statistics": state.statistics}
    sought = model.make_encode(cfg, jnp.float32)(given, *inputs(cfg))
    plain = model.encode(cfg, state.params, *inputs(cfg))
    if feature == "after":
        scale = state.params["bottleneck"]["scale"]
        plain = model.normalise(plain, scale, state.statistics)
    np.testing.assert_allclose(sought, plain, atol=1e-6)


def test_a_cameras_embedding_reaches_the_images_of_that_camera_alone(alone):
    cfg, params = with_cameras(), alone[0][0].params
    before = model.encode(cfg, params, *inputs(cfg))
    # A constant would be taken off again by the norms.
    moved = params["camera_embed"].at[1].add(jnp.arange(16.0))
    after = model.encode(cfg, params | {"camera_embed": moved}, *inputs(cfg))
    changed = np.abs(np.asarray(before - after)).max(axis=1) > 1e-3
    np.testing.assert_array_equal(changed, noise(cfg)["camera"] == 1)


def test_the_classifier_begins_with_nearly_the_same_chance_for_everybody(alone):
    loss = alone[1][0]["identity_loss"]
    np.testing.assert_allclose(loss, np.log(8), atol=0.05)
