"""Pictures show what the network saw, no more, and what it predicted."""

import numpy as np
import pytest

from personmae_jax.data.images import Box, Outcome
from personmae_jax.data.pipeline import Example
from personmae_jax.pretrain.reconstructions import reconstructions

PATCH = 16


def make_example(seed: int) -> Example:
    rng = np.random.default_rng(seed)
    region_a, region_b = rng.integers(1, 100, (2, 128, 64, 3), np.uint8)
    return Example(
        image=rng.integers(0, 100, (200, 90, 3), np.uint8),
        box_a=Box(0, 0, 150, 70),
        box_b=Box(40, 20, 150, 70),
        region_a=region_a,
        region_b=region_b,
        visible=np.array([0, 5], np.int32),
        geometry=np.ones(4, np.float32),
        record=np.int64(0),
        outcome=np.int8(Outcome.PLAIN),
    )


@pytest.fixture
def panels() -> np.ndarray:
    """Panels of two rows: (2, 4, 128, 64, 3), titles and margins cut off."""
    examples = [make_example(0), make_example(1)]
    predicted = np.stack([255 - e.region_b for e in examples])
    picture = reconstructions(examples, predicted, PATCH)
    rows = picture[24::2, ::2]  # small inputs are shown at twice their size
    rows = rows.reshape(2, 132, 4, 68, 3).transpose(0, 2, 1, 3, 4)
    return rows[:, :, 2:-2, 2:-2]


def test_rows_are_image_region_a_region_b_prediction(panels):
    for i in range(2):
        example = make_example(i)
        np.testing.assert_array_equal(panels[i, 2], example.region_b)
        np.testing.assert_array_equal(panels[i, 3], 255 - example.region_b)


def test_hidden_patches_of_region_a_are_grey(panels):
    region_a = make_example(0).region_a
    for patch in range(32):
        y, x = divmod(patch, 4)
        where = np.s_[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        shown = panels[0, 1][where]
        if patch in (0, 5):
            np.testing.assert_array_equal(shown, region_a[where])
        else:
            assert (shown == 128).all()


def test_both_boxes_are_drawn_where_they_lie(panels):
    image = panels[0, 0].astype(int)
    scale = 128 / 200
    for box, colour in (
        (Box(0, 0, 150, 70), (255, 140, 0)),
        (Box(40, 20, 150, 70), (30, 144, 255)),
    ):
        left = round((64 - round(90 * scale)) / 2)
        y, x = round(box.y * scale), left + round(box.x * scale)
        # The middle of the left edge and of the top edge.
        assert tuple(image[y + round(box.height * scale / 2), x]) == colour
        assert tuple(image[y, x + 2]) == colour
