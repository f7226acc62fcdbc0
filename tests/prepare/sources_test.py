"""Promises about what is found at a path, whatever it is called."""

import contextlib
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from image_files import (
    jpeg,
    members,
    names,
    write_folder,
    write_lmdb,
    write_tar,
    write_zip,
)

from personmae_jax.errors import ConfigError
from personmae_jax.prepare.listing import MemberError
from personmae_jax.prepare.sources import find_sources, list_sources, open_reader

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def _new_readers():
    open_reader.cache_clear()


def read_all(*paths) -> dict[str, bytes]:
    """Every member by name, in order; names must differ."""
    found = {}
    for listing in list_sources([str(path) for path in paths]):
        reader = open_reader(listing.kind, listing.paths)
        for number, name in enumerate(listing.names):
            data = reader(name, listing.places[number], LIMIT)
            assert name.decode() not in found
            found[name.decode()] = data
    open_reader.cache_clear()
    return found


def write_parts(path, data: bytes, count: int) -> list:
    size = -(-len(data) // count)
    parts = [path.with_name(f"{path.name}.{n + 1:03}") for n in range(count)]
    for n, part in enumerate(parts):
        part.write_bytes(data[n * size : (n + 1) * size])
    return parts


@pytest.mark.parametrize("form", ["folder", "zip", "stored", "tar", "tar.gz", "lmdb"])
def test_each_form_is_told_by_its_content_and_read_bit_for_bit(tmp_path, form):
    content, path = members(20), tmp_path / "named.misleadingly.txt"
    if form == "folder":
        write_folder(path, content)
    elif form == "lmdb":
        write_lmdb(path, content)
    elif form in ("zip", "stored"):
        write_zip(path, content, zipfile.ZIP_DEFLATED * (form == "zip"))
    else:
        write_tar(path, content, form == "tar.gz")
    found = read_all(path)
    assert found == content
    assert [*found] == [*content]


def test_several_archives_and_a_folder_of_archives_are_read_in_order(tmp_path):
    content = members(30)
    keys = [*content]
    write_zip(tmp_path / "a.zip", {key: content[key] for key in keys[:10]})
    write_tar(tmp_path / "b.tar.gz", {key: content[key] for key in keys[10:20]}, True)
    write_lmdb(tmp_path / "c", {key: content[key] for key in keys[20:]})
    (tmp_path / "notes.md").write_text("LUPerson, in three parts")
    assert [*read_all(tmp_path).items()] == [*content.items()]
    assert [*read_all(tmp_path / "c", tmp_path / "a.zip")] == keys[20:] + keys[:10]


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_parts_of_a_cut_archive_are_one(tmp_path, form):
    content, whole = members(20), tmp_path / f"whole.{form}"
    if form == "zip":
        write_zip(whole, content)
    else:
        write_tar(whole, content, form == "tar.gz")
    parts = write_parts(whole, whole.read_bytes(), 3)
    whole.unlink()
    for given in ([parts[0]], [parts[2], parts[0]], parts, [tmp_path]):
        assert read_all(*given) == content
    parts[1].unlink()
    with pytest.raises(ConfigError, match=r"parts \.001, \.003 are there; all are"):
        read_all(parts[0])


def test_a_spanned_zip_is_refused_with_how_to_join_it(tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", members(3)).read_bytes())
    end = data.rfind(b"PK\x05\x06")
    data[end + 4 : end + 8] = b"\x02\0\x02\0"  # number of this disk, of the first
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "a.z01").write_bytes(b"PK\x07\x08" + bytes(data[:100]))
    with pytest.raises(ConfigError, match=r"zip -s 0 a\.zip --out whole\.zip"):
        read_all(tmp_path / "a.zip")
    with pytest.raises(ConfigError, match=r"zip -s 0 NAME\.zip --out whole\.zip"):
        read_all(tmp_path / "a.z01")


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_names_in_archives_are_never_paths(tmp_path, form):
    (tmp_path / "secret.jpg").write_bytes(jpeg(99))
    content = {
        "../secret.jpg": jpeg(0),
        str(tmp_path / "secret.jpg"): jpeg(1),
        "a/../../b.jpg": jpeg(2),
    }
    path = (write_zip if form == "zip" else write_tar)(tmp_path / "a", content)
    before = sorted(os.listdir(tmp_path))
    assert read_all(path) == content
    assert sorted(os.listdir(tmp_path)) == before


def test_links_in_a_tar_are_left_out_and_told(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert read_all(tmp_path / "a.tar") == {"a.jpg": b"abc"}
    assert "left out 2 links" in caplog.text


def _reading(path) -> Exception:
    listing = list_sources([str(path)])[0]
    reader = open_reader(listing.kind, listing.paths)
    with pytest.raises((MemberError, OSError)) as error:
        reader(listing.names[0], listing.places[0], LIMIT)
    return error.value


@pytest.mark.parametrize("form", ["zip", "tar", "lmdb", "folder"])
def test_a_huge_member_is_not_read(tmp_path, form):
    content = {"a.jpg": bytes(LIMIT + 1)}
    write = dict(zip=write_zip, tar=write_tar, lmdb=write_lmdb, folder=write_folder)
    path = write[form](tmp_path / "source", content)
    assert "more than 1048576 bytes" in str(_reading(path))


def test_a_bomb_that_lies_about_its_size_is_cut_off(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.jpg": bytes(1 << 26)})
    data = path.read_bytes().replace((1 << 26).to_bytes(4, "little"), b"\x10\0\0\0")
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert "damaged in the zip archive" in str(_reading(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_encrypted_and_strangely_compressed_members_are_told(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.jpg": jpeg(0)}, zipfile.ZIP_BZIP2)
    assert "zip method 12" in str(_reading(path))
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    open_reader.cache_clear()
    assert "encrypted" in str(_reading(path))


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_damaged_archives_end_in_one_sentence(tmp_path, form):
    path = tmp_path / f"a.{form}"
    if form == "zip":
        write_zip(path, members(9))
    else:
        write_tar(path, members(9), form == "tar.gz")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    path.write_bytes(whole[: len(whole) // 3 + 99])
    with pytest.raises(ConfigError, match=r"archive"):
        read_all(path)
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        open_reader.cache_clear()
        try:  # nothing but these two, and in the worst case a wrong name
            listing = list_sources([str(path)])[0]
            reader = open_reader(listing.kind, listing.paths)
            for number, name in enumerate(listing.names):
                try:
                    reader(name, listing.places[number], LIMIT)
                except (MemberError, OSError):
                    pass
        except ConfigError:
            pass


def test_a_tar_without_its_end_is_read_and_told(tmp_path, caplog):
    content = members(2)
    path = write_tar(tmp_path / "a.tar", content)
    assert read_all(path) == content
    assert "cut short" not in caplog.text
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(4096, b"\0"))
    assert read_all(path) == content
    assert "has no end: it may be cut short" in caplog.text


def test_a_tar_with_a_negative_size_does_not_go_round_for_ever(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # base 256: -256
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(ConfigError, match="damaged tar archive"):
        read_all(tmp_path / "a.tar")


@pytest.mark.parametrize("where", ["beside", "above"])
def test_keys_pkl_gives_order_identities_and_videos(tmp_path, where):
    content = {name: jpeg(n) for n, name in enumerate(names(9))}
    keys = [*content][::-2]
    about = {"keys": keys, "pids": [*range(5)], "vids": [f"v{n}" for n in range(5)]}
    path = write_lmdb(tmp_path / "lmdb", content, about)
    if where == "above":
        (path / "keys.pkl").rename(tmp_path / "keys.pkl")
    listing = list_sources([str(path)])[0]
    assert [name.decode() for name in listing.names] == keys
    assert [*listing.identities] == [b"0", b"1", b"2", b"3", b"4"]
    assert [*listing.videos] == [b"v0", b"v1", b"v2", b"v3", b"v4"]
    assert read_all(tmp_path) == {key: content[key] for key in keys}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pids": [1]}, "a dict without `keys`"),
        ({"keys": ["a", "b"], "pids": [1]}, "`pids` has 1 values for 2 keys"),
        ({"keys": ["a", 0.5]}, "`keys` holds a float"),
        ("name", "`keys` is a str"),
        ({"keys": [print]}, r"it names _*builtins?_*\.print"),
    ],
)
def test_a_wrong_keys_pkl_is_refused_with_what_is_wrong(tmp_path, keys, words):
    path = write_lmdb(tmp_path / "lmdb", {"a": jpeg(0)}, keys)
    with pytest.raises(ConfigError, match=rf"keys\.pkl.*{words}"):
        list_sources([str(path)])


def test_a_key_that_is_not_there_is_one_bad_member(tmp_path):
    path = write_lmdb(tmp_path / "lmdb", {"a": jpeg(0)}, ["b", "a", ""])
    assert "not in the database" in str(_reading(path))


def test_what_is_nothing_known_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("a.txt", "neither a folder, a zip"),
        ("missing", "there is nothing"),
        ("empty", "holds no images"),
    ):
        with pytest.raises(ConfigError, match=words):
            list_sources([str(tmp_path / name)])


def test_what_may_not_be_read_is_told_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(ConfigError, match="a cannot be read: Permission denied"):
        find_sources([str(tmp_path / "a")])


def test_archives_beside_a_hidden_image_are_archives(tmp_path):
    zipped = write_zip(tmp_path / "c.zip", members(2))
    write_folder(tmp_path / ".thumbnails", {"1.jpg": jpeg(0)})
    assert find_sources([str(tmp_path)]) == [("zip", (str(zipped),))]


def test_a_tar_with_names_of_megabytes_is_refused(tmp_path):
    for length in (5_000, 2**22):
        path = tmp_path / f"{length}.tar.gz"
        with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo("a" * length))
        with pytest.raises(ConfigError, match="absurd"):
            list_sources([str(path)])


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_with_names_as_long_as_paths_can_be_is_read(tmp_path, form):
    content = {"ü" * 2044 + f"{n}.jpg": jpeg(n) for n in range(2)} | {"b.jpg": jpeg(3)}
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.pax_headers = {"comment": "c" * 4096}
            tar.addfile(member, io.BytesIO(data))
    listing = list_sources([str(tmp_path / "a.tar")])[0]
    assert max(map(len, listing.names)) > 4090
    assert read_all(tmp_path / "a.tar") == content


def test_a_pax_header_that_python_would_take_minutes_for_is_refused(tmp_path):
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {"comment": "0" * 2**15}
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises(ConfigError, match="a header of absurd size"):
        list_sources([str(tmp_path / "a.tar")])


def test_a_folder_of_images_is_one_source_even_beside_archives(tmp_path):
    write_folder(tmp_path / "a", {"b/1.jpg": jpeg(0), "README": b"text"})
    write_zip(tmp_path / "a" / "c.zip", members(2))
    assert find_sources([str(tmp_path / "a")]) == [("folder", (str(tmp_path / "a"),))]


def test_every_flipped_bit_of_a_compressed_tar_is_found(tmp_path):
    content, num_found = members(5), 0
    path = write_tar(tmp_path / "a.tar.gz", content, True)
    whole = path.read_bytes()
    for place in np.random.default_rng(1).integers(10, len(whole), 150).tolist():
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            assert read_all(path) == content, place  # a bit that nothing reads
        except ConfigError:
            num_found += 1
    assert num_found >= 140


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_archives_that_lie_end_to_end_are_all_read(tmp_path, form):
    content = members(9)
    parts = [
        write_tar(tmp_path / str(n), dict([*content.items()][n::3]), form == "tar.gz")
        for n in range(3)
    ]
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read_all(whole) == content


def test_zip_archives_that_lie_end_to_end_are_refused_with_what_to_do(tmp_path):
    parts = [write_zip(tmp_path / str(n), {f"{n}.jpg": jpeg(n)}) for n in range(2)]
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(ConfigError, match="give each as a file of its own"):
        list_sources([str(whole)])


def test_bytes_of_a_zip_that_no_entry_names_are_told(tmp_path, caplog):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}/", b"")  # folders are no gap
            archive.writestr(f"{number}.jpg", jpeg(number))
        removed = archive.filelist.pop(3)
        archive.comment = b"PK\x05\x06 is no end"
    assert [*read_all(path)] == ["0.jpg", "2.jpg"]
    size = removed.file_size + 30 + len(removed.filename)
    assert f"{size} bytes are no member's" in caplog.text
    caplog.clear()
    write_zip(path, members(3))
    read_all(path)
    assert not caplog.text
    with open(path, "ab") as file:
        file.write(b"more")
    assert len(read_all(path)) == 3
    assert "4 bytes are no member's" in caplog.text


def test_a_tar_header_that_is_damaged_does_not_end_the_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar", members(5))
    data = bytearray(path.read_bytes())
    listing = list_sources([str(path)])[0]
    data[int(listing.places[2, 0]) - 512 + 150] ^= 1  # its checksum
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="a header is damaged"):
        list_sources([str(path)])
    path.write_bytes(write_tar(path, members(2)).read_bytes() + b"x" * 512)
    with pytest.raises(ConfigError, match="damaged tar archive"):
        list_sources([str(path)])


def test_chains_of_tar_headers_and_absurd_numbers_are_one_sentence(tmp_path):
    link = tarfile.TarInfo("././@LongLink")
    link.type, link.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (link.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 3000
    (tmp_path / "chain.tar").write_bytes(chain + bytes(10240))
    for name, value in (("size", "9" * 5000), ("size", "1" + "0" * 30), ("mtime", "x")):
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {name: value}
        (tmp_path / f"{name}{len(value)}.tar").write_bytes(
            member.tobuf(tarfile.PAX_FORMAT) + bytes(10240)
        )
    for path in sorted(tmp_path.iterdir()):
        with contextlib.suppress(ConfigError):
            list_sources([str(path)])


def test_a_zip_of_more_than_65535_files_without_zip64_is_read_whole(tmp_path):
    path = tmp_path / "a.zip"
    count = 65_536 + 200
    locals_, entries, offset = [], [], 0
    for number in range(count):
        name = b"%06d.jpg" % number
        tail = struct.pack("<IIIHH", zlib.crc32(b"x"), 1, 1, len(name), 0)
        local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 0, 0, 0) + tail + name + b"x"
        entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 0) + tail
        entries.append(entry + struct.pack("<HHHII", 0, 0, 0, 0, offset) + name)
        locals_.append(local)
        offset += len(local)
    central = b"".join(entries)
    end = struct.pack("<HHHHIIH", 0, 0, 200, 200, len(central), offset, 0)
    path.write_bytes(b"".join(locals_) + central + b"PK\5\6" + end)
    listing = list_sources([str(path)])[0]
    assert len(listing.names) == count
    reader = open_reader("zip", listing.paths)
    assert reader(listing.names[count - 1], listing.places[count - 1], 9) == b"x"
    damaged = path.read_bytes().replace(end[4:8], struct.pack("<HH", 201, 201))
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="damaged zip archive"):
        list_sources([str(path)])


