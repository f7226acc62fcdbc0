"""Where the files of a run live: a local folder or one on `gs://`."""

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import TypeVar

from etils import epath

from personmae_jax.errors import ConfigError

LocalPath = TypeVar("LocalPath", pathlib.Path, epath.Path)


def open_path(path: os.PathLike[str] | str) -> epath.Path:
    """The etils path of a workdir.

    Raises:
      ConfigError: Neither local nor `gs://`, or what `gs://` needs is not installed.
    """
    if not os.fspath(path):
        raise ConfigError("--workdir= names no folder; leave it out or name one")
    scheme, found, _ = os.fspath(path).partition("://")
    if not found:
        return epath.Path(path).expanduser().absolute()
    if scheme != "gs":
        raise ConfigError(
            f"--workdir={os.fspath(path)} is on {scheme}://; it may be a local path "
            "or gs://BUCKET/FOLDER"
        )
    # etils takes TensorFlow for gs:// where that is installed.
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise ConfigError(
            f"--workdir={os.fspath(path)} needs gcsfs; "
            "pip install -r requirements-gcs.txt"
        )
    import fsspec.config  # 0.1 s, so only when used

    # gcsfs would go on listing what it once saw, while tensorstore and other hosts
    # write beside it.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path)


def is_remote(path: epath.Path) -> bool:
    """Whether `path` is on object storage: no append, no rename, no flock."""
    return "://" in os.fspath(path)


def write_whole(file: epath.Path, text: str) -> None:
    """Writes so that a reader finds the old text or the new one, never a part."""
    if is_remote(file):
        file.write_text(text)  # objects appear whole
        return
    with appearing_whole(file) as part:
        part.write_text(text)


@contextlib.contextmanager
def appearing_whole(file: LocalPath) -> Iterator[LocalPath]:
    """What to write a local file under until it is whole; then it takes its place."""
    part = file.with_name(file.name + ".part")
    yield part
    part.replace(file)
