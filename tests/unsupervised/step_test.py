"""Promises about one step without labels: what learns, on any number of devices."""

import functools

import jax
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from unlabelled import num_split, tiny_target, tiny_unsupervised

from personmae_jax import sharding
from personmae_jax.config import MeshConfig
from personmae_jax.optim import stepwise
from personmae_jax.unsupervised import memory
from personmae_jax.unsupervised.clustering import OUTLIER
from personmae_jax.unsupervised.program import build
from personmae_jax.unsupervised.rounds import PseudoLabels

N = 32  # images of the target


def make(
    num_devices: int = 1, fsdp: int = 1, *, proxies: bool = False, num_images: int = N
):
    cfg = tiny_unsupervised()
    cfg.memory.camera_proxies = proxies
    cfg.memory.num_negatives = 2
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:num_devices])
    return build(cfg, mesh, num_images=num_images)


@functools.cache
def on_one_device(*, proxies: bool):
    return make(1, proxies=proxies)


def begin(program, *, garbage: bool = False):
    """The initial state with a memory of six rows in three clusters."""
    rng = np.random.default_rng(0)
    rows = np.resize(np.arange(6, dtype=np.int32), N)
    found = memory.centroids(
        rng.standard_normal((N, 16)).astype(np.float32),
        rows,
        np.array([0, 0, 1, 1, 2, 2], np.int32),
        np.array([0, 1, 0, 1, 0, 1], np.int32),
    )
    if garbage:  # in the rows that are not used
        found.vectors[6:] = np.nan
        found.clusters[6:] = found.cameras[6:] = 1
    state = program.init_state()
    places = program.abstract_state.memory
    found = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), found, places)
    return type(state)(**(vars(state) | {"memory": found}))


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (16, 32, 16, 3), np.uint8)
    return {"image": image, "label": np.repeat([0, 3, 4, 5], 4).astype(np.int32)}


def after(program, steps: int = 2, *, garbage: bool = False):
    state = begin(program, garbage=garbage)
    for seed in range(steps):
        on_devices = sharding.to_devices(batch(seed), program.mesh)
        state, metrics = program.train_step(state, on_devices)
    return jax.device_get((state, metrics))


@pytest.fixture
def split_all(monkeypatch):
    """Parameters are split along fsdp, small as they are."""
    monkeypatch.setattr(sharding, "_MIN_SPLIT", 1)


@pytest.mark.parametrize("proxies", [False, True])
@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_do_what_one_does(split_all, fsdp, proxies):
    program = make(8, fsdp, proxies=proxies)
    for part in ("params", "opt_state", "memory"):
        assert (num_split(getattr(program.abstract_state, part)) > 0) == (fsdp > 1)
    state, numbers = after(on_one_device(proxies=proxies))
    other, others = after(program)
    for name, value in numbers.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)
    # The optimizer holds the gradients; what they change is far below the parameters.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        *(vars(state), vars(other)),
    )


def first_round(num_devices: int, fsdp: int = 1):
    """The state after the first clustering, and the features that it was of."""
    target, shown = tiny_target(), []
    program = make(num_devices, fsdp, num_images=len(target))
    rounds = PseudoLabels(
        *(program.cfg, program, target),
        lambda round_, clusters, features: shown.append(features) or {},
    )
    state, _, _ = rounds.open(1, program.init_state())
    return state, shown[0]


@pytest.fixture(scope="module")
def clustered_by_one():
    return jax.device_get(first_round(1))


@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_find_the_clusters_of_one(split_all, clustered_by_one, fsdp):
    state, features = first_round(8, fsdp)
    for part in (state.params, state.memory):
        assert (num_split(part) > 0) == (fsdp > 1)
    state, (one, of_one) = jax.device_get(state), clustered_by_one
    np.testing.assert_allclose(features, of_one, atol=1e-5)
    assert one.labels.max() >= 4  # clusters
    assert adjusted_rand_score(one.labels, state.labels) >= 0.99
    np.testing.assert_array_equal(one.labels == OUTLIER, state.labels == OUTLIER)
    clusters = np.arange(state.labels.max() + 1, dtype=np.int32)
    expected = memory.centroids(features, state.labels, clusters, 0 * clusters)
    jax.tree.map(np.testing.assert_array_equal, state.memory, expected)


@pytest.mark.parametrize("proxies", [False, True])
def test_what_stands_in_unused_rows_of_the_memory_changes_no_bit_of_a_step(proxies):
    program, found = on_one_device(proxies=proxies), []
    for garbage in (False, True):
        state, metrics = after(program, garbage=garbage)
        learned = (state.params, state.statistics, state.opt_state, metrics)
        found.append((learned, state.memory.vectors[:6]))
    assert np.isnan(state.memory.vectors[6:]).all()
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_the_rows_of_the_batch_move_and_no_other_and_all_keep_their_length():
    program = on_one_device(proxies=False)
    before = np.asarray(begin(program).memory.vectors)
    state, _ = after(program, 1)
    moved = (state.memory.vectors != before).any(axis=1)
    assert np.flatnonzero(moved).tolist() == [0, 3, 4, 5]
    np.testing.assert_allclose(
        np.linalg.norm(state.memory.vectors[:6], axis=1), 1, atol=1e-6
    )
    assert not state.memory.vectors[6:].any()


def test_encoder_scale_and_statistics_learn():
    program = on_one_device(proxies=False)
    before = jax.device_get(begin(program))
    state, numbers = after(program)
    changed = jax.tree.map(lambda a, b: (a != b).any(), before.params, state.params)
    del changed["encoder"]["norm"]  # the batch norm undoes what it does
    assert all(jax.tree.leaves(changed))
    assert (state.statistics["mean"] != 0).any()
    assert state.step == 2
    assert set(numbers) == {"loss", "accuracy", "lr", "grad_norm", "param_norm"}


def test_the_learning_rate_falls_after_two_fifths_and_four_fifths():
    cfg = tiny_unsupervised()
    cfg.train.rounds, cfg.train.steps_per_round = 5, 2
    optim = cfg.optim
    rate = stepwise(1.0, 0.0, optim.decay_every, optim.decay, cfg.num_steps)
    values = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(values, [1] * 4 + [0.1] * 4 + [0.01] * 2, rtol=1e-6)
    warm = stepwise(1.0, 0.4, 1.0, 0.1, 10)
    np.testing.assert_allclose([warm(s) for s in range(6)], [0, 0.25, 0.5, 0.75, 1, 1])
