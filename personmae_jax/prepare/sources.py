"""What lies at a path, told by its content: a folder, zip, tar or LMDB of images."""

import functools
import os
import re
from collections.abc import Callable, Sequence

from absl import logging

from personmae_jax import foreign_files
from personmae_jax.data.records import IMAGE_SUFFIXES, list_images
from personmae_jax.errors import ConfigError
from personmae_jax.prepare import lmdb_source, tar_source, zip_source
from personmae_jax.prepare.joined_file import open_parts
from personmae_jax.prepare.listing import Listing, Place, no_places

# Of a file cut by 7-Zip (.001) or `split` (.aa, .00, .partaa, tar_aa, zip-part-AA).
_PART = re.compile(
    r"(.+\.(?:part)?|.+\.(?:tar|tgz|gz|zip)[_-]?(?:part[_-]?)?)"
    r"(\d{2,3}|[a-z]{2,4}|[A-Z]{2,4})",
    re.DOTALL,
)
_ARCHIVE_SUFFIXES = (
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst"),
    *(".rar", ".7z", ".mdb"),
)


# (name, place, limit) -> the bytes of one member; raises MemberError or OSError where
# it is not there, damaged, or larger than `limit` bytes, while others may be read.
Reader = Callable[[bytes, Place, int], bytes]


def list_sources(paths: Sequence[str]) -> list[Listing]:
    """Lists what lies at each path, in the order given.

    Raises:
      ConfigError: Nothing is there, or nothing that is known, or it is damaged.
    """
    listings = []
    for kind, files in find_sources(paths):
        listing = _KINDS[kind][0](files)
        if not len(listing.names):
            raise ConfigError(f"--source={files[0]} holds no images; leave it out")
        listings.append(listing)
    return listings


def find_sources(paths: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, files) of what lies at each path, none opened further than its start.

    Raises:
      ConfigError: Nothing is there, or nothing that is known.
    """
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise ConfigError(f"--source={path}: there is nothing; check the path")
        try:
            sources = _inside(path) if os.path.isdir(path) else [_kind_of(path)]
        except OSError as error:
            raise ConfigError(
                f"--source={error.filename or path} cannot be read: {error.strerror}"
            ) from error
        if None in sources:
            raise ConfigError(
                f"--source={path} is neither a folder, a zip or tar[.gz] archive nor "
                "an LMDB; unpack it, or name the folder of its images"
            )
        # Each part of a split archive names the whole of it.
        found += [source for source in sources if source not in found]
    return found


def _inside(folder: str) -> list[tuple[str, tuple[str, ...]]]:
    """The folder of a database, of images, or else of archives and databases."""
    if lmdb_source.is_lmdb(folder):
        return [("lmdb", (folder,))]
    if _holds_image(folder):
        return [("folder", (folder,))]
    sources, others = [], []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        is_source = os.path.isfile(path) or lmdb_source.is_lmdb(path)
        kind = _kind_of(path) if is_source else None
        if kind is None:
            others.append(name)
        elif kind not in sources:
            sources.append(kind)
    shown = [name for name in others if not name.startswith(".")]  # no ._a.zip of macOS
    if archives := [n for n in shown if n.lower().endswith(_ARCHIVE_SUFFIXES)]:
        raise ConfigError(
            f"--source={os.path.join(folder, archives[0])} is no zip or tar[.gz] "
            "archive that can be read: it is damaged or of another kind; copy it "
            "again, unpack it, or take it out of the folder"
        )
    if sources and others:
        logging.warning(
            "%s: left out %d files and folders beside %d archives, e.g. %s",
            *(folder, len(others), len(sources), others[0]),
        )
    return sources or [("folder", (folder,))]  # maybe its images have no suffix


def _holds_image(folder: str) -> bool:
    """Whether some file in or under it is named as an image."""
    for _, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [f for f in folders if not f.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        if any(os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES for n in shown):
            return True
    return False


def _kind_of(path: str) -> tuple[str, tuple[str, ...]] | None:
    """What a file or database is by its first bytes, and all files it consists of."""
    if lmdb_source.is_lmdb(path):
        return "lmdb", (path,)
    parts = _parts_of(path)
    with open_parts(parts) as file:
        start = file.read(512)
    if start.startswith(zip_source.ZIP_STARTS):
        return "zip", parts
    if start.startswith(tar_source.GZIP_START) or tar_source.is_tar_header(start):
        return "tar", parts
    return None


def _parts_of(path: str) -> tuple[str, ...]:
    match = _PART.fullmatch(path)
    if not match:
        return (path,)
    start, suffix = match.groups()
    folder, base = os.path.split(start)
    first = ("a" if suffix.islower() else "A") * len(suffix)
    if suffix.isalpha() and not os.path.exists(start + first):
        return (path,)  # .zip, .tar, ...: an ending that is no number
    found, kind = {}, (suffix.isdigit(), suffix.islower())
    for name in os.listdir(folder or "."):
        part = _PART.fullmatch(name)
        if part and part[1] == base and len(part[2]) == len(suffix):
            if (part[2].isdigit(), part[2].islower()) == kind:
                found[_part_number(part[2])] = name
    numbers = sorted(found)
    if numbers[0] > 1 or numbers != [*range(numbers[0], numbers[-1] + 1)]:
        shown = ", ".join(f".{found[n].removeprefix(base)}" for n in numbers)
        raise ConfigError(
            f"--source={path}: parts {shown} are there; all are needed, without a "
            "gap, from the first on"
        )
    return tuple(os.path.join(folder, found[number]) for number in numbers)


def _part_number(suffix: str) -> int:
    """7 of "007", 27 of "bb"; .zip and the like are far from every other part."""
    if suffix.isdigit():
        return int(suffix)
    return functools.reduce(
        lambda n, letter: 26 * n + ord(letter) - 97, suffix.lower(), 0
    )


def _list_folder(paths: tuple[str, ...]) -> Listing:
    names, _ = list_images(paths[0])
    return Listing("folder", paths, names, no_places(len(names)))


def _read_file(root: str, name: bytes, place: Place, limit: int) -> bytes:
    return foreign_files.read_file(os.path.join(os.fsencode(root), name), limit)


# What lists one, what opens one, and what reads a member of what was opened.
_KINDS: dict[str, tuple[Callable, Callable, Callable[..., bytes]]] = {
    "folder": (_list_folder, lambda paths: paths[0], _read_file),
    "zip": (zip_source.list_zip, open_parts, zip_source.read_zip),
    "tar": (tar_source.list_tar, tar_source.open_tar, tar_source.read_tar),
    "lmdb": (lmdb_source.list_lmdb, lmdb_source.open_lmdb, lmdb_source.read_lmdb),
}


@functools.cache
def open_reader(kind: str, paths: tuple[str, ...]) -> Reader:
    """Opens a source once for this process; one thread at a time may read.

    Raises:
      OSError: It is no longer there.
      ConfigError: The same, of an LMDB.
    """
    _, opening, reading = _KINDS[kind]
    return functools.partial(reading, opening(paths))