def test_members_of_a_zip_beyond_4_gib_whose_places_have_wrapped_are_read(tmp_path):
    """As writers without zip64 leave them; the file has a hole of 4 GiB."""
    path, central = tmp_path / "a.zip", b""
    places = {b"a.jpg": 0, b"b.jpg": 5000, b"c.jpg": 2**32 + 100, b"d.jpg": 2**32 + 900}
    with path.open("wb") as file:
        for name, place in places.items():
            tail = struct.pack("<IIIHH", zlib.crc32(name), 5, 5, len(name), 0)
            file.seek(place)
            file.write(b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 0, 0, 0) + tail)
            file.write(2 * name)
            central += b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 0, 0, 0) + tail
            central += struct.pack("<HHHII", 0, 0, 0, 0, place % 2**32) + name
        start = file.seek(2**32 + 2000) % 2**32
        end = struct.pack("<HHHHIIH", 0, 0, 4, 4, len(central), start, 0)
        file.write(central + b"PK\5\6" + end)
    listing = list_sources([str(path)])[0]
    reader = open_reader("zip", listing.paths)
    for number, name in enumerate(places):
        assert reader(name, listing.places[number], 9) == name


def test_zip_members_that_lie_over_one_another_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="over one another"):
        list_sources([str(path)])


@pytest.mark.parametrize(
    "suffix", [".aa", ".partaa", ".00", ".01", ".000", "_aa", "aa", "-part-AA", "_aaaa"]
)
def test_parts_are_joined_whatever_split_called_them(tmp_path, suffix):
    content, whole = members(9), tmp_path / "whole.tar"
    data = write_tar(whole, content).read_bytes()
    whole.unlink()
    names = [suffix]
    for _ in range(2):
        names.append(names[-1][:-1] + chr(ord(names[-1][-1]) + 1))
    for number, name in enumerate(names):
        third = len(data) // 3 + 1
        part = data[number * third : (number + 1) * third]
        (tmp_path / f"whole.tar{name}").write_bytes(part)
    (tmp_path / "other.tar.zz").write_bytes(b"")
    assert read_all(tmp_path / f"whole.tar{names[1]}") == content
    (tmp_path / f"whole.tar{names[1]}").unlink()
    with pytest.raises(ConfigError, match="all are needed"):
        read_all(tmp_path / f"whole.tar{names[2]}")


