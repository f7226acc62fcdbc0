"""What is hidden of a query."""

import numpy as np
import pytest

from personmae_jax.reid.occlusion import occlude


def occluded(record: int, height: int = 128, width: int = 64):
    """The image after, and where the block lies."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 256, (height, width, 3), np.uint8)
    after = before.copy()
    occlude(after, record)
    return after, (after != before).any(axis=-1)


@pytest.mark.parametrize(("height", "width"), [(128, 64), (256, 128), (16, 8)])
def test_a_quarter_to_half_of_the_image_is_one_block_of_one_colour(height, width):
    fractions = []
    for record in range(200):
        after, is_changed = occluded(record, height, width)
        y, x = np.nonzero(is_changed)
        block = after[y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert (block == block[0, 0]).all()
        fractions.append(block[..., 0].size / is_changed.size)
    half_a_pixel = 1 / width
    assert 0.25 - half_a_pixel < min(fractions) < 0.3
    assert 0.45 < max(fractions) < 0.5 + half_a_pixel


def test_no_part_of_the_image_is_safe_and_blocks_may_span_it():
    hidden = np.stack([occluded(record)[1] for record in range(400)])
    assert hidden.mean(axis=0).min() > 0.04
    assert hidden.any(axis=1).mean(axis=1).max() > 0.95  # all columns, e.g. the legs
    assert hidden.any(axis=2).mean(axis=1).max() > 0.95  # all rows, e.g. one side


def test_the_block_depends_on_the_record_alone():
    np.testing.assert_array_equal(occluded(7)[0], occluded(7)[0])
    assert len({occluded(record)[1].tobytes() for record in range(20)}) == 20
