"""Training batches of chosen images, augmented, as a function of (seed, step)."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int, Int64, UInt8

from personmae_jax.config import ImageConfig
from personmae_jax.config_finetune import AugmentConfig
from personmae_jax.data.batches import Batch, HostBatches
from personmae_jax.data.buffer_pool import BufferPool
from personmae_jax.data.records import Records
from personmae_jax.data.rng import BatchRng, RecordOrder
from personmae_jax.reid.datasets import read_resized

_NUM_DRAWS = 8  # uniform numbers an image is changed by
_AUGMENT, _NOISE = 0, 2  # what random numbers are for; 1 is who is in a batch


class GroupSampler:
    """Which image stands in which row of which batch of P groups with K images each.

    The groups of all batches are an endless stream of passes. In each pass every group
    comes once, in an order of its own; where P does not divide their number, the last,
    incomplete batch is dropped, of other groups in each pass. Where there are fewer
    than P groups, the stream goes on within the batch.
    """

    def __init__(
        self, labels: Int[np.ndarray, " n"], num_groups: int, num_images: int, seed: int
    ):
        """Sorts the images by their groups, from 0; one below 0 is in none.

        P and K are `num_groups` and `num_images`; `seed` orders the groups.
        """
        order = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
        counts = np.bincount(labels[order])
        self._images_of = np.split(order, np.cumsum(counts)[:-1])
        self._p, self._k = num_groups, num_images
        self._order = RecordOrder(len(counts), seed)

    def batch(self, step: int) -> Int64[np.ndarray, " b"]:
        """The images of a whole batch, those of a group side by side."""
        count = len(self._images_of)
        first = step * self._p
        if count >= self._p:
            passes, number = divmod(step, count // self._p)
            first = passes * count + number * self._p
        positions = range(first, first + self._p)
        chosen = self._order.records(positions)
        return np.concatenate(
            [
                self._images(int(group), position // count)
                for group, position in zip(chosen, positions, strict=True)
            ]
        )

    def _images(self, group: int, passes: int) -> Int64[np.ndarray, " k"]:
        """K images of a group in a pass."""
        raise NotImplementedError


class PeopleBatches(HostBatches):
    """Batches of the images that `choose` names; `image` is uint8 (b, y, x, 3), RGB.

    Making one raises RunError if an image cannot be used: another one in its place
    would be another person.
    """

    def __init__(
        self,
        records: Records,
        data: ImageConfig,
        augment: AugmentConfig,
        seed: int,
        *,
        batch_size: int,
        **hosts: int,
    ):
        """Prepares the stream; nothing is read yet; `hosts` as in `HostBatches`."""
        super().__init__(
            batch_size,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            **hosts,
        )
        self._records, self._data, self._augment = records, data, augment
        self._seed_of_images = seed
        self._memory = BufferPool(self._num_rows, data.height, data.width, 3)

    def choose(self, step: int) -> tuple[Int64[np.ndarray, " b"], Batch]:
        """The records in the rows of a whole batch, and what else is said of them."""
        raise NotImplementedError

    def begin(self, positions: range) -> tuple[Batch, Callable[[int], object]]:
        step, first = divmod(positions.start, self._batch_size)
        own = slice(first, None, positions.step)
        records, about = self.choose(step)
        numbers = BatchRng(self._seed_of_images, positions).uniform(
            _AUGMENT, _NUM_DRAWS
        )
        batch = {"image": self._memory.take()}
        batch |= {name: rows[own] for name, rows in about.items()}
        fill = functools.partial(
            self._fill_row, batch["image"], records[own], positions, numbers
        )
        return batch, fill

    def _fill_row(
        self,
        pixels: UInt8[np.ndarray, "b height width 3"],
        records: Int64[np.ndarray, " b"],
        positions: range,
        numbers: Float64[np.ndarray, "b n"],
        row: int,
    ) -> None:
        data, out = self._data, pixels[row]
        read_resized(self._records, int(records[row]), data, out)
        noise = np.random.default_rng((self._seed_of_images, _NOISE, positions[row]))
        augment(out, numbers[row], noise, self._augment, (data.mean, data.std))


def augment(
    pixels: UInt8[np.ndarray, "height width 3"],
    numbers: Float64[np.ndarray, " n"],
    noise: np.random.Generator,
    cfg: AugmentConfig,
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
) -> None:
    """Flips, shifts and erases one image in place.

    The shift is a crop of the image with `padding` black pixels on every side. The
    erased rectangle becomes noise that is standard normal once it is normalised, but
    for what lies outside 0..255; one that would not fit is clipped, where timm draws
    again.

    Args:
      pixels: Of the size that the network sees.
      numbers: Eight, uniform in [0, 1).
      noise: For the rectangle.
      cfg: Probabilities and sizes.
      statistics: Mean and standard deviation by which images are normalised.

    Source: TransReID, datasets/make_dataloader.py; timm's RandomErasing, mode "pixel".
    """
    height, width, _ = pixels.shape
    flip, y, x, erase, area, aspect, top, left = numbers
    if flip < cfg.flip_probability:
        pixels[:] = pixels[:, ::-1].copy()
    pad = cfg.padding
    if pad:
        dy, dx = int(y * (2 * pad + 1)), int(x * (2 * pad + 1))
        padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
        pixels[:] = padded[dy : dy + height, dx : dx + width]
    if erase >= cfg.erase_probability:
        return
    share = cfg.erase_min_area + area * (cfg.erase_max_area - cfg.erase_min_area)
    ratio = cfg.erase_min_aspect ** (1 - 2 * aspect)  # height to width, uniform in log
    h = min(height, round(np.sqrt(share * height * width * ratio)))
    w = min(width, round(np.sqrt(share * height * width / ratio)))
    y0, x0 = int(top * (height - h + 1)), int(left * (width - w + 1))
    mean, std = np.asarray(statistics, np.float32)[:, None, None]
    values = noise.standard_normal((h, w, 3), np.float32) * std + mean
    pixels[y0 : y0 + h, x0 : x0 + w] = np.clip(values * 255, 0, 255).round()
