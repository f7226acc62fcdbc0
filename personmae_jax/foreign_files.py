"""Reads files that somebody else made: regular files only, never more than a limit.

A named pipe would block for ever, a device never end, a huge file fill the memory.
Every image, list, JSON file and archive is opened here. What is wrong is an `OSError`
whose `strerror` ends a sentence: "{path} cannot be read: {error.strerror}".
"""

import codecs
import collections
import errno
import io
import json
import os
import stat
from typing import Any

Path = str | bytes | os.PathLike[str]

MAX_TEXT = 2**28  # bytes of a list or JSON file: 4 million names have 0.1 GB

_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_descriptor(path: Path) -> tuple[int, int]:
    """(descriptor, size in bytes) of a regular file; the caller closes it.

    Raises:
      OSError: There is none, it may not be read, or it is something else.
    """
    # Non-blocking, else opening a pipe waits for somebody who writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        what = "is a folder" if is_folder else "is a pipe or a device, not a file"
        raise OSError(errno.EINVAL, what, os.fsdecode(path))
    return descriptor, status.st_size


def open_file(path: Path) -> io.FileIO:
    """A regular file, unbuffered, for reading; errors as of `open_descriptor`."""
    return io.FileIO(open_descriptor(path)[0], "rb")


def read_file(path: Path, limit: int) -> bytes:
    """The whole content.

    Raises:
      OSError: As of `open_descriptor`, or it is larger than `limit` bytes.
    """
    # Of the system itself: `open` calls it twice as often, and at every call threads
    # wait for each other.
    descriptor, size = open_descriptor(path)
    try:
        if size > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes", os.fsdecode(path))
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[bytes]:
    """The lines of a list without blanks around them; empty ones are left out.

    A byte order mark is no part of a line, also not where lists were joined, and
    UTF-16, which Windows writes, becomes UTF-8.

    Raises:
      OSError: As of `read_file`; or it is no such text.
    """
    data = read_file(path, MAX_TEXT)
    if data.startswith(_UTF16_BOMS):
        data = data.decode("utf-16", "replace").encode("utf-8", "replace")
    if b"\0" in data:
        raise OSError(errno.EINVAL, "it holds NUL bytes; save it as UTF-8")
    lines = data.replace(codecs.BOM_UTF8, b"").splitlines()
    return [line for text in lines if (line := text.strip())]


def read_json(path: Path, limit: int = MAX_TEXT) -> Any:
    """The content of a JSON file; raises as `read_file` and `parse_json`."""
    return parse_json(read_file(path, limit))


def parse_json(data: bytes) -> Any:
    """What JSON says.

    Raises:
      ValueError: It is no JSON, nested too deeply, or gives a name twice, of which
        readers take whichever they like.
    """
    try:
        return json.loads(data, object_pairs_hook=_no_name_twice)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {twice[:100]!r} more than once")
    return found
