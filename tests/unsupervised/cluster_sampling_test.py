"""Promises about who stands in a batch of a round."""

import collections
import contextlib

import numpy as np
import pytest
from unlabelled import tiny_labels, tiny_target, tiny_unsupervised

from personmae_jax.config_unsupervised import ClusterSamplingConfig
from personmae_jax.unsupervised.sampling import ClusterBatches, ClusterSampler

LABELS = np.array([0] * 9 + [-1] * 5 + [1] * 6 + [2] * 4 + [3] * 7 + [4], np.int32)
CAMERAS = np.random.default_rng(0).integers(0, 3, len(LABELS)).astype(np.int32)


def sampler(labels=LABELS, **changes) -> ClusterSampler:
    seed = changes.pop("seed", (0, 0))
    cfg = ClusterSamplingConfig(**{"clusters": 2, "images": 4} | changes)
    return ClusterSampler(labels, CAMERAS[: len(labels)], cfg, seed)


def test_a_batch_is_p_clusters_of_k_images_and_never_an_outlier():
    one = sampler()
    for step in range(60):
        rows = LABELS[one.batch(step)].reshape(2, 4)
        assert (rows == rows[:, :1]).all()
        assert len({*rows[:, 0]}) == 2
        assert (rows >= 0).all()


def test_every_cluster_comes_once_in_a_pass_but_for_those_left_over():
    one, left_out = sampler(), set()
    for number in range(30):
        seen = [c for s in (0, 1) for c in LABELS[one.batch(2 * number + s)][::4]]
        assert len({*seen}) == 4
        left_out |= {*range(5)} - {*seen}
    assert left_out == {*range(5)}


def test_the_others_of_an_image_are_of_other_cameras_wherever_there_are_some():
    for step in range(60):
        for row in sampler().batch(step).reshape(2, 4):
            own = np.flatnonzero(LABELS == LABELS[row[0]])
            if len({*CAMERAS[own]}) > 1:
                assert CAMERAS[row[0]] not in CAMERAS[row[1:]]


def test_the_other_cameras_have_their_turn():
    labels = np.zeros(12, np.int32)
    cameras = np.array([0] * 3 + [1] * 6 + [2] * 3, np.int32)
    one = ClusterSampler(
        *(labels, cameras, ClusterSamplingConfig(clusters=2, images=5), (3, 1))
    )
    for step in range(12):
        for row in one.batch(step).reshape(2, 5):
            counts = collections.Counter(cameras[row[1:]].tolist())
            assert sorted(counts.values()) == [2, 2]


def test_without_cameras_no_image_comes_twice_unless_there_are_too_few():
    one = sampler(across_cameras=False)
    for step in range(60):
        for row in one.batch(step).reshape(2, 4):
            count = np.count_nonzero(LABELS == LABELS[row[0]])
            assert len({*row}) == min(count, 4)


def test_with_one_camera_it_is_as_without_any():
    for step in range(20):
        one, none = (
            ClusterSampler(
                *(LABELS, np.zeros_like(CAMERAS)),
                ClusterSamplingConfig(clusters=2, images=4, across_cameras=across),
                (0, 0),
            ).batch(step)
            for across in (True, False)
        )
        np.testing.assert_array_equal(one, none)


def test_every_image_of_a_cluster_comes_first_equally_often():
    one = sampler(clusters=5)
    first = collections.Counter(
        int(image) for step in range(9 * 6 * 7 * 4) for image in one.batch(step)[::4]
    )
    for cluster in range(5):
        counts = [first[i] for i in np.flatnonzero(LABELS == cluster)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_clusters_than_a_batch_takes_fill_it_equally(count):
    labels = np.repeat(np.arange(count), 6).astype(np.int32)
    rows = labels[sampler(labels, clusters=4).batch(0)].reshape(4, 4)[:, 0]
    counts = np.bincount(rows, minlength=count)
    assert counts.max() - counts.min() <= 1


def test_seed_round_and_step_and_nothing_else_decide():
    steps = [17, 3, 40]
    first = [sampler().batch(step) for step in steps]
    again = [sampler().batch(step) for step in reversed(steps)][::-1]
    np.testing.assert_array_equal(first, again)
    for seed in ((1, 0), (0, 1)):  # another run's, another round
        assert not np.array_equal(first, [sampler(seed=seed).batch(s) for s in steps])


def batches(cfg=None, **where) -> ClusterBatches:
    labels = tiny_labels()
    return ClusterBatches(
        tiny_target(), cfg or tiny_unsupervised(), labels, labels * 10, 2, **where
    )


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_the_rows_of_the_same_global_batch(num_hosts):
    whole = batches()[9]
    assert whole["image"].shape == (16, 32, 16, 3)
    for host in range(num_hosts):
        part = batches(host=host, num_hosts=num_hosts)[9]
        assert {*part} == {"image", "label"}
        for name, rows in part.items():
            np.testing.assert_array_equal(rows, whole[name][host::num_hosts])


@pytest.mark.slow
def test_worker_processes_make_the_batches_of_this_one():
    cfg = tiny_unsupervised()
    cfg.data.num_workers = 2
    with contextlib.closing(batches(cfg).iterate(9, 12)) as stream:
        for step in range(9, 12):
            batch = next(stream)
            for name, rows in batches()[step].items():
                np.testing.assert_array_equal(batch[name], rows)


def test_a_stream_begins_at_any_step_of_the_round():
    some = batches()
    stream = some.iterate(10, 12)
    for step in (10, 11):
        batch = next(stream)
        for name, rows in batch.items():
            np.testing.assert_array_equal(rows, some[step][name])
    stream.close()


def test_the_label_is_the_memory_s_row_of_the_image():
    assert (batches()[8]["label"] % 10 == 0).all()
    assert (batches()[8]["label"] >= 0).all()
