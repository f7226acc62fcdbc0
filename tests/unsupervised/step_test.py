"""Promises about one step without labels: what learns, on any number of devices."""

import jax
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from unlabelled import tiny_target, tiny_unsupervised

from personmae_jax import sharding
from personmae_jax.config import MeshConfig
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


def begin(program):
    """The initial state with a memory of six rows in three clusters."""
    rng = np.random.default_rng(0)
    rows = np.resize(np.arange(6, dtype=np.int32), N)
    found = memory.centroids(
        rng.standard_normal((N, 16)).astype(np.float32),
        rows,
        np.array([0, 0, 1, 1, 2, 2], np.int32),
        np.array([0, 1, 0, 1, 0, 1], np.int32),
    )
    state = program.init_state()
    places = program.abstract_state.memory
    found = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), found, places)
    return type(state)(**(vars(state) | {"memory": found}))


def batch(seed: int = 0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (16, 32, 16, 3), np.uint8)
    return {"image": image, "label": np.repeat([0, 3, 4, 5], 4).astype(np.int32)}


def after(program, steps: int = 2):
    state = begin(program)
    for seed in range(steps):
        on_devices = sharding.to_devices(batch(seed), program.mesh)
        state, metrics = program.train_step(state, on_devices)
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("proxies", [False, True])
@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_do_what_one_does(fsdp, proxies):
    state, numbers = after(make(1, proxies=proxies))
    other, others = after(make(8, fsdp, proxies=proxies))
    for name, value in numbers.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        *((state.params, state.memory), (other.params, other.memory)),
    )


@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_find_the_clusters_of_one(fsdp):
    target, found = tiny_target(), []
    for program in (
        make(1, num_images=len(target)),
        make(8, fsdp, num_images=len(target)),
    ):
        rounds = PseudoLabels(program.cfg, program, target)
        state, _, _ = rounds.open(1, program.init_state())
        found.append(np.asarray(jax.device_get(state.labels)))
    one, other = found
    assert one.max() >= 4  # clusters
    assert adjusted_rand_score(one, other) >= 0.99
    np.testing.assert_array_equal(one == OUTLIER, other == OUTLIER)


def test_the_rows_of_the_batch_move_and_no_other_and_all_keep_their_length():
    program = make()
    before = np.asarray(begin(program).memory.vectors)
    state, _ = after(program, 1)
    moved = (state.memory.vectors != before).any(axis=1)
    assert np.flatnonzero(moved).tolist() == [0, 3, 4, 5]
    np.testing.assert_allclose(
        np.linalg.norm(state.memory.vectors[:6], axis=1), 1, atol=1e-6
    )
    assert not state.memory.vectors[6:].any()


def test_encoder_scale_and_statistics_learn():
    program = make()
    before = jax.device_get(begin(program))
    state, numbers = after(program)
    changed = jax.tree.map(lambda a, b: (a != b).any(), before.params, state.params)
    assert changed["bottleneck"]["scale"]
    assert changed["encoder"]["cls"]["token"] if "cls" in changed["encoder"] else True
    assert (state.statistics["mean"] != 0).any()
    assert state.step == 2
    assert set(numbers) == {"loss", "accuracy", "lr", "grad_norm", "param_norm"}


def test_the_learning_rate_falls_after_two_fifths_and_four_fifths():
    cfg = tiny_unsupervised()
    cfg.train.rounds, cfg.train.steps_per_round = 5, 2
    from personmae_jax.optim import stepwise

    optim = cfg.optim
    rate = stepwise(1.0, 0.0, optim.decay_every, optim.decay, cfg.num_steps)
    values = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(values, [1] * 4 + [0.1] * 4 + [0.01] * 2, rtol=1e-6)
    warm = stepwise(1.0, 0.4, 1.0, 0.1, 10)
    np.testing.assert_allclose([warm(s) for s in range(6)], [0, 0.25, 0.5, 0.75, 1, 1])
