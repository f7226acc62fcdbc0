"""A ranking is drawn as it was found."""

import numpy as np

from personmae_jax.engine import pictures


def test_a_ranking_shows_query_and_found_framed_by_whether_they_match():
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (6, 32, 16, 3), np.uint8))
    matches = [np.array([False, True]), np.array([True])]
    picture = pictures.rankings(images[:2], [images[2:4], images[4:5]], matches)
    assert picture.shape == (24 + 2 * 44, 3 * 28 + 12 + 4, 3)
    for row, panels in enumerate([(0, 2, 3), (1, 4)]):
        for column, index in enumerate(panels):
            y, x = 24 + 44 * row + 2, 28 * column + 16 * (column > 0) + 2
            frame = picture[y : y + 40, x : x + 24]
            np.testing.assert_array_equal(frame[4:-4, 4:-4], images[index])
            colour = (0, 0, 0)
            if column:
                colour = (0, 160, 0) if matches[row][column - 1] else (220, 0, 0)
            for edge in (frame[:4], frame[-4:], frame[:, :4], frame[:, -4:]):
                assert (edge == colour).all()
    assert (picture[24 + 44 :, -28:] == 255).all()  # nothing more was found
