"""Zip archives: a listing from the central directory, members read by their places.

Written for millions of members: `zipfile` would keep an object of half a kilobyte for
each. A member's name is told and never used as a path.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from absl import logging
from jaxtyping import Int64

from personmae_jax.data.names import Names
from personmae_jax.errors import ConfigError
from personmae_jax.prepare.joined_file import DAMAGED, open_parts
from personmae_jax.prepare.listing import Listing, MemberError, Place

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # PK78: a split archive

# APPNOTE.TXT 6.3.10, sections 4.3.7 (local), 4.3.12 (central), 4.3.14 to 4.3.16 (end).
_LOCAL = struct.Struct("<4s22xHH")
_CENTRAL = struct.Struct("<4s4xHH4xIIIHHHHxxII")
_END = struct.Struct("<4sHHHHIIH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _FOLDER = -1, -2  # in place of a method
_DESCRIPTOR = 24  # bytes at most behind a member, with its sizes
_WRAP = 2**32


def list_zip(paths: tuple[str, ...]) -> Listing:
    """The members of a zip archive, from its central directory.

    Raises:
      ConfigError: It is damaged, or a part of a spanned archive.
    """
    names, places = [], []
    try:
        with open_parts(paths) as file:
            found = _find_directory(file, paths[0])
            for name, place in _read_directory(file, found):
                names.append(name)
                places.append(place)
            table = np.array(places, np.int64).reshape(len(places), 5)
            _account(file, paths[0], found, table, [*map(len, names)])
    except (struct.error, OSError, OverflowError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{paths[0]} is a damaged zip archive; {DAMAGED}") from error
    is_file = table[:, 4] != _FOLDER
    kept = Names.pack(name for name, keep in zip(names, is_file, strict=True) if keep)
    return Listing("zip", paths, kept, table[is_file])


def _account(
    file: io.BufferedIOBase,
    path: str,
    found: tuple[int, int, int, int, int],
    table: Int64[np.ndarray, "n 5"],
    lengths: list[int],
) -> None:
    """Tells of bytes that no entry names; raises ConfigError where images would go."""
    order = np.argsort(table[:, 0])
    starts = np.append(table[order, 0], found[2])  # the directory follows the last
    ends = starts[:-1] + table[order, 1] + _LOCAL.size
    if (ends > starts[1:]).any():
        raise ConfigError(
            f"{path} is no honest zip archive: members lie over one another; {DAMAGED}"
        )
    if starts[0] > 4:  # the mark of an archive that was once split
        raise ConfigError(
            f"{path}: its first {starts[0]} bytes are in no directory; if archives lie "
            "end to end there, give each as a file of its own"
        )
    rest = starts[1:] - ends - np.array(lengths, np.int64)[order]
    unnamed = found[4]
    for number in np.flatnonzero(rest > _DESCRIPTOR):
        file.seek(starts[number])
        header = file.read(_LOCAL.size)
        extra = _LOCAL.unpack(header)[2] if len(header) == _LOCAL.size else 0
        gap = int(rest[number]) - extra
        unnamed += gap if gap > _DESCRIPTOR else 0
    if unnamed:
        logging.warning(
            "%s: %d bytes are no member's: removed ones, or what follows the archive",
            *(path, unnamed),
        )


def _read_directory(
    file: io.BufferedIOBase, found: tuple[int, int, int, int, int]
) -> Iterator[tuple[bytes, tuple]]:
    """Yields (name, (offset, stored size, size, checksum, method)) of every entry."""
    count, size, start, shift, _ = found
    file.seek(start)
    directory = file.read(size)
    at = num_entries = last = 0
    # Some writers know no zip64: the number of members has wrapped at 2**16, and
    # above 4 GiB places have at 2**32.
    is_wrapped = shift > 0 and shift % _WRAP == 0
    shift = 0 if is_wrapped else shift
    while at < size:
        fields = _CENTRAL.unpack_from(directory, at)
        magic, flags, method, checksum, stored, full, *lengths, attributes, offset = (
            fields
        )
        if magic != b"PK\x01\x02":
            raise ValueError("no entry where one should be")
        name_length, extra_length, comment_length, _disk = lengths
        at += _CENTRAL.size
        name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        num_entries += 1
        if is_wrapped:
            offset += (
                (last - offset + _WRAP - 1) // _WRAP * _WRAP if offset < last else 0
            )
            last = offset
        elif 0xFFFFFFFF in (stored, full, offset):
            full, stored, offset = _read_zip64(extra, full, stored, offset)
        if name.endswith(b"/") or (attributes & 0x10 and not full):
            method = _FOLDER
        elif flags & 1:
            method = _ENCRYPTED
        yield name, (offset + shift, stored, full, checksum, method)
    if num_entries != count and (count >= 2**16 or num_entries % 2**16 != count):
        raise ValueError("another number of entries")


def _find_directory(
    file: io.BufferedIOBase, path: str
) -> tuple[int, int, int, int, int]:
    """(entries, bytes, offset of the directory, bytes before the archive, after it)."""
    total = file.seek(0, io.SEEK_END)
    tail_start = max(0, total - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    before = end
    while before > 0:  # the last may stand in a comment, which ends with the file
        before = tail.rfind(b"PK\x05\x06", 0, before)
        length = tail[before + 20 : before + 22] if before >= 0 else b""
        if before >= 0 and before + 22 + int.from_bytes(length, "little") == len(tail):
            end = before
    if end < 0:
        raise ConfigError(
            f"{path} is a zip archive without its end: a part of a split one (give "
            "the parts NAME.zip.001, .002, ... together; join NAME.z01 and NAME.zip "
            f"with `zip -s 0 NAME.zip --out whole.zip`), or cut short: {DAMAGED}"
        )
    _, disk, _, _, count, size, offset, comment = _END.unpack_from(tail, end)
    position = tail_start + end
    if disk not in (0, 0xFFFF):
        raise ConfigError(
            f"{path} is one part of a spanned zip archive; join its parts first with "
            f"`zip -s 0 {os.path.basename(path)} --out whole.zip`"
        )
    locator = end - _END64_LOCATOR.size
    if locator >= 0 and tail[locator:].startswith(b"PK\x06\x07"):
        at = _END64_LOCATOR.unpack_from(tail, locator)[2]
        file.seek(at)
        fields = _END64.unpack(file.read(_END64.size))
        if fields[0] != b"PK\x06\x06":
            raise ValueError("no zip64 end where one should be")
        count, size, offset = fields[7:]
        position = at
    shift = position - size - offset  # of archives with something before them
    if shift < 0 or size > total or count * _CENTRAL.size > size:
        raise ValueError("a directory of absurd size")
    after = max(0, len(tail) - end - _END.size - comment)
    return count, size, offset + shift, shift, after


def _read_zip64(extra: bytes, *short: int) -> Iterator[int]:
    """The 64-bit values of those that did not fit into 32, the others as they are."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            at += 4
            for value in short:
                if value == 0xFFFFFFFF:
                    (value,) = struct.unpack_from("<Q", extra, at)
                    at += 8
                    if value >= 2**62:
                        raise ValueError("no such size")
                yield value
            return
        at += 4 + length
    yield from short


def read_zip(file: io.BufferedIOBase, name: bytes, place: Place, limit: int) -> bytes:
    """One member, as a `sources.Reader`."""
    offset, stored, size, checksum, method = place.tolist()
    if max(size, stored) > limit:
        raise MemberError(f"more than {limit} bytes")
    if method == _ENCRYPTED:
        raise MemberError("encrypted")
    if method not in (_STORED, _DEFLATED):
        raise MemberError(f"compressed with zip method {method}, not deflate")
    file.seek(offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise MemberError("not where the zip archive's directory says")
    _, name_length, extra_length = _LOCAL.unpack(header)
    file.seek(name_length + extra_length, io.SEEK_CUR)
    data = file.read(stored)
    if method == _DEFLATED:
        try:
            # However much it would inflate to, one byte over its size is enough.
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            raise MemberError("damaged in the zip archive") from error
    if len(data) != size or zlib.crc32(data) != checksum:
        raise MemberError("damaged in the zip archive")
    return data