def test_what_macos_leaves_beside_an_archive_is_no_damaged_archive(tmp_path, caplog):
    write_zip(tmp_path / "a.zip", {"a.jpg": jpeg(0)})
    (tmp_path / "._a.zip").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    assert [*read_all(tmp_path)] == ["a.jpg"]
    assert "left out 1 files and folders beside 1 archives, e.g. ._a.zip" in caplog.text


@pytest.mark.parametrize("name", ["b.zip", "b.tar.gz", "b.tar.bz2", "b.RAR"])
def test_no_archive_of_a_folder_is_left_out_unsaid(tmp_path, name, caplog):
    write_zip(tmp_path / "a.zip", {"a.jpg": jpeg(0)})
    (tmp_path / "notes.txt").write_text("hello")
    assert len(list_sources([str(tmp_path)])) == 1
    assert "left out 1 files and folders beside 1 archives, e.g. notes.txt" in (
        caplog.text
    )
    (tmp_path / name).write_bytes(b"QK" + (tmp_path / "a.zip").read_bytes()[2:])
    with pytest.raises(ConfigError, match=f"{name} is no zip or tar"):
        list_sources([str(tmp_path)])


def test_a_zip_member_with_bytes_is_a_file_whatever_its_attributes(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder")
        info = zipfile.ZipInfo("b.jpg")
        info.external_attr = 0x10
        archive.writestr(info, jpeg(1))
    assert read_all(tmp_path / "a.zip") == {"b.jpg": jpeg(1)}


def test_keys_that_keys_pkl_does_not_list_are_told(tmp_path, caplog):
    content = {name: jpeg(n) for n, name in enumerate(names(9))}
    path = write_lmdb(tmp_path / "lmdb", content, [*content][:4])
    assert len(list_sources([str(path)])[0].names) == 4
    assert "lists 4 of the 9 keys of" in caplog.text
    (path / "keys.pkl").unlink()
    os.mkfifo(path / "keys.pkl")
    with pytest.raises(ConfigError, match="keys.pkl cannot be read"):
        list_sources([str(path)])


def test_an_empty_array_of_a_thousand_million_rows_takes_no_memory(tmp_path):
    path = write_lmdb(tmp_path / "lmdb", {"a": jpeg(0)}, ["a"])
    with open(path / "keys.pkl", "wb") as file:
        pickle.dump(np.zeros((10**9, 0)), file)
    with pytest.raises(ConfigError, match="`keys` is a ndarray"):
        list_sources([str(path)])


def test_a_damaged_lmdb_costs_what_is_damaged_and_a_cut_one_is_told(tmp_path):
    content = members(300)
    path = write_lmdb(tmp_path / "lmdb", content, [*content])
    file = path / "data.mdb"
    whole = bytearray(file.read_bytes())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="is cut short"):
        read_all(path)
    page = whole.index([*content.values()][150]) // 4096 * 4096
    whole[page : page + 16] = b"\xff" * 16
    file.write_bytes(whole)
    listing = list_sources([str(path)])[0]
    reader, found = open_reader(listing.kind, listing.paths), 0
    for number, name in enumerate(listing.names):
        try:
            reader(name, listing.places[number], LIMIT)
            found += 1
        except MemberError:
            pass
    assert 0 < found < 300
    (path / "keys.pkl").unlink()
    del reader
    open_reader.cache_clear()
    with pytest.raises(ConfigError, match="damaged LMDB"):
        list_sources([str(path)])


def test_keys_that_an_lmdb_counts_but_does_not_give_are_told(tmp_path):
    file = write_lmdb(tmp_path / "lmdb", members(30)) / "data.mdb"
    assert len(list_sources([str(file.parent)])[0].names) == 30
    data = bytearray(file.read_bytes())
    for page in (0, 4096):  # both metas: where the tree's root is; all ones means none
        data[page + 128 : page + 136] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"damaged LMDB \(0 of 30 keys are found\)"):
        list_sources([str(file.parent)])


@pytest.mark.parametrize(
    ("count", "words"),
    [(9, r"10 of 9 keys are found"), (2**40, r"\d+ keys cannot be in so small a file")],
)
def test_an_lmdb_with_more_keys_than_it_counts_or_can_hold_is_refused(
    tmp_path, count, words
):
    file = write_lmdb(tmp_path / "lmdb", members(30)) / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in (0, 4096):  # both metas: the entries of the tree
        data[page + 120 : page + 128] = struct.pack("<Q", count)
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"damaged LMDB \({words}"):
        list_sources([str(file.parent)])
