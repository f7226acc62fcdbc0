"""Random-access sources of encoded images: a folder, a tfds data set, synthetic."""

import contextlib
import functools
import hashlib
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging

from personmae_jax import foreign_files
from personmae_jax.config import DataConfig, SyntheticConfig
from personmae_jax.config_check import PREPARE_DATA
from personmae_jax.data import tfds_files
from personmae_jax.data.names import Names, printable
from personmae_jax.errors import ConfigError, first_line
from personmae_jax.synthetic import pedestrian

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
    + (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
MAX_BYTES = 2**28  # of one image: 50 million pixels of 3 bytes, and room
_NAME_FEATURES = ("name", "filename", "image/filename")


@runtime_checkable
class Records(Protocol):
    """Encoded images by index; picklable, and read by many threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
          OSError: It cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """What a person finds the image by; never raises."""
        ...


def open_records(cfg: DataConfig) -> Records:
    """Opens what `cfg.source` and `cfg.path` name; `cfg.path` is set if needed.

    Raises:
      ConfigError: There are no images to read there.
    """
    if cfg.source == "synthetic":
        return SyntheticRecords(cfg.synthetic)
    if cfg.path is None or not os.path.isdir(cfg.path):
        what = "is not a folder" if os.path.exists(cfg.path or "") else "does not exist"
        raise ConfigError(
            f"config.data.path={cfg.path!r} {what}; set --config.data.path to "
            f"a local or mounted data set (made with `{PREPARE_DATA}`), or train on "
            "synthetic pedestrians with --config=configs/quickstart.py"
        )
    if cfg.source == "folder":
        if os.path.exists(os.path.join(cfg.path, "dataset_info.json")):
            raise ConfigError(
                f"config.data.path={cfg.path!r} is a tfds data set, not a folder of "
                "images; set --config.data.source=tfds"
            )
        return folder_records(cfg.path)
    return TfdsRecords(cfg.path, cfg.split)


# Rendering takes as long as a small network's share of a step: of the sets that are
# trained on for many epochs every image is rendered once. Some 6 KB each.
_encode = functools.lru_cache(maxsize=2**14)(pedestrian.encode_pedestrian)


class SyntheticRecords:
    """Synthetic pedestrians: every identity in every camera in several shots."""

    def __init__(self, cfg: SyntheticConfig):
        self._cfg = cfg

    def __len__(self) -> int:
        return self._cfg.identities * self._cfg.cameras * self._cfg.shots

    def read(self, index: int) -> bytes:
        return _encode(self._cfg.seed, *self._place(index))

    def name(self, index: int) -> str:
        identity, camera, shot = self._place(index)
        return f"identity {identity} camera {camera} shot {shot}"

    def _place(self, index: int) -> tuple[int, int, int]:
        rest, shot = divmod(index, self._cfg.shots)
        identity, camera = divmod(rest, self._cfg.cameras)
        return self._cfg.first_identity + identity, camera, shot


class ListedRecords:
    """The images of a list of paths under one folder."""

    def __init__(self, root: str, names: Names | Sequence[bytes]):
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        path = os.path.join(os.fsencode(self._root), self._names[index])
        return foreign_files.read_file(path, MAX_BYTES)

    def name(self, index: int) -> str:
        return printable(self._names[index])

    @property
    def sha256(self) -> str:
        """Of all names: what tells these images from others of the same number."""
        names, digest = self._names, hashlib.sha256()
        (names if isinstance(names, Names) else Names.pack(names)).feed(digest)
        return digest.hexdigest()


def folder_records(root: str) -> ListedRecords:
    """Every image file under a folder; see `list_images`.

    Raises:
      ConfigError: It holds no image, or a folder in it cannot be listed.
    """
    names, num_others = list_images(root)
    if not len(names):
        raise ConfigError(
            f"config.data.path={root!r} holds no image "
            f"({num_others} files with other suffixes); a folder source needs "
            f"files named {', '.join(sorted(IMAGE_SUFFIXES))}, or without a suffix"
        )
    return ListedRecords(root, names)


def list_images(root: str) -> tuple[Names, int]:
    """Relative paths of images, and the number of other files, which a warning tells.

    Files with an image's suffix or none are listed: whether one without is an image
    shows when it is decoded. Sorted by bytes, so that the order is the same on every
    machine.

    Raises:
      ConfigError: A folder cannot be listed.
    """
    names, num_others, other = [], 0, b""
    for name in _files_under(root):
        suffix = os.path.splitext(name)[1].lower()
        if not suffix or os.fsdecode(suffix) in IMAGE_SUFFIXES:
            names.append(name)
        else:
            num_others, other = num_others + 1, name
    if num_others:
        logging.warning(
            "%s: left out %d files beside %d images, for a suffix that is no image's, "
            "e.g. %s",
            *(root, num_others, len(names), printable(other)),
        )
    return Names.pack(sorted(names)), num_others


def _files_under(root: str) -> Iterator[bytes]:
    """Yields relative paths; hidden files and folders, pipes and devices are left out.

    Links are followed, each folder is listed once. A dangling link is a file, and
    counted as bad when it is read.
    """
    folders, seen = [b""], set()
    while folders:
        folder = folders.pop()
        path = os.path.join(os.fsencode(root), folder)
        subfolders = []
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link to a folder already listed, or to one above
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    name = os.path.join(folder, entry.name)
                    is_link = entry.is_symlink()
                    # os.path, since a link to itself is no error there.
                    if os.path.isdir(entry) if is_link else entry.is_dir():
                        subfolders.append(name)
                    elif is_link or entry.is_file():
                        yield name
        except OSError as error:
            raise ConfigError(
                f"{os.fsdecode(path)!r} cannot be listed "
                f"({error.strerror}); make it readable or leave it out"
            ) from error
        # In order, so that of two links to one folder always the same one counts.
        folders.extend(sorted(subfolders, reverse=True))


def _allow_open_files(count: int = 2**14) -> None:
    """Every shard stays open, and worker processes inherit the limit, often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # few shards do without
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class TfdsRecords:
    """The `image` feature of a tfds data set, still encoded; no TensorFlow."""

    def __init__(self, path: str, split: str):
        """Opens the data set.

        Args:
          path: The folder that holds `dataset_info.json`.
          split: A split's name, or tfds's slice of one (`train[:10%]`).

        Raises:
          ConfigError: It is no such data set, or has no such split or no images.
        """
        import tensorflow_datasets as tfds  # 1 s, so only when used

        self._path, self._split = path, split
        _allow_open_files()
        where = f"config.data.path={path!r}"
        try:
            tfds_files.check_files(path)
            builder: Any = tfds.builder_from_directory(path)
            features = builder.info.features
        except Exception as error:
            raise ConfigError(
                f"{where} is not a tfds data set ({first_line(error)}); make one "
                f"with `{PREPARE_DATA}`, or read plain files with "
                "--config.data.source=folder"
            ) from error
        is_dict = isinstance(features, tfds.features.FeaturesDict)
        features = dict(features.items()) if is_dict else {}
        if not isinstance(features.get("image"), tfds.features.Image):
            raise ConfigError(
                f"{where} has no image feature named `image` (it has "
                f"{', '.join(features) or 'none'}); make a data set that has one "
                f"with `{PREPARE_DATA}`"
            )
        encoded = {"image": tfds.decode.SkipDecoding()}
        try:
            self._examples = builder.as_data_source(split, decoders=encoded)
            if not len(self._examples):
                raise ValueError("it is empty")
            tfds_files.check_shards(builder.info.splits[split].file_instructions)
        except Exception as error:
            raise ConfigError(
                f"config.data.split={split!r} of {where} cannot be opened "
                f"({first_line(error)}); its splits are "
                f"{', '.join(builder.info.splits) or 'none'}, and it must be stored "
                "as ArrayRecord"
            ) from error
        texts = [n for n, f in features.items() if isinstance(f, tfds.features.Text)]
        self._name_feature = next((n for n in _NAME_FEATURES if n in texts), None)

    @property
    def sha256(self) -> str:
        """Of the data set's description, which has the sizes of all shards."""
        info = os.path.join(self._path, "dataset_info.json")
        return hashlib.sha256(foreign_files.read_file(info, 1 << 26)).hexdigest()

    def __reduce__(self):
        return TfdsRecords, (self._path, self._split)

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, index: int) -> bytes:
        try:
            return self._examples[index]["image"]
        except Exception as error:  # array_record and protobuf have no common one
            place = f"{self._split}[{index}]"
            raise OSError(f"{place}: {first_line(error)}") from error

    def name(self, index: int) -> str:
        place = f"{self._split}[{index}]"
        if self._name_feature is None:
            return place
        try:
            return self._examples[index][self._name_feature].decode() or place
        except Exception:
            return place
