"""Training batches of P identities with K images each, as a function of (seed, step).

The identities of all batches are an endless stream of passes. In each pass every
identity comes once, in an order of its own; where P does not divide their number, the
fewer than P that are left over at its end are left out, others in each pass. An
identity's images come in rounds: each round is a permutation of them, of which every
pass takes the next K, and what does not fill K is left out of the round. An identity
with fewer than K images repeats them, as evenly as can be.

So the people of a batch are distinct, no image comes twice in it that need not, and
everybody is seen equally often. `RandomIdentitySampler` of TransReID and HAP shows an
identity as often as it has K images instead, and draws which, so that its batch k
depends on all before it.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt8

from personmae_jax.config_finetune import AugmentConfig, FinetuneConfig
from personmae_jax.data import images
from personmae_jax.data.batches import Batch, HostBatches
from personmae_jax.data.buffer_pool import BufferPool
from personmae_jax.data.images import Box
from personmae_jax.data.rng import BatchRng, RecordOrder
from personmae_jax.errors import ConfigError
from personmae_jax.reid.datasets import (
    ReidDataset,
    check_training,
    open_dataset,
    read_image,
    synthetic_dataset,
)

_NUM_DRAWS = 8  # uniform numbers an image is changed by
_AUGMENT, _IMAGES, _NOISE = 0, 1, 2  # what random numbers are for


class IdentitySampler:
    """Which training image stands in which row of which batch."""

    def __init__(
        self,
        labels: Int64[np.ndarray, " t"],
        *,
        identities: int,
        images: int,
        seed: int,
    ):
        """Sorts the images by identity.

        Args:
          labels: Identity of every training image, 0 .. number of identities - 1.
          identities: In a batch, at most as many as there are; P.
          images: Of each; K.
          seed: Of all order.
        """
        order = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        self._images_of = np.split(order, np.cumsum(counts)[:-1])
        self._p, self._k, self._seed = identities, images, seed
        self._order = RecordOrder(len(counts), seed)
        self._batches_per_pass = len(counts) // identities

    def batch(self, step: int) -> Int64[np.ndarray, " b"]:
        """The training images of a whole batch, those of an identity side by side."""
        passes, number = divmod(step, self._batches_per_pass)
        first = passes * len(self._images_of) + number * self._p
        chosen = self._order.records(range(first, first + self._p))
        return np.concatenate([self._images(int(i), passes) for i in chosen])

    def _images(self, identity: int, passes: int) -> Int64[np.ndarray, " k"]:
        own = self._images_of[identity]
        turns, turn = divmod(passes, max(1, len(own) // self._k))
        rng = np.random.default_rng((self._seed, _IMAGES, identity, turns))
        order = np.resize(rng.permutation(len(own)), max(len(own), self._k))
        return own[order[turn * self._k : (turn + 1) * self._k]]


class FinetuneBatches(HostBatches):
    """The training batches of one host; picklable, and read by many threads at once.

    That of a step is a dict of arrays whose leading axis is b = P * K / num_hosts:
      `image`: uint8 (b, height, width, 3), RGB.
      `label`: int32 (b,), the identity, 0 .. number of training identities - 1.
      `camera`: int32 (b,), 0 .. number of cameras of the whole data set - 1.

    Making one raises RunError if an image cannot be used: another one in its place
    would be another person.
    """

    def __init__(
        self,
        dataset: ReidDataset,
        cfg: FinetuneConfig,
        *,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """Prepares the stream; nothing is read yet.

        Args:
          dataset: With images to train on.
          cfg: A checked configuration.
          host: This process's index, from 0.
          num_hosts: Number of processes, a divisor of `cfg.batch_size`.
        """
        super().__init__(
            cfg.batch_size,
            num_threads=cfg.data.num_threads,
            num_workers=cfg.data.num_workers,
            host=host,
            num_hosts=num_hosts,
        )
        self._dataset, self._cfg = dataset, cfg
        people = dataset.identities[dataset.train]
        self._labels = np.unique(people, return_inverse=True)[1]
        self._cameras = camera_numbers(dataset)[dataset.train]
        self._sampler = IdentitySampler(
            self._labels,
            identities=cfg.sampling.identities,
            images=cfg.sampling.images,
            seed=cfg.train.seed,
        )
        rows = cfg.batch_size // num_hosts
        self._memory = BufferPool(rows, cfg.data.height, cfg.data.width, 3)

    def begin(self, positions: range) -> tuple[Batch, Callable[[int], object]]:
        step, first = divmod(positions.start, self._batch_size)
        chosen = self._sampler.batch(step)[first :: positions.step]
        numbers = BatchRng(self._cfg.train.seed, positions).uniform(
            _AUGMENT, _NUM_DRAWS
        )
        batch = {
            "image": self._memory.take(),
            "label": self._labels[chosen].astype(np.int32),
            "camera": self._cameras[chosen],
        }
        fill = functools.partial(
            self._fill_row, batch["image"], chosen, positions, numbers
        )
        return batch, fill

    def _fill_row(
        self,
        pixels: UInt8[np.ndarray, "b height width 3"],
        chosen: Int64[np.ndarray, " b"],
        positions: range,
        numbers: Float64[np.ndarray, "b n"],
        row: int,
    ) -> None:
        cfg, record = self._cfg, int(self._dataset.train[chosen[row]])
        image = read_image(
            self._dataset.records,
            record,
            max_pixels=cfg.data.max_pixels,
            min_side=cfg.data.min_side,
        )
        out = pixels[row]
        images.crop_resize(image, Box(0, 0, *image.shape[:2]), out)
        noise = np.random.default_rng((cfg.train.seed, _NOISE, positions[row]))
        augment(out, numbers[row], noise, cfg.augment, (cfg.data.mean, cfg.data.std))


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


def camera_numbers(dataset: ReidDataset) -> Int32[np.ndarray, " n"]:
    """The cameras of all records, counted from 0 in the order of their numbers."""
    return np.unique(dataset.cameras, return_inverse=True)[1].astype(np.int32)


def num_cameras(dataset: ReidDataset) -> int:
    """How many cameras the whole data set has."""
    return len(np.unique(dataset.cameras))


def num_identities(dataset: ReidDataset) -> int:
    """How many identities there are to train on."""
    return len(np.unique(dataset.identities[dataset.train]))


def open_training(cfg: FinetuneConfig) -> ReidDataset:
    """Opens the data set that the settings name, to train on and to be scored by.

    Raises:
      ConfigError: It is laid out otherwise, nobody can be sought in it, or no batch,
        or no camera, can be learned from it.
    """
    data = cfg.data
    if data.layout == "synthetic":
        dataset = synthetic_dataset(data.synthetic, data.synthetic_train)
    else:
        dataset = open_dataset(data.layout, str(data.path), data.query_camera)
    check_training(dataset)
    found = num_identities(dataset)
    if found < cfg.sampling.identities:
        raise ConfigError(
            f"config.sampling.identities={cfg.sampling.identities} exceeds the {found} "
            f"identities that {dataset.where} has to train on; use at most {found}"
        )
    test = np.concatenate([dataset.query, dataset.gallery])
    unseen = np.setdiff1d(dataset.cameras[test], dataset.cameras[dataset.train])
    if cfg.head.use_cameras and len(unseen):
        raise ConfigError(
            f"config.head.use_cameras: no training image of {dataset.where} is of "
            f"camera {', '.join(map(str, unseen))}, so their embeddings would stay "
            "untrained; leave it off"
        )
    return dataset
