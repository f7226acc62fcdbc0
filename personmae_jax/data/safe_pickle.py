"""Reads untrusted pickles; nothing that a pickle names is ever imported or called.

The standard library's unpickler in Python, of which only harmless instructions are
left. Unlike the one in C it allocates nothing but what it has read, and lets us look
at the keys of dicts, since hashing a deep tuple crashes the interpreter. What stands
for a name in the pickle comes from a table of the caller.
"""

import io
import math
import mmap
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_KINDS = "biufUS"  # of numpy arrays: numbers and strings
_PLAIN = (str, bytes, int, float, bool, type(None))
_MAX_KEY = 8  # items of a tuple that is a key
_REFUSED = "EXT1 EXT2 EXT4 NEXT_BUFFER READONLY_BUFFER LONG4 INST OBJ NEWOBJ_EX".split()


class UnsafePickle(ValueError):
    """A pickle that asks for more than plain values."""


class Opaque:
    """Stands for an object of an unknown type, and forgets what is put into it."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def fill(self, _: Any) -> None:
        """Takes what the pickle sets as state, items or members."""

    append = extend = add = fill

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Call:
    """Stands for a function or class of the table."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function


def load(
    file: io.BytesIO | mmap.mmap,
    known: Mapping[str, Callable] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    takes_unknown: bool = False,
) -> Any:
    """Reads one pickle from where the file stands, and leaves it after its end.

    Args:
      file: Its `read` must allocate no more than there is.
      known: Full name, e.g. "numpy.dtype" -> what is called in its place; None:
        `NUMPY`. What it returns gets its state by a method `fill`, if it has one.
      persistent_load: Gets what stands in the place of an object outside the pickle.
      takes_unknown: What other names make is `Opaque`; otherwise it is refused.

    Returns:
      Lists, dicts, sets, tuples, strings, numbers, and what `known` returns.

    Raises:
      UnsafePickle: It holds anything else, which the message names.
      ValueError: It is damaged, or no pickle.
    """
    unpickler = _Unpickler(file, encoding="latin1")  # of Python 2's strings
    unpickler.known = NUMPY if known is None else known
    unpickler.outside, unpickler.takes_unknown = persistent_load, takes_unknown
    try:
        return unpickler.load()
    except UnsafePickle:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        words = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{type(error).__name__}: {words[:160]}") from error


_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # its types are not told


def _checked(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The library's instruction, after a look at those of the stack that it hashes."""

    def carry_out(self: Any) -> None:
        check_keys(self.stack[keys])
        _Base.dispatch[opcode[0]](self)

    return carry_out


class _Unpickler(_Base):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.known and "." not in name:
            return _Call(self.known[full])
        if self.takes_unknown:
            return Opaque(full)
        raise UnsafePickle(f"it names {full[:160]}")

    def persistent_load(self, pid: Any) -> Any:
        if self.outside is None:
            raise UnsafePickle("it refers to an object outside it")
        return self.outside(pid)

    def refuse(self) -> None:
        raise UnsafePickle("it holds an instruction that no plain value needs")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, _Call):
            self.stack.append(function.function(*arguments))
        elif isinstance(function, Opaque):
            self.stack.append(function)
        else:
            raise UnsafePickle("it calls what is no function")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if hasattr(target, "fill"):
            target.fill(state)
        elif not isinstance(target, dict):  # an OrderedDict may have attributes
            raise UnsafePickle(f"it sets the state of a {type(target).__name__}")

    def make_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.stack.append(bytearray(self.read(size)))

    dispatch = _Base.dispatch | {
        **dict.fromkeys((getattr(pickle, name)[0] for name in _REFUSED), refuse),
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.BUILD[0]: build,
        pickle.BYTEARRAY8[0]: make_bytearray,
        pickle.SETITEM[0]: _checked(pickle.SETITEM, np.s_[-2:-1]),
        pickle.SETITEMS[0]: _checked(pickle.SETITEMS, np.s_[::2]),
        pickle.DICT[0]: _checked(pickle.DICT, np.s_[::2]),
        pickle.ADDITEMS[0]: _checked(pickle.ADDITEMS, np.s_[:]),
        pickle.FROZENSET[0]: _checked(pickle.FROZENSET, np.s_[:]),
    }


def check_keys(keys: list[Any]) -> None:
    """Raises UnsafePickle unless all can be hashed at once: plain values, no giants."""
    for key in keys:
        parts = key if type(key) is tuple and len(key) <= _MAX_KEY else (key,)
        if not all(type(part) in _PLAIN or type(part) is Opaque for part in parts):
            raise UnsafePickle(f"a dict or set has a {type(key).__name__} as a key")
        # Of larger ones any number have the same hash, which makes a dict slow.
        if any(type(part) is int and abs(part) > 2**63 for part in parts):
            raise UnsafePickle("a dict or set has a key of more than 64 bits")


class _DType:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: object, *_: object):
        if not isinstance(code, str) or len(code) > 12:
            raise UnsafePickle("it holds a numpy array of an unknown type")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _KINDS or not self.dtype.itemsize:
            raise UnsafePickle(f"it holds a numpy array of {self.dtype.name}")

    def fill(self, state: Any) -> None:
        order = state[1]
        if state[2] is not None or order not in ("<", ">", "|", "="):
            raise UnsafePickle("it holds a numpy array of an unknown type")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stands for a numpy array; `values` is the array, of numbers or strings."""

    def __init__(self, *_: object):
        self.values = np.zeros(0)

    def fill(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.values = _make_array(data, dtype, shape, "F" if is_fortran else "C").values


def _make_array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Array:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray | str):
        raise UnsafePickle("it holds a numpy array of objects")
    if isinstance(data, str):  # Python 2's str, read as latin1
        data = data.encode("latin1")
    if not all(type(n) is int and n >= 0 for n in shape) or len(data) != (
        math.prod(shape) * dtype.dtype.itemsize
    ):
        raise UnsafePickle("it holds a numpy array without its data")
    array = Array()
    array.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array


def _make_scalar(dtype: Any, data: Any) -> Any:
    return _make_array(data, dtype, ()).values.item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in protocols 0 to 2."""
    if encoding not in ("latin1", "latin-1"):
        raise UnsafePickle(f"it names _codecs.encode with {str(encoding)[:40]!r}")
    return text.encode("latin1")


# numpy 1 calls its inner package `core`, numpy 2 `_core`.
NUMPY: Mapping[str, Callable] = {
    "numpy.ndarray": Array,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # of length 0, in protocols 0 to 2
} | {
    f"numpy.{core}.{name}": function
    for core in ("core", "_core")
    for name, function in (
        ("multiarray._reconstruct", Array),
        ("multiarray.scalar", _make_scalar),
        ("numeric._frombuffer", _make_array),
    )
}
