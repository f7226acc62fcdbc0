"""Tar archives, plain or gzipped: a listing, and members read by their places.

A member's name is told and never used as a path; links are never followed.
"""

import contextlib
import gzip
import io
import os
import tarfile
import zlib

import numpy as np
from absl import logging
from jaxtyping import Int64

from personmae_jax.data.names import Names
from personmae_jax.errors import ConfigError, first_line
from personmae_jax.prepare.joined_file import DAMAGED, ArchiveReader, open_parts
from personmae_jax.prepare.listing import Listing, MemberError

GZIP_START = b"\x1f\x8b"
_MAX_HEADER = 2**26  # bytes that tarfile may read at once for a name


class _BoundedReads:
    """A file that refuses to read much at once, as a hostile tar header may ask."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self.tell, self.seek = file.tell, file.seek

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_HEADER:
            raise tarfile.ReadError("a header of absurd size")
        return self._file.read(count)


def is_tar_header(start: bytes) -> bool:
    """Whether a file that starts with these 512 bytes is a tar archive."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def list_tar(paths: tuple[str, ...]) -> Listing:
    """The regular files in a tar archive; a compressed one is read from end to end.

    Raises:
      ConfigError: It is damaged or cut short.
    """
    names, places, num_others, end = [], [], 0, -1
    try:
        with contextlib.ExitStack() as opened:
            stream = _plain_stream(opened.enter_context(open_parts(paths)))
            archive = opened.enter_context(
                tarfile.open(
                    fileobj=_BoundedReads(stream),  # type: ignore[arg-type]
                    mode="r:",
                    errors="surrogateescape",
                )
            )
            while (member := archive.next()) is not None:
                archive.members.clear()  # else all stay
                if (
                    member.offset <= end or member.size < 0
                ):  # a negative size would lead back for ever
                    raise tarfile.ReadError("a member of negative size")
                end = member.offset
                if member.isreg() and not member.issparse():
                    names.append(os.fsencode(member.name))
                    places.append((member.offset_data, member.size))
                elif not member.isdir():
                    num_others += 1
            stream.seek(archive.offset)
            if not stream.read(1):
                logging.warning("%s has no end: it may be cut short", paths[0])
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(
            f"{paths[0]} is a damaged tar archive ({first_line(error)}); {DAMAGED}"
        ) from error
    if num_others:
        logging.warning("%s: left out %d links or the like", paths[0], num_others)
    table = np.array(places, np.int64).reshape(len(places), 2)
    return Listing("tar", paths, Names.pack(names), table)


def _plain_stream(file: io.BufferedReader) -> io.BufferedIOBase:
    """The tar archive itself; seeking back in a compressed one starts it over."""
    is_compressed = file.read(2) == GZIP_START
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_compressed else file


class TarReader(ArchiveReader):
    """Reads members of one tar archive by their places."""

    def __init__(self, paths: tuple[str, ...]):
        super().__init__(paths)
        self._stream = _plain_stream(self._file)

    def read(
        self, name: bytes, place: Int64[np.ndarray, " columns"], limit: int
    ) -> bytes:
        """The member's content.

        Raises:
          MemberError: It is larger than `limit` bytes, or not there.
        """
        offset, size = place[:2].tolist()  # others are padding
        if size > limit:
            raise MemberError(f"more than {limit} bytes")
        try:
            self._stream.seek(offset)
            data = self._stream.read(size)
        except (EOFError, zlib.error) as error:
            raise MemberError("damaged in the tar archive") from error
        if len(data) != size:
            raise MemberError("cut off at the end of the tar archive")
        return data
