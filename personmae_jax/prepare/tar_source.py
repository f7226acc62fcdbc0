"""Tar archives, plain or gzipped: a listing, and members read by their places.

A member's name is told and never used as a path; links are never followed.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from personmae_jax.data.names import Names
from personmae_jax.errors import ConfigError, first_line
from personmae_jax.prepare.joined_file import DAMAGED, open_parts
from personmae_jax.prepare.listing import Listing, MemberError, Place

GZIP_START = b"\x1f\x8b"
# Bytes that tarfile may read at once for a name, and its attributes; the time that
# older Pythons take for them grows with their square (CVE-2024-6232).
_MAX_HEADER = 2**14
_MAX_NAME = 4096  # bytes; no file system's path is longer


class _BoundedReads:
    """A file that refuses to read much at once, as a hostile tar header may ask."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.tell, self.seek = file.tell, file.seek
        self.last = b""  # what was read last: at the end, where a header should be

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER:
            raise tarfile.ReadError("a header of absurd size")
        self.last = self._file.read(count)
        return self.last


def is_tar_header(start: bytes) -> bool:
    """Whether a file that starts with these 512 bytes is a tar archive."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def list_tar(paths: tuple[str, ...]) -> Listing:
    """The regular files in a tar archive, or in several that lie end to end.

    All is accounted for: the stream is read to its end, where gzip keeps its checksum.

    Raises:
      ConfigError: It is damaged or cut short.
    """
    names, places, num_others = [], [], 0
    try:
        with open_tar(paths) as stream:
            for member in _walk(stream, paths[0]):
                if member.isreg() and not member.issparse():
                    name = os.fsencode(member.name)
                    if len(name) > _MAX_NAME:  # a thousand times more than packed
                        raise tarfile.ReadError("a name of absurd length")
                    names.append(name)
                    places.append((member.offset_data, member.size))
                elif not member.isdir():
                    num_others += 1
        table = np.array(places, np.int64).reshape(len(places), 2)
    except Exception as error:  # of tarfile, gzip, zlib, and of hostile numbers
        raise ConfigError(
            f"{paths[0]} is a damaged tar archive ({first_line(error)}); {DAMAGED}, or "
            "if it is the first part of several, name them NAME.tar.001, .002, ..."
        ) from error
    if num_others:
        logging.warning("%s: left out %d links or the like", paths[0], num_others)
    return Listing("tar", paths, Names.pack(names), table)


def _walk(stream: io.BufferedIOBase, path: str) -> Iterator[tarfile.TarInfo]:
    """Every member of the archives in `stream`, which is then at its end."""
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        reads: Any = _BoundedReads(stream)
        tar: Any = tarfile.open(fileobj=reads, mode="r:", errors="surrogateescape")
        with tar:
            end = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # else all stay
                # A negative size would lead back for ever.
                if member.offset <= end or member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                end = member.offset
                yield member
        # tarfile takes whatever is no header for the archive's end.
        if reads.last.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged")
        if not reads.last:
            logging.warning("%s has no end: it may be cut short", path)
        start = _skip_zeros(stream)


def _skip_zeros(stream: io.BufferedIOBase) -> int | None:
    """Where the next archive begins, in blocks of 512 bytes; None at the end."""
    place = stream.tell()
    while block := stream.read(1 << 16):
        rest = block.lstrip(b"\0")
        if rest:
            return place + (len(block) - len(rest)) // 512 * 512
        place += len(block)
    return None


def open_tar(paths: tuple[str, ...]) -> io.BufferedIOBase:
    """The tar archive itself; seeking back in a compressed one starts it over."""
    file = open_parts(paths)
    is_compressed = file.read(2) == GZIP_START
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_compressed else file


def read_tar(stream: io.BufferedIOBase, name: bytes, place: Place, limit: int) -> bytes:
    """One member, as a `sources.Reader`."""
    offset, size = place[:2].tolist()  # others are padding
    if size > limit:
        raise MemberError(f"more than {limit} bytes")
    try:
        stream.seek(offset)
        data = stream.read(size)
    except (EOFError, zlib.error) as error:
        raise MemberError("damaged in the tar archive") from error
    if len(data) != size:
        raise MemberError("cut off at the end of the tar archive")
    return data
