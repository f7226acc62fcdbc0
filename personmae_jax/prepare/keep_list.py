"""A subset of the members, in the order of a list of names, best first."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable

import numpy as np
from absl import logging
from jaxtyping import Int64

from personmae_jax import foreign_files
from personmae_jax.data.names import Names, printable
from personmae_jax.data.records import IMAGE_SUFFIXES
from personmae_jax.errors import ConfigError
from personmae_jax.prepare.listing import Listing
from personmae_jax.prepare.lmdb_source import load_pickle, to_names

_PICKLE_STARTS = (b"\x80", b"(l", b"]")  # protocols 2 and up, 0, 1


def read_keep_list(path: str) -> Names:
    """The names in a text file, one a line, or in a pickled list (CFS_list.pkl).

    Raises:
      ConfigError: It is neither, holds no name, or something that no list holds.
    """
    try:
        with foreign_files.open_file(path) as file:
            is_pickle = file.read(2).startswith(_PICKLE_STARTS)
        names = Names.pack(() if is_pickle else foreign_files.read_lines(path))
    except OSError as error:
        raise ConfigError(f"--keep-list={path}: {error.strerror}") from error
    if is_pickle:
        names = to_names(load_pickle(path), f"--keep-list={path}")
    if not len(names):
        raise ConfigError(f"--keep-list={path} holds no name")
    return names


def count_kept(keep_first: str | None, num_names: int) -> int:
    """How many names of the list `--keep-first` asks for.

    Raises:
      ConfigError: It is neither a number of names nor a fraction.
    """
    if keep_first is None:
        return num_names
    count = 0
    with contextlib.suppress(ValueError):
        share = float(keep_first)
        if keep_first.isdecimal():
            count = int(keep_first)
        elif 0 < share <= 1:
            count = math.floor(share * num_names)
    if not 0 < count <= num_names:
        raise ConfigError(
            f"--keep-first={keep_first} must be a number of names, 1 .. {num_names}, "
            "or a fraction of them with a point, 0.5 or 1.0"
        )
    return count


def select(
    listings: list[Listing], wanted: Names, num_wanted: int
) -> Int64[np.ndarray, " kept"]:
    """Where the first names of the list are among all members.

    A name is found as it is, or else by its last part without suffix: lists name
    images now with, now without folder and `.jpg`. Where several members have that
    last part, none is taken.

    Returns:
      Numbers of members, in the order of the list, none twice.

    Raises:
      ConfigError: No name is found.
    """
    names = list(itertools.islice(wanted, num_wanted))
    kept = _find(listings, names, bytes, is_first_enough=True)
    lost = np.flatnonzero(kept < 0)
    if len(lost):
        rest = [names[number] for number in lost]
        kept[lost] = _find(listings, rest, _stem, is_first_enough=False)
    missing = [names[number] for number in np.flatnonzero(kept < 0)]
    if len(missing) == num_wanted:
        raise ConfigError(
            f"none of the {num_wanted} names of --keep-list is in --source: they look "
            f"like {printable(wanted[0])!r}, the images' like "
            f"{printable(listings[0].names[0])!r}; is it another data set's list?"
        )
    if missing:
        logging.warning(
            "%d of the %d names of --keep-list are not in --source, e.g. %s",
            *(len(missing), num_wanted, printable(missing[0])),
        )
    kept = kept[kept >= 0]
    _, first = np.unique(kept, return_index=True)
    return kept[np.sort(first)]


def _stem(name: bytes) -> bytes:
    last = name.rpartition(b"/")[2]
    root, dot, suffix = last.rpartition(b".")
    is_image = dot and os.fsdecode(dot + suffix.lower()) in IMAGE_SUFFIXES
    return root if is_image else last


def _find(
    listings: list[Listing],
    wanted: list[bytes],
    key: Callable[[bytes], bytes],
    is_first_enough: bool,
) -> Int64[np.ndarray, " wanted"]:
    """The first member with the key of each wanted name; -1 for none or doubt.

    By Python's 64-bit hashes, salted anew in every process: a dict of 4 million names
    would take 0.6 GB.
    """
    members = itertools.chain.from_iterable(listing.names for listing in listings)
    there = np.fromiter((hash(key(name)) for name in members), np.int64)
    order = np.argsort(there, kind="stable")
    there = there[order]
    sought = np.fromiter((hash(key(name)) for name in wanted), np.int64, len(wanted))
    first = np.searchsorted(there, sought)
    num_equal = np.searchsorted(there, sought, side="right") - first
    is_found = num_equal > 0 if is_first_enough else num_equal == 1
    return np.where(is_found, order[np.minimum(first, len(order) - 1)], -1)
