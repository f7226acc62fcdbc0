"""Promises about which patches of RegionA are hidden."""

import numpy as np
import pytest

from personmae_jax.config import MasksConfig
from personmae_jax.data.masks import sample_visible
from personmae_jax.data.rng import BatchRng


def _hidden(rows, columns, cfg, num, seed=0):
    """Bool (num, rows, columns), True where a patch is hidden."""
    visible = sample_visible(BatchRng(seed, range(num)), rows, columns, cfg)
    hidden = np.ones((num, rows * columns), bool)
    np.put_along_axis(hidden, visible, False, axis=1)
    return hidden.reshape(num, rows, columns)


def _hidden_neighbours(hidden):
    """Mean number of hidden ones among a hidden patch's four neighbours."""
    pairs = (hidden[:, 1:] & hidden[:, :-1]).sum()
    pairs += (hidden[:, :, 1:] & hidden[:, :, :-1]).sum()
    return 2 * pairs / hidden.sum()


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (8, 4), (5, 3), (1, 9), (1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75, 0.97])
def test_every_mask_has_the_exact_count(kind, grid, ratio):
    num = grid[0] * grid[1]
    cfg = MasksConfig(kind=kind, ratio=ratio)
    visible = sample_visible(BatchRng(0, range(50)), *grid, cfg)
    assert visible.dtype == np.int32
    assert visible.shape == (50, num - round(ratio * num))
    assert (np.diff(visible) > 0).all()
    assert ((visible >= 0) & (visible < num)).all()


@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (8, 4)])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_every_row_and_column_is_hidden_at_the_ratio(grid, ratio):
    hidden = _hidden(*grid, MasksConfig(ratio=ratio), 10_000)
    assert np.abs(hidden.mean((0, 2)) - ratio).max() < 0.03
    assert np.abs(hidden.mean((0, 1)) - ratio).max() < 0.03


def test_blocks_are_blocks_and_random_is_not():
    # A patch of a 16 x 8 grid has 3.6 neighbours, half of them hidden at random.
    blocks = _hidden_neighbours(_hidden(16, 8, MasksConfig(), 1000))
    random = _hidden_neighbours(_hidden(16, 8, MasksConfig(kind="random"), 1000))
    assert random == pytest.approx(3.625 * 63 / 127, abs=0.05)
    assert blocks > 2.8


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_share_beside_the_blocks_is_hidden_at_random(share):
    cfg = MasksConfig(ratio=0.625, block_share=share)
    hidden = _hidden(16, 8, cfg, 2000)
    assert (hidden.sum((1, 2)) == 80).all()
    assert np.abs(hidden.mean((0, 2)) - 0.625).max() < 0.03
    blocks = _hidden_neighbours(_hidden(16, 8, MasksConfig(ratio=0.625), 1000))
    random = _hidden_neighbours(
        _hidden(16, 8, MasksConfig(ratio=0.625, kind="random"), 1000)
    )
    between = _hidden_neighbours(hidden)
    assert random - 0.05 < between < blocks - 0.1
    if share:
        assert between > random + 0.05


def test_blocks_that_hide_all_are_the_masks_without_a_share():
    """The draws of earlier runs stay."""
    visible = sample_visible(BatchRng(0, range(3)), 4, 2, MasksConfig())
    expected = [[4, 5, 6, 7], [0, 1, 4, 5], [2, 4, 5, 7]]
    np.testing.assert_array_equal(visible, expected)


def test_a_block_may_span_the_full_width():
    hidden = _hidden(16, 8, MasksConfig(), 200)
    assert hidden.all(-1).any(-1).mean() > 0.3
    random = _hidden(16, 8, MasksConfig(kind="random"), 200)
    assert random.all(-1).any(-1).mean() < 0.2


def test_one_block_keeps_area_and_aspect():
    # Of at most one block: as much as it hides is what is to be hidden.
    cfg = MasksConfig(ratio=0.09, min_block=0.09, min_aspect=4.0, max_aspect=4.0)
    heights, widths = [], []
    for hidden in _hidden(40, 40, cfg, 300):
        rows, columns = hidden.any(1).nonzero()[0], hidden.any(0).nonzero()[0]
        if 0 < rows[0] and rows[-1] < 39 and 0 < columns[0] and columns[-1] < 39:
            heights.append(np.ptp(rows) + 1)
            widths.append(np.ptp(columns) + 1)
    # 144 patches at 4:1 are 24 x 6.
    assert len(heights) > 20
    assert np.median(heights) == 24
    assert np.median(widths) == 6


@pytest.mark.parametrize("kind", ["block", "random"])
def test_masks_differ_and_each_follows_from_seed_and_position_alone(kind):
    cfg = MasksConfig(kind=kind)
    masks = sample_visible(BatchRng(3, range(100)), 16, 8, cfg)
    assert len(np.unique(masks, axis=0)) == 100
    for part in (range(0, 37), range(37, 38), range(38, 100)):
        visible = sample_visible(BatchRng(3, part), 16, 8, cfg)
        np.testing.assert_array_equal(visible, masks[part.start : part.stop])
    assert (sample_visible(BatchRng(4, range(100)), 16, 8, cfg) != masks).any(1).all()
