"""Promises about subsets by a list of names, best first."""

import pickle

import pytest
from image_files import members, names, write_folder, write_zip

from personmae_jax.data.names import Names
from personmae_jax.errors import ConfigError
from personmae_jax.prepare.keep_list import count_kept, read_keep_list, select
from personmae_jax.prepare.sources import list_sources


def _kept(listings, wanted, count=None) -> list[str]:
    packed = Names.pack(name.encode() for name in wanted)
    everything = [n.decode() for listing in listings for n in listing.names]
    return [everything[n] for n in select(listings, packed, count or len(wanted))]


@pytest.fixture
def listings(tmp_path):
    content = members(30)
    keys = [*content]
    write_folder(tmp_path / "a", {f"x/{k}": content[k] for k in keys[:15]})
    write_zip(tmp_path / "b.zip", {f"y/{k}": content[k] for k in keys[15:]})
    return list_sources([str(tmp_path / "a"), str(tmp_path / "b.zip")])


@pytest.mark.parametrize("form", ["whole", "name.jpg", "stem"])
def test_the_subset_is_in_the_order_of_the_list_over_all_sources(listings, form):
    everything = [n.decode() for listing in listings for n in listing.names]
    wanted = everything[::-3]
    asked = {
        "whole": wanted,
        "name.jpg": [f"elsewhere/{n.split('/')[1]}" for n in wanted],
        "stem": [n.split("/")[1].removesuffix(".jpg") for n in wanted],
    }[form]
    assert _kept(listings, asked) == wanted
    assert _kept(listings, asked, count=4) == wanted[:4]


def test_names_that_are_missing_doubtful_or_told_twice_are_left_out(tmp_path, caplog):
    content = {"a/1.jpg": b"1", "b/1.jpg": b"2", "c/2.jpg": b"3", "c/3.jpg": b"4"}
    listings = list_sources([str(write_folder(tmp_path / "s", content))])
    wanted = ["3", "c/2.jpg", "1", "nobody", "c/3.jpg", "b/1.jpg"]
    assert _kept(listings, wanted) == ["c/3.jpg", "c/2.jpg", "b/1.jpg"]
    assert "2 of the 6 names of --keep-list are not in --source, e.g. 1" in caplog.text


def test_a_list_of_another_data_set_is_refused(listings):
    with pytest.raises(ConfigError, match="none of the 2 names of --keep-list"):
        _kept(listings, ["0001_c1.jpg", "0002_c1.jpg"])


@pytest.mark.parametrize("form", ["text", "windows", "pickle", "pickle 0", "array"])
def test_text_and_pickled_lists_give_the_same_names(tmp_path, form):
    wanted = [*names(5), "Ü x.jpg"]
    text = "\n".join(["", *wanted, " "])
    (tmp_path / "list").write_bytes(
        {
            "text": text.encode(),
            "windows": text.replace("\n", "\r\n").encode(),
            "pickle": pickle.dumps(wanted),
            "pickle 0": pickle.dumps(wanted, 0),
            "array": pickle.dumps(__import__("numpy").array(wanted)),
        }[form]
    )
    found = read_keep_list(str(tmp_path / "list"))
    assert [name.decode() for name in found] == wanted


def test_an_empty_or_missing_list_is_refused(tmp_path):
    (tmp_path / "list").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no name"):
        read_keep_list(str(tmp_path / "list"))
    with pytest.raises(ConfigError, match="No such file"):
        read_keep_list(str(tmp_path / "other"))


def test_keep_first_is_a_count_or_a_fraction():
    assert [count_kept(x, 100) for x in (None, "7", "0.5", "1.0", "1")] == [
        *(100, 7, 50, 100, 1)
    ]
    for wrong in ("0", "101", "1.5", "-1", "0.001", "half", "nan", "inf", "1e3", ""):
        with pytest.raises(ConfigError, match=f"--keep-first={wrong} must be"):
            count_kept(wrong, 100)
