"""Reads strangers' pickles: lists, dicts, strings, numbers, numpy arrays; no code.

Nothing that a pickle names is ever imported: the few names that numpy's own pickles
hold stand for functions of this file, every other one is refused.
"""

import io
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from personmae_jax.errors import ConfigError, first_line

_MAX_BYTES = 2**31  # of the file; a list of 4 million names has 0.1 to 0.3 GB
_KINDS = "biufUS"  # of numpy arrays: numbers and strings


def load_pickle(path: str) -> Any:
    """The lists, dicts, tuples, strings, numbers and numpy arrays in a pickle.

    Raises:
      ConfigError: It holds anything else, which the message names, is damaged, or
        cannot be read.
    """
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise ConfigError(f"{path} exceeds {_MAX_BYTES} bytes; split the list")
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
        # The C unpickler would allocate whatever size a hostile memo index asks for.
        return _Unpickler(content, encoding="latin1").load()
    except ConfigError as error:
        raise ConfigError(
            f"{path}: {error}; only lists, dicts, strings, numbers and numpy arrays of "
            "numbers or strings are read from a pickle, e.g. pickle.dump(list(names))"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise ConfigError(
            f"{path} is no pickle, or a damaged one "
            f"({type(error).__name__}: {first_line(error)}); copy it again"
        ) from error


class _DType:
    """Stands for numpy.dtype while a pickle is read."""

    def __init__(self, code: object, *_: object):
        if not isinstance(code, str) or len(code) > 12:
            raise ConfigError("it holds a numpy array of an unknown type")
        dtype = np.dtype(code)
        if dtype.kind not in _KINDS or not dtype.itemsize:
            raise ConfigError(f"it holds a numpy array of {dtype.name}")
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        order = state[1]
        if state[2] is not None or order not in ("<", ">", "|", "="):
            raise ConfigError("it holds a numpy array of an unknown type")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array between its two halves in a pickle: a call, a state."""

    def __init__(self, *_: object):
        self.values = np.zeros(0)

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.values = _make_array(data, dtype, shape, "F" if is_fortran else "C").values


def _make_array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray | str):
        raise ConfigError("it holds a numpy array of objects")
    if isinstance(data, str):  # Python 2's str, read as latin1
        data = data.encode("latin1")
    if not all(type(n) is int and n >= 0 for n in shape) or len(data) != (
        math.prod(shape) * dtype.dtype.itemsize
    ):
        raise ConfigError(f"it holds a numpy array of shape {shape} without its data")
    array = _Array()
    array.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array


def _make_scalar(dtype: Any, data: Any) -> Any:
    return _make_array(data, dtype, ()).values.item()


def _encode_latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes in protocols 0 to 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ConfigError(f"it names _codecs.encode with {str(encoding)[:40]!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How they write bytes of length 0."""
    return b""


_NUMPY: dict[tuple[str, str], Callable] = {
    ("core.multiarray", "_reconstruct"): _Array,
    ("core.multiarray", "scalar"): _make_scalar,
    ("core.numeric", "_frombuffer"): _make_array,
}
_KNOWN: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode_latin1,
    ("__builtin__", "bytes"): _no_bytes,
}
for (_module, _name), _function in _NUMPY.items():
    _KNOWN[f"numpy.{_module}", _name] = _function
    _KNOWN[f"numpy._{_module}", _name] = _function  # numpy 2

# Whatever else makes objects: INST, OBJ, NEWOBJ, persistent ids, extensions, sets.
_REFUSED = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID),
    *(pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.EMPTY_SET),
    *(pickle.FROZENSET, pickle.ADDITEMS, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    """The unpickler in Python, whose every instruction can be replaced."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def load(self) -> Any:
        return _plain(super().load())

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ConfigError(f"it names {module[:80]}.{name[:80]}")
        return _KNOWN[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType):
            raise ConfigError(f"it sets the state of a {type(self.stack[-1]).__name__}")
        self.stack[-1].set_state(state)

    def load_refused(self) -> None:
        raise ConfigError("it makes an object that is none of those")

    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in _REFUSED:
        dispatch[_opcode[0]] = load_refused


def _plain(value: Any) -> Any:
    """`value`, with the arrays at its top or directly in its dict themselves."""
    if isinstance(value, dict):
        return {k: v.values if isinstance(v, _Array) else v for k, v in value.items()}
    return value.values if isinstance(value, _Array) else value
