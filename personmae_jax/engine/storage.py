"""Where the files of a run live: a local folder or one on `gs://`."""

import contextlib
import errno
import importlib.util
import os
import pathlib
import stat
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar

from etils import epath

from personmae_jax import foreign_files
from personmae_jax.errors import ConfigError, RunError, first_line

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


def open_to_read(file: epath.Path) -> Any:
    """A file of a run, which anybody may have put there; OSError if it is no file."""
    return file.open("rb") if is_remote(file) else foreign_files.open_file(file)


def read_whole(file: epath.Path, limit: int) -> bytes:
    """The content of a file of a run, which anybody may have put there.

    Raises:
      OSError: It is no regular file, or larger than `limit` bytes.
    """
    if not is_remote(file):
        return foreign_files.read_file(file, limit)
    with file.open("rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", os.fspath(file))
    return data


def write_whole(file: epath.Path, content: str | bytes) -> None:
    """Writes so that a reader finds the old content or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(file):
        _write_object(file, data)
        return
    with appearing_whole(file) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def reporting_failure(what: str) -> Iterator[None]:
    """Turns a failure to write `what`, as of a full disk, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{what} cannot be written ({first_line(error)}); fix that and start again"
        ) from error


@contextlib.contextmanager
def appearing_whole(file: LocalPath, *, is_shared: bool = False) -> Iterator[LocalPath]:
    """What to write a local file under until it is whole; then it takes its place.

    Never the same name twice where `is_shared`: others may be writing the same file.
    """
    mark = f".{uuid.uuid4().hex}" if is_shared else ""
    part = file.with_name(f"{file.name}{mark}.part")
    part.unlink(missing_ok=True)  # a link would be followed
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)  # a full disk leaves a piece


@contextlib.contextmanager
def open_new(file: pathlib.Path) -> Iterator[BinaryIO]:
    """A local file to write, which takes its place when it is whole.

    Raises:
      RunError: It cannot be written.
    """
    try:
        with appearing_whole(file) as part, part.open("wb") as opened:
            yield opened
    except OSError as e:
        raise RunError(f"{file} could not be written ({first_line(e)})") from e


def _write_object(file: epath.Path, data: bytes) -> None:
    """Writes an object, which appears whole; raises OSError if it fails, as a disk."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except Exception as e:  # each storage has its own errors
        raise OSError(first_line(e)) from e


def copy_folder(local: pathlib.Path, target: epath.Path) -> None:
    """Copies all files below a local folder to a folder that may be on `gs://`."""
    for file in local.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(local).as_posix()
            _write_object(copy, file.read_bytes())


def open_in_place(file: os.PathLike[str], flags: int) -> int:
    """Descriptor of a local file that grows or is locked; made if it is not there.

    Raises:
      OSError: It is a link, which may point to anything, or no regular file.
    """
    flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise OSError(e.errno, "is a link; remove it", os.fspath(file)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is a pipe or a device", os.fspath(file))
    return descriptor
