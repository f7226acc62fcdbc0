"""Promises about strangers' pickles: names are read, nothing is run or imported."""

import builtins
import collections
import contextlib
import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from personmae_jax.data import safe_pickle
from personmae_jax.errors import ConfigError
from personmae_jax.prepare.lmdb_source import load_pickle, to_names


def _load(tmp_path, content: bytes):
    (tmp_path / "keys.pkl").write_bytes(content)
    return load_pickle(str(tmp_path / "keys.pkl"))


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        ["00_01_0002_00000003", "Ü.jpg"],
        {"keys": ["a", "b"], "pids": [1, -2], "vids": ["v", b"w"], "scores": [0.5]},
        [b"bytes", 2**70, True, None, ("tuple", 1.5)],
        {"pids": np.arange(5, dtype=np.int32), "f": np.ones((2, 3), np.float16, "F")},
        {"keys": np.array(["a", "bcd"]), "raw": np.array([b"x", b"yz"])},
        {"big": np.arange(3, dtype=">u2"), "pid": np.int64(7), "none": np.zeros(0)},
        [np.str_("numpy's"), np.float32(0.25)],
        [],
    ],
    ids=repr,
)
def test_lists_dicts_strings_numbers_and_arrays_of_them_are_read(
    tmp_path, value, protocol
):
    np.testing.assert_equal(_load(tmp_path, pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {mark}", "system"),
        (builtins.eval, "open('{mark}', 'w')", r"_*builtins?_*\.eval"),
        (builtins.exec, "open('{mark}', 'w')", r"exec"),
        (builtins.getattr, "x", "getattr"),
        (np.load, "x", r"numpy(\.\w+)*\.load"),
    ],
)
def test_a_hostile_pickle_is_refused_with_its_name_and_does_not_run(
    tmp_path, function, argument, name, protocol
):
    mark = tmp_path / "mark"
    nested = [{"keys": [Calls(function, argument.format(mark=mark))]}]
    with pytest.raises(ConfigError, match=rf"keys\.pkl: it names .*{name}; only lists"):
        _load(tmp_path, pickle.dumps(nested, protocol))
    assert not mark.exists()


def test_dotted_names_below_an_admitted_module_are_refused(tmp_path):
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x1ccore.multiarray._reconstruct\x93."
    with pytest.raises(ConfigError, match="it names numpy.core"):
        _load(tmp_path, dotted)
    inside = b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__reduce_ex\x93."
    with pytest.raises(ConfigError, match="it names numpy.ndarray.__reduce_ex"):
        _load(tmp_path, inside)


@pytest.mark.parametrize(
    "value",
    [1j, range(3), object(), Calls, np.load],
    ids=lambda value: type(value).__name__,
)
def test_every_other_object_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="only lists, dicts"):
        _load(tmp_path, pickle.dumps(value))


@pytest.mark.parametrize(
    "value",
    [np.array(["a", None], object), np.zeros(2, "i4,i4"), np.datetime64("2020", "s")],
    ids=["objects", "records", "times"],
)
def test_arrays_of_anything_else_are_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="it holds a numpy array of"):
        _load(tmp_path, pickle.dumps(value))


def test_absurd_sizes_and_depths_end_in_a_sentence_not_in_memory(tmp_path):
    zeros = pickle.dumps(np.zeros(1, np.uint8), 4)
    hostile = {
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "huge array": zeros.replace(b"K\x01\x85", b"J\xff\xff\xff\x7f\x85"),
        "cut short": pickle.dumps(["name"] * 9)[:-3],
        "not a pickle": b"names\n",
        "unset": b"\x80\x02h\x05.",
        "state of a list": b"\x80\x02]K\x01b.",
        "call of a string": b"\x80\x02X\x01\0\0\0xK\x01\x85R.",
        "persistent": b"\x80\x02K\x01Q.",
        "instance": b"(ios\nsystem\n.",
        "extension": b"\x80\x02\x82\x01.",
    }
    for what, content in hostile.items():
        with pytest.raises(ConfigError, match=r"keys\.pkl"):
            pytest.fail(f"{what} gave {_load(tmp_path, content)!r}"[:200])


def test_deep_lists_end_in_a_sentence(tmp_path):
    deep = _load(tmp_path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    with pytest.raises(ConfigError, match="x holds a list; names must"):
        to_names(deep, "x")


def test_a_deep_tuple_is_refused_before_anything_hashes_it(tmp_path):
    """Hashing one overflows the interpreter's stack, which kills the process."""
    deep = b")" + b"\x85" * 200_000
    shared = b")" + b"2\x86" * 100  # 2 ** 100 empty tuples to hash
    for key in (deep, shared):
        for content in (
            b"}" + key + b"K\x01s.",
            b"}(" + key + b"K\x01u.",
            b"(" + key + b"K\x01d.",
            b"\x8f(" + key + b"\x90.",
            b"(" + key + b"\x91.",
        ):
            with pytest.raises(ConfigError, match="a dict or set has a tuple as a key"):
                _load(tmp_path, b"\x80\x04" + content)


@pytest.mark.parametrize("number", [2**63 + 1, -(2**61 - 1) * 2**9])
def test_numbers_that_would_all_have_one_hash_are_no_keys(tmp_path, number):
    for value in ({number: 1}, {("a", number): 1}, {number}, frozenset([number])):
        with pytest.raises(ConfigError, match="a key of more than 64 bits"):
            _load(tmp_path, pickle.dumps(value, 4))
    assert _load(tmp_path, pickle.dumps({2**63 - 1: 1})) == {2**63 - 1: 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b".",
        b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".",
        b"\x80\x02\x8b\x00\x01\x00\x00" + b"\x7f" * 256 + b".",
        b"I" + b"9" * 5000 + b"\n.",
    ],
    ids=["bytes", "memo", "number", "digits"],
)
def test_a_dozen_bytes_never_ask_for_gigabytes(tmp_path, content):
    tracemalloc.start()
    try:
        with contextlib.suppress(ConfigError):
            assert _load(tmp_path, content) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_names_of_any_text_are_bytes_and_absurd_ones_are_refused():
    assert [*to_names(["\ud800", "\udc80", 7], "x")] == [b"\xed\xa0\x80", b"\x80", b"7"]
    with pytest.raises(ConfigError, match="a name of 5000 bytes"):
        to_names(["a" * 5000], "x")


def test_functions_that_stand_for_names_cannot_be_changed_by_a_pickle():
    state = b"(\x8c\x01aK\x01u"
    for change in (b"}" + state + b"b.", b"N}" + state + b"\x86b."):
        content = b"\x80\x04cnumpy\nndarray\n" + change
        with pytest.raises(safe_pickle.UnsafePickle, match="state of a _Call"):
            safe_pickle.load(io.BytesIO(content))


def test_several_pickles_in_one_file_are_read_with_names_and_storages_of_the_caller():
    """As PyTorch's legacy files have them."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", "7") if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(collections.OrderedDict(a=Storage()))
    pickle.dump([1], file, 2)
    file.write(b"raw")
    file.seek(0)
    known = {"collections.OrderedDict": dict}
    loaded = safe_pickle.load(file, known, persistent_load=lambda pid: pid[1])
    assert loaded == {"a": "7"}
    assert safe_pickle.load(file, {}) == [1]
    assert file.read() == b"raw"
