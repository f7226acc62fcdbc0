"""Promises about files that somebody else made."""

import os

import pytest

from personmae_jax import foreign_files


def test_a_pipe_a_device_a_folder_and_a_huge_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    os.symlink("loop", tmp_path / "loop")
    for path, words in (
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path, "a folder"),
        (tmp_path / "huge", "more than 100 bytes"),
        (tmp_path / "loop", "symbolic links"),
    ):
        with pytest.raises(OSError, match=words):
            foreign_files.read_file(path, 100)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "list.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("best.jpg\r\n\r\n \u00fc.jpg \r\n".encode(encoding))
        names = [b"best.jpg", "\u00fc.jpg".encode()]
        assert foreign_files.read_lines(path) == names


def test_json_of_any_depth_encoding_or_name_is_read_or_a_value_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{"a": "\u00fc"}'.encode("utf-8-sig"))
    assert foreign_files.read_json(path) == {"a": "\u00fc"}
    for content in (
        *(b"[" * 200_000, b"9" * 5000, b"\xff\xfe\x00", b""),
        *(b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "\\u0061": 2}}]'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"."):
            foreign_files.read_json(path)


def test_lists_that_were_joined_keep_no_byte_order_mark_and_no_nul_is_a_name(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a.jpg\n".encode("utf-8-sig") + "b.jpg\n".encode("utf-8-sig"))
    assert foreign_files.read_lines(path) == [b"a.jpg", b"b.jpg"]
    for encoding in ("utf-16-le", "utf-32"):
        path.write_bytes("a.jpg\n".encode(encoding))
        with pytest.raises(OSError, match="NUL bytes") as raised:
            foreign_files.read_lines(path)
        assert raised.value.strerror == "it holds NUL bytes; save it as UTF-8"
