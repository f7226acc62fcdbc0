"""LUPerson's LMDB: keys are names, values files; `keys.pkl` beside it lists them."""

import io
import itertools
import os
import re
from typing import Any

import lmdb
import numpy as np
from absl import logging

from personmae_jax import foreign_files
from personmae_jax.data import safe_pickle
from personmae_jax.data.names import Names
from personmae_jax.errors import ConfigError, first_line
from personmae_jax.prepare.listing import Listing, MemberError, Place, no_places

DATA_FILE = "data.mdb"
_KEYS_FILE = "keys.pkl"
_MAX_PICKLE = 2**31  # bytes; a list of 4 million names has 0.1 to 0.3 GB
_MAX_NAME = 4096  # bytes; more than a path or a key of LMDB can have
_MIN_ENTRY = 8  # bytes; the head that LMDB puts before each key
_MAGIC = b"\xde\xc0\xef\xbe"  # 0xBEEFC0DE after the page header, in lmdb's mdb.c


def is_lmdb(path: str) -> bool:
    """Whether `path` is an LMDB file, or the folder of one."""
    file = _data_file(path)
    if not os.path.isfile(file):
        return False
    with open(file, "rb") as opened:
        return opened.read(20)[16:] == _MAGIC


def _data_file(path: str) -> str:
    return os.path.join(path, DATA_FILE) if os.path.isdir(path) else path


def list_lmdb(paths: tuple[str]) -> Listing:
    """The names in `keys.pkl`, beside the database or one folder up, else all keys.

    Raises:
      ConfigError: The database or `keys.pkl` cannot be read.
    """
    (path,) = paths
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        file = os.path.join(place, _KEYS_FILE)
        if os.path.lexists(file):
            names, identities, videos = _read_keys(file)
            with _open(path) as database:
                entries = database.stat()["entries"]
            if len(names) < entries:
                logging.warning(
                    "%s lists %d of the %d keys of %s; the others are left out",
                    *(file, len(names), entries, path),
                )
            break
    else:
        logging.warning("%s: there is no %s; all keys are taken", path, _KEYS_FILE)
        names, identities, videos = _walk(path), None, None
    return Listing("lmdb", paths, names, no_places(len(names)), identities, videos)


def _open(path: str) -> Any:
    try:
        database = lmdb.open(
            path,
            subdir=os.path.isdir(path),
            readonly=True,
            lock=False,
            readahead=False,  # members are read by many processes, maybe in any order
            create=False,
        )
        needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    except lmdb.Error as error:
        raise ConfigError(
            f"{path} is no readable LMDB ({first_line(error)}); copy it again"
        ) from error
    file = _data_file(path)
    if os.path.getsize(file) < needed:  # reading past its end would kill the process
        database.close()
        raise ConfigError(
            f"{path} is cut short: {os.path.getsize(file)} of {needed} bytes are "
            "there; copy it again"
        )
    return database


def _walk(path: str) -> Names:
    try:
        with _open(path) as database, database.begin() as transaction:
            entries = transaction.stat()["entries"]
            if entries > os.path.getsize(_data_file(path)) // _MIN_ENTRY:
                raise lmdb.Error(f"{entries} keys cannot be in so small a file")
            # A damaged page may end the walk early, or lead to others' keys, or back.
            keys = transaction.cursor().iternext(values=False)
            names = Names.pack(itertools.islice(keys, entries + 1))
            if len(names) != entries:
                raise lmdb.Error(f"{len(names)} of {entries} keys are found")
            return names
    except lmdb.Error as error:
        raise ConfigError(
            f"{path} is a damaged LMDB ({first_line(error)}); copy it again, or put a "
            f"{_KEYS_FILE} with its keys beside it to take what can be read"
        ) from error


def load_pickle(path: str) -> Any:
    """What a pickle of names holds; its numpy arrays as such.

    Raises:
      ConfigError: It cannot be read, is damaged, or holds anything but lists, dicts,
        strings, numbers and numpy arrays of these.
    """
    try:
        value = safe_pickle.load(io.BytesIO(foreign_files.read_file(path, _MAX_PICKLE)))
    except safe_pickle.UnsafePickle as error:
        raise ConfigError(
            f"{path}: {error}; only lists, dicts, strings, numbers and numpy arrays of "
            "numbers or strings are read from a pickle, e.g. pickle.dump(list(names))"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is no pickle, or a damaged one ({error}); copy it again"
        ) from error
    if isinstance(value, dict):
        return {
            k: v.values if isinstance(v, safe_pickle.Array) else v
            for k, v in value.items()
        }
    return value.values if isinstance(value, safe_pickle.Array) else value


def _read_keys(file: str) -> tuple[Names, Names | None, Names | None]:
    content = load_pickle(file)
    columns = content if isinstance(content, dict) else {"keys": content}
    if "keys" not in columns:
        raise ConfigError(f"{file} is a dict without `keys`; it must hold the names")
    names = to_names(columns["keys"], f"{file}: `keys`")
    found: dict[str, Names | None] = {"pids": None, "vids": None}
    for column in found:
        if (values := columns.get(column)) is None:
            continue
        labels = found[column] = to_names(values, f"{file}: `{column}`")
        if len(labels) != len(names):
            raise ConfigError(
                f"{file}: `{column}` has {len(labels)} values for {len(names)} "
                "keys; it must have one for each, in their order"
            )
    return names, found["pids"], found["vids"]


def to_names(values: Any, what: str) -> Names:
    """Packs a list of texts, bytes or integers, as they come out of a pickle.

    Raises:
      ConfigError: `what` is something else.
    """
    if isinstance(values, np.ndarray):
        # Of no bytes at all, (10**9, 0) would be as many lists.
        values = values.tolist() if values.ndim == 1 else values
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{what} is a {type(values).__name__}; it must be a list")
    for value in values:
        if not isinstance(value, str | bytes | int):
            raise ConfigError(
                f"{what} holds a {type(value).__name__}; names must be strings"
            )
    return Names.pack(_to_bytes(value, what) for value in values)


def _to_bytes(value: str | bytes | int, what: str) -> bytes:
    if isinstance(value, bytes):
        name = value
    else:
        try:
            name = str(value).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # a lone surrogate: no file is called so
            name = str(value).encode("utf-8", "surrogatepass")
    if len(name) > _MAX_NAME:
        raise ConfigError(f"{what} holds a name of {len(name)} bytes; is it the list?")
    return name


# Of a key CC_CC_VVVV_FFFFFFFF the last part counts frames of one video.
_KEY = re.compile(rb"([0-9A-Za-z]+_[0-9A-Za-z]+_[0-9A-Za-z]+)_[0-9]+")


def video_of(key: bytes) -> bytes:
    """The video that a key of LUPerson's form comes from, else nothing."""
    match = _KEY.fullmatch(key)
    return match[1] if match else b""


def open_lmdb(paths: tuple[str]) -> Any:
    """A transaction that reads one database."""
    return _open(paths[0]).begin(buffers=True)


def read_lmdb(transaction: Any, name: bytes, place: Place, limit: int) -> bytes:
    """The value of one key, as a `sources.Reader`."""
    try:
        value = transaction.get(name) if 0 < len(name) <= 511 else None
    except lmdb.Error as error:
        raise MemberError(f"damaged in the LMDB ({first_line(error)})") from error
    if value is None:
        raise MemberError("not in the database")
    if len(value) > limit:
        raise MemberError(f"more than {limit} bytes")
    return bytes(value)
