"""Promises about randomness: of (seed, stream, position), and of nothing else."""

import collections
import itertools

import numpy as np
import pytest

from personmae_jax.data.rng import BatchRng, RecordOrder


def _numbers(seed=0, stream=0, start=0, stop=1000, num=6):
    return BatchRng(seed, range(start, stop)).uniform(stream, num)


def _epoch(num_records, seed=0, epoch=0):
    start = epoch * num_records
    return RecordOrder(num_records, seed).records(range(start, start + num_records))


@pytest.mark.parametrize("num", [1, 4, 6, 81])
def test_numbers_of_a_position_depend_on_no_other(num):
    whole = _numbers(num=num)
    assert whole.shape == (1000, num)
    for start, stop in ((0, 1), (7, 9), (999, 1000)):
        part = _numbers(start=start, stop=stop, num=num)
        np.testing.assert_array_equal(part, whole[start:stop])
    of_a_host = BatchRng(0, range(3, 1000, 8)).uniform(0, num)
    np.testing.assert_array_equal(of_a_host, whole[3::8])


def test_numbers_are_uniform_and_never_repeat():
    parts = [
        _numbers(seed, stream, start, start + 1000)
        for seed, stream, start in itertools.product((0, 1, 2), (0, 1, 2), (0, 10**12))
    ]
    numbers = np.stack(parts)
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() < 1e-3
    assert 0.999 < numbers.max() < 1
    # 108,000 numbers, ten bins: five standard deviations of a bin.
    counts = np.histogram(numbers, 10, (0, 1))[0]
    assert np.abs(counts - 10_800).max() < 500


def test_neighbouring_seeds_streams_and_positions_are_independent():
    near = [
        _numbers(),
        _numbers(seed=1),
        _numbers(stream=1),
        _numbers(start=1, stop=1001),
    ]
    correlations = np.corrcoef([part.ravel() for part in near])
    assert np.abs(correlations - np.eye(4)).max() < 0.06  # 4.6 / sqrt(6000)


@pytest.mark.parametrize("num_records", [1, 2, 3, 20, 401, 4096, 100_003])
def test_every_epoch_is_a_permutation_of_all_records(num_records):
    for epoch in (0, 1, 300):
        np.testing.assert_array_equal(
            np.sort(_epoch(num_records, epoch=epoch)), np.arange(num_records)
        )


def test_the_order_depends_on_the_seed_and_the_epoch():
    orders = [_epoch(1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # one on average


def test_the_order_of_a_part_is_the_part_of_the_order():
    whole = np.concatenate([_epoch(20, epoch=epoch) for epoch in range(4)])
    for start, stop in ((0, 1), (19, 21), (5, 77)):  # across epochs too
        part = RecordOrder(20, 0).records(range(start, stop))
        np.testing.assert_array_equal(part, whole[start:stop])


def test_all_permutations_are_equally_likely():
    orders = collections.Counter(
        tuple(_epoch(4, epoch=epoch).tolist()) for epoch in range(4800)
    )
    assert len(orders) == 24
    assert min(orders.values()) > 130  # 200 on average, five deviations of 14
    assert max(orders.values()) < 270


def test_neighbours_are_as_likely_as_any_pair():
    order = _epoch(100_003)
    places = np.arange(len(order))
    assert abs(np.corrcoef(order, places)[0, 1]) < 0.015  # 4.7 / sqrt(100,003)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    # Steps between neighbours: each of ten classes, but for five deviations.
    steps = np.diff(order) % 100_003 * 10 // 100_003
    assert np.abs(np.bincount(steps, minlength=10) - 10_000).max() < 500
