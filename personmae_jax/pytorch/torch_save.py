"""Reads what `torch.save` wrote, without torch; runs nothing that is in it.

A zip has one pickle, `NAME/data.pkl`, and every storage uncompressed as
`NAME/data/KEY`. A legacy file, of torch before 1.6, has five pickles one after the
other: a magic number, a protocol, facts of the system, the object, and the keys of the
storages, which follow, each with its length before it.

Source: torch/serialization.py and torch/_utils.py, of torch 2.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from personmae_jax import foreign_files
from personmae_jax.data import safe_pickle
from personmae_jax.pytorch.stored import Stored

_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 2**28  # bytes; names and shapes of a checkpoint have some 100 kB
_MAX_DIMENSIONS = 32  # of numpy before 2.0
_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "int8",
    "QUInt8": "uint8",
    "QInt32": "int32",
    "Untyped": "uint8",
}


class OtherKind(ValueError):
    """A whole file that is none of torch's; ends a sentence on it."""


class _Storage(NamedTuple):
    """Numbers in a file: their type, how many, and what reads their bytes."""

    dtype: str
    count: int
    read: Callable[[], bytes]


def load(path: os.PathLike[str]) -> Any:
    """Returns what was saved, with `Stored` for tensors, `Opaque` for other objects.

    Raises:
      OtherKind: It is a whole file of another kind.
      Exception: Nearly any other: it is damaged.
    """
    with foreign_files.open_file(path) as file:
        if file.read(2) == b"PK":
            return _load_zip(zipfile.ZipFile(path))
        return _load_legacy(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _load_zip(archive: zipfile.ZipFile) -> Any:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if entries and all(name.endswith(".npy") for name in entries):
        raise OtherKind(
            "is an .npz file of numpy; save its arrays with "
            "safetensors.numpy.save_file(dict(numpy.load(FILE)), NEW)"
        )
    if any(name.endswith("/constants.pkl") for name in entries):
        raise OtherKind(
            "is a TorchScript program; save its weights with "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise OtherKind("is a zip, but none that torch.save wrote")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise OtherKind(
            "is a compressed zip, which torch.save never writes; save it again with "
            "torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if entries[pickles[0]].file_size > _MAX_PICKLE:
        raise ValueError(f"its pickle has more than {_MAX_PICKLE} bytes")
    if f"{folder}byteorder" in entries:
        _check_order(archive.read(f"{folder}byteorder") == b"little")

    @functools.lru_cache(1)  # parameters of one flat storage lie side by side
    def read(key: str) -> bytes:
        return archive.read(f"{folder}data/{key}")  # checks the CRC

    def find(pid: Any) -> _Storage:
        dtype, key, count = _parts(pid)
        return _Storage(dtype, count, functools.partial(read, key))

    pickled = io.BytesIO(archive.read(pickles[0]))
    return safe_pickle.load(pickled, _KNOWN, find, takes_unknown=True)


def _load_legacy(content: mmap.mmap) -> Any:
    try:
        first = safe_pickle.load(content, {})
    except safe_pickle.UnsafePickle:  # torch.save begins with a number
        first = None
    if first != _MAGIC:
        raise OtherKind("is a pickle, but none that torch.save wrote")
    safe_pickle.load(content, {})  # the protocol
    _check_order(safe_pickle.load(content, {})["little_endian"] is True)
    places: dict[str, tuple[int, int]] = {}  # key -> first byte and number of bytes
    sizes: dict[str, int] = {}

    def read(key: str) -> bytes:
        start, size = places[key]
        return content[start : start + size]

    def find(pid: Any) -> _Storage:
        dtype, key, count = _parts(pid)
        sizes[key] = np.dtype(dtype).itemsize * count
        return _Storage(dtype, count, functools.partial(read, key))

    tree = safe_pickle.load(content, _KNOWN, find, takes_unknown=True)
    place = 0
    for key in safe_pickle.load(content, {}):
        place = (place or content.tell()) + 8  # its length as an int64
        places[key] = place, sizes[key]
        place += sizes[key]
    if place > len(content):
        raise ValueError(f"{place - len(content)} bytes are missing at its end")
    return tree


def _check_order(is_little: bool) -> None:
    if not is_little:
        raise OtherKind("was written on a big-endian machine; load and save it there")


def _parts(pid: Any) -> tuple[str, str, int]:
    """Type, key and number of elements of a storage."""
    kind, storage, key, _, count, *view = pid
    if kind != "storage" or any(view) or type(count) is not int or count < 0:
        raise ValueError("it refers to an unknown storage")
    if type(key) is not str:  # that of nested tuples doubles with every level
        raise ValueError("it names a storage by what is no text")
    name = storage.name.rpartition(".")[2].removesuffix("Storage")
    return _DTYPES[name], key, count


def _rebuild(
    storage: _Storage, offset: int, size: Any, strides: Any, *_: Any
) -> Stored:
    numbers = (offset, *size, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has a negative size")
    if len(size) != len(strides) or len(size) > _MAX_DIMENSIONS:
        raise ValueError("a tensor has sizes and strides that do not match")
    return Stored(
        shape=tuple(size),
        dtype=storage.dtype,
        read=functools.partial(_read, storage, offset, tuple(size), tuple(strides)),
    )


def _read(
    storage: _Storage, offset: int, size: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    number = math.prod(size)
    dtype = np.dtype(storage.dtype)
    stored = np.frombuffer(storage.read(), dtype)
    data = stored[offset:]
    last = sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
    if number and last >= len(data):
        raise ValueError("of more numbers than are stored")
    if number > min(storage.count, len(stored)):  # the count is a claim
        raise ValueError(f"repeated to {number} out of fewer in the file")
    if not number:
        return np.zeros(size, dtype)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(data, size, steps, writeable=False)


def _rebuild_of_type(
    storage: _Storage, offset: int, size: Any, strides: Any, *rest: Any
) -> Stored:
    """For the types that have no storage of their own."""
    name = rest[2].name.removeprefix("torch.")  # after a flag and hooks
    if name in _DTYPES.values():
        raise ValueError(f"a tensor of {name} has no storage of its type")
    return dataclasses.replace(_rebuild(storage, offset, size, strides), dtype=name)


def _make_dict(pairs: Any = ()) -> dict[Any, Any]:
    safe_pickle.check_keys([key for key, _ in pairs])  # Python 2's has them here
    return dict(pairs)


_KNOWN = {
    **safe_pickle.NUMPY,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_of_type,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": lambda *_: {},
}
