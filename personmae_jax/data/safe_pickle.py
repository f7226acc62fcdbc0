"""Reads strangers' pickles; nothing that a pickle names is ever imported or called.

Two guards. `pickletools.genops` first goes through the instructions with budgets for
bytes, instructions, nesting and numbers, since a dozen bytes can ask for gigabytes and
a deep tuple crashes the interpreter. Then a `pickle.Unpickler` makes the objects, for
which every name in the pickle must be in a table of functions that stand for it.

For PyTorch's pickles (`data.pkl` of a zip, or each of those that a legacy file has one
after the other) pass `known` with what stands for `torch._utils._rebuild_tensor_v2`,
`collections.OrderedDict`, ..., and `persistent_load` for the storages. What these
functions return should have a `__setstate__`, or else no `__dict__`.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_OPCODES = 2**26  # 10 million images of LUPerson-NL with labels need 50 million
_MAX_DEPTH = 100
_MAX_BITS = 1000  # of a number; text of 4,300 digits is the most that Python makes
_KINDS = "biufUS"  # of numpy arrays: numbers and strings
_REFUSED = ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER")
# These change what lies under their arguments, and leave it there.
_CHANGE = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MARK = -1  # in place of a depth


class UnsafePickle(ValueError):
    """A pickle that asks for more than plain values.

    Attributes:
      name: The function or class that it names, if that is why.
    """

    def __init__(self, message: str, name: str | None = None):
        super().__init__(message)
        self.name = name


def load(
    file: io.BufferedIOBase,
    known: Mapping[str, Callable] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
    max_opcodes: int = MAX_OPCODES,
) -> Any:
    """Reads one pickle from where the file stands, and leaves it after its end.

    Args:
      file: Seekable; its size limits what is allocated.
      known: Full name, e.g. "collections.OrderedDict" -> what is called in its place;
        None: `NUMPY`.
      persistent_load: Gets what stands in the place of an object outside the pickle.
      max_opcodes: Instructions; more are refused.

    Returns:
      Lists, dicts, sets, tuples, strings, numbers, and what `known` returns.

    Raises:
      UnsafePickle: It holds anything else, which the message names.
      ValueError: It is damaged, or no pickle.
    """
    start = file.tell()
    try:
        _check_budgets(file, max_opcodes)
        content = io.BytesIO(_reread(file, start))
        known = NUMPY if known is None else known
        return _Unpickler(content, known, persistent_load).load()
    except UnsafePickle:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        words = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{type(error).__name__}: {words}") from error


def _reread(file: io.BufferedIOBase, start: int) -> bytes:
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def _check_budgets(file: Any, max_opcodes: int) -> None:
    """Follows the unpickler's stack by the nesting of what lies on it.

    A list that grows after it was put into another is nested deeper than is counted
    here; a tuple, which alone can be hashed, is not.
    """
    stack: list[int] = []
    below: list[list[int]] = []  # the stack under each mark
    memo: dict[int, int] = {}
    instructions: Any = pickletools.genops(file)  # arguments of no declared type
    for number, (opcode, value, _) in enumerate(instructions):
        name = opcode.name
        if number >= max_opcodes:
            raise UnsafePickle(f"it has more than {max_opcodes} instructions")
        if name in _REFUSED:
            raise UnsafePickle(f"it holds the instruction {name}")
        if type(value) is int and value.bit_length() > _MAX_BITS:
            raise UnsafePickle(f"it holds a number of over {_MAX_BITS} bits")
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "PUT" in name:
            if not 0 <= value <= number:  # the unpickler makes room for all below
                raise UnsafePickle("it numbers its objects at random")
            memo[value] = stack[-1]
        elif "GET" in name:
            stack.append(memo[value])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif not opcode.stack_before:
            stack += [0] * len(opcode.stack_after)
        else:
            num_taken, taken = len(opcode.stack_before), []
            if pickletools.markobject in opcode.stack_before:
                num_taken = name.endswith("S")  # APPENDS, ...: the object to change
                taken, stack = stack, below.pop()
            if num_taken:
                taken[:0] = stack[-num_taken:]
                del stack[-num_taken:]
            if opcode.stack_after:
                stack.append(_depth(name, taken))


def _depth(name: str, parts: list[int]) -> int:
    """The nesting of what an instruction makes of these parts, or of what it fills."""
    first = parts[0] if name in _CHANGE else -1
    depth = max(first, 1 + max(parts[name in _CHANGE :], default=-1))
    if depth > _MAX_DEPTH:
        raise UnsafePickle(f"it is nested more than {_MAX_DEPTH} deep")
    return depth


class _Call:
    """What a name in a pickle becomes: its function, out of reach."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise UnsafePickle("it sets the state of a function")


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        content: io.BufferedIOBase,
        known: Mapping[str, Callable],
        persistent_load: Callable[[Any], Any] | None,
    ):
        super().__init__(content, encoding="latin1")  # of Python 2's strings
        self._known, self._persistent_load = known, persistent_load

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._known or "." in name:
            raise UnsafePickle(f"it names {full[:160]}", full)
        return _Call(self._known[full])

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent_load is None:
            raise UnsafePickle("it refers to an object outside it")
        return self._persistent_load(pid)


class _DType:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: object, *_: object):
        if not isinstance(code, str) or len(code) > 12:
            raise UnsafePickle("it holds a numpy array of an unknown type")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in _KINDS or not self.dtype.itemsize:
            raise UnsafePickle(f"it holds a numpy array of {self.dtype.name}")

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if state[2] is not None or order not in ("<", ">", "|", "="):
            raise UnsafePickle("it holds a numpy array of an unknown type")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stands for a numpy array; `values` is the array, of numbers or strings."""

    def __init__(self, *_: object):
        self.values = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
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
