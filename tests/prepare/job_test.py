"""Promises about a prepared data set: what is in it, what is told about the rest."""

import csv
import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from image_files import (
    encoded,
    jpeg,
    members,
    names,
    write_folder,
    write_lmdb,
    write_tar,
    write_zip,
)

from personmae_jax.config import DataConfig
from personmae_jax.data.images import decode
from personmae_jax.data.records import open_records
from personmae_jax.engine import lock
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.prepare import job as prepare_module
from personmae_jax.prepare import manifest
from personmae_jax.prepare.job import prepare
from personmae_jax.prepare.plan import Request, make_plan, read_plan
from personmae_jax.prepare.pool import worker_pool
from personmae_jax.prepare.shard import read_digests, write_shard
from personmae_jax.prepare.sources import open_reader
from personmae_jax.prepare.verify import check, check_shard


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Processes of their own are tested in prepare_launch_test.py."""
    monkeypatch.setattr(prepare_module, "_make_plan", make_plan)
    yield
    open_reader.cache_clear()


def one_by_one(function, folder, plan, shards):
    for shard in shards:
        function(folder, shard)


def run(out, *sources, **settings) -> dict:
    """Prepares the sources; returns the summary."""
    request = Request(source=tuple(map(str, sources)), **settings)
    assert prepare(request, str(out), one_by_one) == 0
    open_reader.cache_clear()
    return json.loads((out / "summary.json").read_text())


def read(out) -> list[tuple[str, bytes]]:
    """(name, stored bytes) of every record."""
    records = open_records(DataConfig(source="tfds", path=str(out)))
    return [(records.name(n), records.read(n)) for n in range(len(records))]


def rejected(out) -> list[list[str]]:
    text = (out / "rejected.csv").read_text()
    return [*csv.reader(io.StringIO(text))][1:]


def shards_of(out) -> dict[str, bytes]:
    """Everything that a preparation leaves, but for the lock and the plan."""
    files = (p for p in out.rglob("*") if p.is_file())
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in files
        if p.name not in ("lock", "plan.json")
    }


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz", "lmdb"])
def test_the_original_bytes_come_back_bit_for_bit_in_order(tmp_path, form):
    content = members(300)
    write = dict(folder=write_folder, zip=write_zip, tar=write_tar, lmdb=write_lmdb)
    if form == "tar.gz":
        source = write_tar(tmp_path / "source", content, True)
    else:
        source = write[form](tmp_path / "source", content)
    summary = run(tmp_path / "out", source)
    assert read(tmp_path / "out") == [*content.items()]
    assert summary["stored"] == summary["kept_bit_for_bit"] == 300
    assert summary["shards"] == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("checks", "dataset_info.json", "features.json", "lock"),
        *(f"persons-train.array_record-{n:05}-of-00003" for n in range(3)),
        *("plan.json", "rejected.csv", "summary.json", "summary.png"),
    ]


def test_the_same_content_gives_the_same_bytes_in_every_form(tmp_path):
    content = members(150)
    run(tmp_path / "a", write_folder(tmp_path / "folder", content))
    run(tmp_path / "b", write_zip(tmp_path / "zip", content))
    run(tmp_path / "c", write_tar(tmp_path / "tar", content, is_compressed=True))
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "c")


def test_tfds_opens_it_without_tensorflow_and_decodes_every_feature(tmp_path):
    content = {
        "0002_c1s1_000451_03.jpg": jpeg(0),
        "-1_c6s4_000001_00.jpg": jpeg(1),
        "x/=1+1.png": encoded("PNG", "L"),
        "00_01_0123_00000007": jpeg(3),
    }
    source = write_folder(tmp_path / "source", content)
    run(tmp_path / "out", source)
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        f"data = tfds.builder_from_directory({str(tmp_path / 'out')!r})\n"
        "for x in data.as_data_source()['train']:\n"
        "    print(x['image'].shape, *map(bytes.decode, (x[k] for k in ('name', "
        "'identity', 'camera', 'video'))), sep='|')\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines() == [
        "(24, 16, 3)|-1_c6s4_000001_00.jpg|-1|6|",
        "(24, 16, 3)|0002_c1s1_000451_03.jpg|0002|1|",
        "(24, 16, 3)|00_01_0123_00000007|||00_01_0123",
        "(24, 16, 3)|x/=1+1.png|||",
    ]


def test_identities_and_videos_of_keys_pkl_are_stored(tmp_path):
    content = {name: jpeg(n) for n, name in enumerate(names(3))}
    keys = {"keys": [*content], "pids": [7, 8, 7], "vids": ["v", "", "w"]}
    run(tmp_path / "out", write_lmdb(tmp_path / "lmdb", content, keys))
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    found = [*builder.as_data_source("train")]
    assert [x["identity"] for x in found] == [b"7", b"8", b"7"]
    # Where the list leaves one empty, the key tells it.
    assert [x["video"] for x in found] == [b"v", b"01_01_0001", b"w"]


NOT_PLAIN = {
    "grey.jpg": encoded("JPEG", "L"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "rotated.jpg": encoded(
        "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    ),
    "named.jpg": encoded("PNG"),
    "alpha.png": encoded("PNG", "RGBA"),
    "deep.png": encoded("PNG", "I;16"),
    "moving.gif": encoded("GIF", "P"),
    "web.webp": encoded("WEBP", lossless=True),
    "map.bmp": encoded("BMP"),
}


def test_what_is_no_plain_colour_jpeg_is_converted_once_to_the_same_pixels(tmp_path):
    content = NOT_PLAIN | {"plain.png": jpeg(0)}  # named so, but a JPEG
    summary = run(tmp_path / "out", write_folder(tmp_path / "source", content))
    for name, stored in read(tmp_path / "out"):
        pixels, outcome = decode(stored, max_pixels=10**6, min_side=1)
        wanted, _ = decode(content[name], max_pixels=10**6, min_side=1)
        np.testing.assert_array_equal(pixels, wanted)
        assert (stored == content[name]) == (name == "plain.png")
        assert outcome == 0  # nothing is left to convert in training
    assert summary["kept_bit_for_bit"] == 1
    assert sum(summary["converted_to_png"].values()) == len(NOT_PLAIN)
    assert summary["converted_to_png"]["CMYK; converted to RGB"] == 1
    # Prepared from what was prepared, nothing is left to convert.
    again = write_folder(tmp_path / "again", dict(read(tmp_path / "out")))
    run(tmp_path / "out2", again)
    assert read(tmp_path / "out2") == read(tmp_path / "out")


def test_what_cannot_be_used_is_in_rejected_csv_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("personmae_jax.prepare.shard.MAX_PIXELS", 1000)
    content = {
        "a.jpg": jpeg(0),
        "cut.jpg": jpeg(1)[:-200],
        "empty.jpg": b"",
        "html.jpg": b"<html>not found</html>",
        "large.jpg": jpeg(2, 40, 30),
        'odd, "name"\n=1.jpg': b"x",
        "=cmd.jpg": b"x",
        "small.jpg": jpeg(3, 24, 15),
    }
    source = write_folder(tmp_path / "source", content)
    (source / "dangling.jpg").symlink_to("nowhere")
    summary = run(tmp_path / "out", source, min_side=16)
    not_one = "not an image, of a format not known, or its header damaged"
    assert rejected(tmp_path / "out") == [
        ["'=cmd.jpg", not_one],
        ["cut.jpg", "truncated"],
        ["dangling.jpg", "No such file or directory"],
        ["empty.jpg", "empty"],
        ["html.jpg", not_one],
        ["large.jpg", "more than 1000 pixels"],
        ['odd, "name"\n=1.jpg', not_one],
        ["small.jpg", "a side under --min-side=16"],
    ]
    assert [name for name, _ in read(tmp_path / "out")] == ["a.jpg"]
    assert summary["rejected"] == 8
    assert summary["in_source"] == 9


def test_a_shard_of_rejects_alone_does_no_harm(tmp_path):
    content = {f"a{n:03}.jpg": b"x" for n in range(128)} | members(140)
    run(tmp_path / "out", write_folder(tmp_path / "source", content))
    assert read(tmp_path / "out") == [*members(140).items()]
    one_by_one(check_shard, str(tmp_path / "out"), None, range(3))


def test_without_one_good_image_it_fails_and_says_where_to_look(tmp_path):
    source = write_folder(tmp_path / "source", {"a.jpg": b"x"})
    with pytest.raises(RunError, match=r"no image could be used; see .*rejected\.csv"):
        run(tmp_path / "out", source)
    assert not (tmp_path / "out" / "dataset_info.json").exists()


@pytest.mark.parametrize("is_dropped", [False, True])
def test_exact_copies_are_counted_over_all_shards_and_sources(tmp_path, is_dropped):
    first, second = members(130), {f"z{n}": jpeg(n) for n in (5, 200, 5)}
    second |= {"bad1": b"x", "bad2": b"x", "zz": jpeg(200)}
    sources = (
        write_folder(tmp_path / "a", first),
        write_zip(tmp_path / "b.zip", second),
    )
    summary = run(tmp_path / "out", *sources, drop_duplicates=is_dropped)
    assert summary["exact_copies"] == 2
    assert summary["rejected"] == 2
    assert summary["exact_copies_dropped"] == 2 * is_dropped
    found = [name for name, _ in read(tmp_path / "out")]
    dropped = ["z5", "zz"] if is_dropped else []
    everything = [*first, *(n for n in second if not n.startswith("bad"))]
    assert found == [name for name in everything if name not in dropped]
    copies = [n for n, reason in rejected(tmp_path / "out") if "exact copy" in reason]
    assert copies == dropped


def test_what_could_not_be_read_at_first_is_no_copy(tmp_path):
    source = write_folder(tmp_path / "a", members(9))
    hidden = {path: path.with_suffix(".away") for path in sorted(source.iterdir())[3:6]}

    def losing(function, folder, plan, shards):
        for path, away in hidden.items() if function is read_digests else ():
            path.rename(away)
        one_by_one(function, folder, plan, shards)
        for path, away in hidden.items() if function is read_digests else ():
            away.rename(path)

    request = Request(source=(str(source),), drop_duplicates=True)
    assert prepare(request, str(tmp_path / "out"), losing) == 0
    assert rejected(tmp_path / "out") == []
    assert len(read(tmp_path / "out")) == 9


def test_a_keep_list_gives_its_first_names_in_its_order(tmp_path):
    content = members(200)
    wanted = [*content][::-1]
    (tmp_path / "list.txt").write_text("\n".join(wanted))
    summary = run(
        tmp_path / "out",
        write_tar(tmp_path / "a.tar.gz", content, is_compressed=True),
        keep_list=str(tmp_path / "list.txt"),
        keep_first="0.75",
    )
    assert [name for name, _ in read(tmp_path / "out")] == wanted[:150]
    assert (summary["in_source"], summary["wanted"]) == (200, 150)


def test_mean_and_std_are_those_of_all_pixels(tmp_path):
    content = {f"{n}.jpg": jpeg(n, 10 + n, 30 - n) for n in range(9)} | NOT_PLAIN
    summary = run(tmp_path / "out", write_folder(tmp_path / "source", content))
    pixels = np.concatenate(
        [
            decode(data, max_pixels=10**6, min_side=1)[0].reshape(-1, 3) / 255
            for data in content.values()
        ]
    )
    np.testing.assert_allclose(summary["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(summary["std"], pixels.std(0), rtol=1e-9)
    assert summary["height"] == {"min": 10, "median": 17, "max": 24}
    picture = cv2.imread(str(tmp_path / "out" / "summary.png"))
    assert picture.shape == (320, 480, 3)
    assert (picture != 255).any()


def test_started_again_anywhere_it_ends_with_the_same_bytes(tmp_path):
    content = members(400) | {"bad.jpg": b"x", "copy.jpg": jpeg(3)} | NOT_PLAIN
    source = write_zip(tmp_path / "a.zip", content)
    run(tmp_path / "whole", source, drop_duplicates=True)
    wanted = shards_of(tmp_path / "whole")

    class Stop(Exception):
        pass

    for number in range(9):
        calls = iter(range(number))

        def stopping(function, folder, plan, shards, calls=calls):
            for shard in reversed(shards):
                if next(calls, None) is None:
                    raise Stop
                function(folder, shard)

        out = tmp_path / f"out{number}"
        request = Request(source=(str(source),), drop_duplicates=True)
        try:
            prepare(request, str(out), stopping)
        except Stop:
            assert not (out / "dataset_info.json").exists()
        (out / "persons-train.array_record-00001-of-00004.x.part").write_bytes(b"torn")
        run(out, source, drop_duplicates=True)
        (out / "persons-train.array_record-00001-of-00004.x.part").unlink(True)
        assert shards_of(out) == wanted


def test_an_archive_that_was_replaced_meanwhile_is_refused(tmp_path):
    """The places of its members would be those of the former one."""
    (tmp_path / "in").mkdir()
    write_zip(tmp_path / "in" / "a.zip", members(200))
    write_zip(tmp_path / "in" / "b.zip", {"z.jpg": jpeg(7)})
    request = Request(source=(str(tmp_path / "in"),))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        prepare(request, str(tmp_path / "out"), stop)
    former = (tmp_path / "in" / "a.zip").read_bytes()
    write_zip(tmp_path / "in" / "a.zip", members(200), zipfile.ZIP_STORED)
    with pytest.raises(ConfigError, match="archive of --source is another one than wh"):
        run(tmp_path / "out", tmp_path / "in")
    (tmp_path / "in" / "a.zip").write_bytes(former)
    run(tmp_path / "out", tmp_path / "in")
    assert len(read(tmp_path / "out")) == 201


@pytest.mark.parametrize("how", ["gone", "unmounted", "disk"])
def test_a_folder_that_is_gone_stops_and_rejects_nothing(tmp_path, monkeypatch, how):
    source = write_folder(tmp_path / "source", members(300))
    away, out = tmp_path / "away", tmp_path / "out"

    def stopping(function, folder, plan, shards):
        function(folder, 0)
        if how == "disk":
            monkeypatch.setattr("personmae_jax.foreign_files.read_file", failing)
        else:
            source.rename(away)
        if how == "unmounted":
            source.mkdir()
        function(folder, 1)

    def failing(*_):
        raise OSError(5, "Input/output error")

    request = Request(source=(str(source),))
    with pytest.raises(RunError, match="source cannot be read any more .*bring it"):
        prepare(request, str(out), stopping)
    assert not (out / "dataset_info.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(prepare_module, "_make_plan", make_plan)
    if how != "disk":
        if how == "unmounted":
            source.rmdir()
        away.rename(source)
    assert run(out, source)["stored"] == 300


def test_an_image_that_was_taken_away_is_rejected_alone(tmp_path):
    source, out = write_folder(tmp_path / "source", members(300)), tmp_path / "out"

    def removing(function, folder, plan, shards):
        next(iter(sorted(source.rglob("*.jpg")))).unlink()
        one_by_one(function, folder, plan, shards)

    assert prepare(Request(source=(str(source),)), str(out), removing) == 0
    with open(out / "rejected.csv") as file:
        assert len([*csv.reader(file)]) == 2  # with its head


def test_a_task_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    source, out = write_folder(tmp_path / "source", members(3)), tmp_path / "out"

    def killed(file, **_):
        file.write(b"PK torn")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(Request(source=(str(source),)), str(out), one_by_one)
    assert not [*out.glob("tasks/*.npz")]


def test_a_finished_one_says_so_even_when_its_source_is_gone(tmp_path, capsys):
    source = write_zip(tmp_path / "a.zip", members(3))
    run(tmp_path / "out", source)
    before = shards_of(tmp_path / "out")
    source.unlink()
    run(tmp_path / "out", source)
    assert "is finished already" in capsys.readouterr().out
    assert shards_of(tmp_path / "out") == before


def test_what_a_preparation_that_was_killed_late_left_goes_with_the_next_start(
    tmp_path, monkeypatch, capsys
):
    """Killed after the data set was whole, before its tasks were removed."""
    source, out = write_folder(tmp_path / "in", members(9)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "remove_tasks", lambda folder: None)
        run(out, source)
    before = {name for name in shards_of(out) if "task" not in name}
    unique = f"{0:032x}.part"
    for part in (
        *("tasks/00000.npz.part", f"tasks/00000.digests.{unique}", "plan.json.part"),
        f"persons-train.array_record-00000-of-00001.{unique}",
        f"checks/00000.npz.{unique}",
    ):
        (out / part).touch()
    capsys.readouterr()
    run(out, source)
    assert "finished already" not in capsys.readouterr().out
    assert {*shards_of(out)} == before
    run(out, source)
    assert "finished already" in capsys.readouterr().out


def test_what_another_did_before_the_lock_was_taken_is_seen(tmp_path, monkeypatch):
    """Two start at once in an empty folder: the second must not mix its own plan in."""
    sources = [write_folder(tmp_path / name, members(9)) for name in ("a", "b")]
    out, locked = tmp_path / "out", prepare_module._lock

    def other_first(folder):
        monkeypatch.setattr(prepare_module, "_lock", locked)
        run(out, sources[0])
        return locked(folder)

    monkeypatch.setattr(prepare_module, "_lock", other_first)
    with pytest.raises(ConfigError, match="holds a preparation with other settings"):
        run(out, sources[1])


@pytest.mark.parametrize(
    "content", ["[", "[]", '{"a": {"b": "c"}}', '{"a": [[]]}', '{"a": null}']
)
def test_a_damaged_summary_is_told_in_a_sentence(tmp_path, capsys, content):
    source, out = write_folder(tmp_path / "in", members(3)), tmp_path / "out"
    run(out, source)
    (out / "summary.json").write_text(content)
    prepare(Request(source=(str(source),)), str(out), one_by_one)
    assert "summary.json is damaged; --check=" in capsys.readouterr().out


def test_a_folder_of_another_preparation_is_refused_naming_the_difference(tmp_path):
    source = write_zip(tmp_path / "a.zip", members(3))
    other = write_zip(tmp_path / "b.zip", members(4))
    (tmp_path / "list.txt").write_text("\n".join(members(3)))
    run(tmp_path / "out", source)
    for settings, words in (
        ({"min_side": 9}, "--min-side was 8, now 9"),
        ({"drop_duplicates": True}, "--drop-duplicates was False, now True"),
        ({"keep_list": str(tmp_path / "list.txt")}, "--keep-list was None"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(tmp_path / "out", source, **settings)
    with pytest.raises(ConfigError, match=r"--source was .*a\.zip.*now .*b\.zip"):
        run(tmp_path / "out", other)


def test_a_source_that_grew_since_the_first_start_is_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", members(3))
    out = tmp_path / "out"
    out.mkdir()
    make_plan(prepare_module.epath.Path(out), Request(source=(str(source),)))
    write_zip(source, members(4))
    with pytest.raises(ConfigError, match="--source-bytes was"):
        run(out, source)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_first": "3"}, "--keep-first needs the --keep-list"),
        ({"min_side": 0}, "--min-side=0 must be at least 1"),
        ({"keep_list": "/nowhere"}, "--keep-list=/nowhere: No such file"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(tmp_path, settings, words):
    source = write_zip(tmp_path / "a.zip", members(3))
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "out", source, **settings)
    assert not (tmp_path / "out").exists()


def test_a_file_or_a_folder_with_other_files_is_refused(tmp_path):
    source = write_folder(tmp_path / "a", members(3))
    with pytest.raises(ConfigError, match="holds other files, e.g. a"):
        run(tmp_path, source)
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path / "a" / min(members(3)), source)


@pytest.mark.parametrize("name", ["tasks/thesis.txt", "tasks", "lock"])
@pytest.mark.parametrize("content", ["mine", "[1]", '{"host": 1}'])
def test_a_folder_with_tasks_or_a_lock_of_somebody_else_is_refused(
    tmp_path, name, content
):
    source, out = write_folder(tmp_path / "a", members(3)), tmp_path / "out"
    write_folder(out, {name: content.encode(), "lock": b""} | {name: content.encode()})
    with pytest.raises(ConfigError, match="holds other files, e.g. (tasks|lock)"):
        run(out, source)
    assert (out / name).read_text() == content


def test_what_a_start_that_was_killed_while_listing_left_is_no_obstacle(tmp_path):
    source, out = write_folder(tmp_path / "a", members(3)), tmp_path / "out"
    left = {"tasks/00000.npz": b"", "tasks/00001.npz.part": b"PK"}
    write_folder(out, left | {"lock": json.dumps(lock._identity()).encode()})
    assert run(out, source)["stored"] == 3
    assert not (out / "tasks").exists()


def test_files_of_somebody_else_in_a_data_set_stay(tmp_path, capsys):
    source, out = write_folder(tmp_path / "a", members(3)), tmp_path / "out"
    run(out, source)
    theirs = {"download.part": b"1", "tasks/thesis.txt": b"2", "more/a.part": b"3"}
    write_folder(out, theirs)
    run(out, source)
    assert "is finished already" in capsys.readouterr().out
    (out / "dataset_info.json").unlink()
    run(out, source)
    assert {name: (out / name).read_bytes() for name in theirs} == theirs
    assert [p.name for p in (out / "tasks").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("suffix", ["digests", "npz"])
@pytest.mark.parametrize("size", [0, 100, 16 * 128 + 16])
def test_what_a_power_cut_left_of_a_task_is_made_anew(tmp_path, suffix, size):
    source = write_folder(tmp_path / "a", members(260) | {"z.jpg": jpeg(5)})
    run(tmp_path / "whole", source, drop_duplicates=True)

    def stopping(function, folder, plan, shards):
        one_by_one(function, folder, plan, shards)
        if function is write_shard:
            (out / "dataset_info.json").unlink(missing_ok=True)
            raise RunError("stopped")

    out = tmp_path / "out"
    request = Request(source=(str(source),), drop_duplicates=True)
    with pytest.raises(RunError, match="stopped"):
        prepare(request, str(out), stopping)
    for file in out.glob("persons-*"):
        file.unlink()
    file = out / "tasks" / f"00001.{suffix}"
    file.write_bytes(file.read_bytes()[:size].ljust(size, b"x"))
    run(out, source, drop_duplicates=True)
    assert shards_of(out) == shards_of(tmp_path / "whole")


def test_a_worker_without_its_task_says_how_to_go_on(tmp_path):
    source = write_folder(tmp_path / "source", members(3))
    make_plan(epath.Path(tmp_path), Request(source=(str(source),)))
    (tmp_path / "tasks" / "00000.npz").write_bytes(b"")
    with pytest.raises(RunError, match="is missing or damaged; start again with the"):
        write_shard(str(tmp_path), 0)


def test_a_full_disk_is_told_and_the_finished_shards_stay_good(tmp_path, monkeypatch):
    content = members(400)
    source = write_folder(tmp_path / "source", content)
    run(tmp_path / "whole", source)

    def full(*_):
        raise OSError(28, "No space left on device")

    def stopping(function, folder, plan, shards):
        function(folder, 2)
        monkeypatch.setattr("personmae_jax.prepare.manifest.write_checks", full)
        function(folder, 1)

    request = Request(source=(str(source),))
    with pytest.raises(RunError, match="No space left.*fix the cause and start again"):
        prepare(request, str(tmp_path / "out"), stopping)
    monkeypatch.undo()
    names_there = {p.name for p in (tmp_path / "out").glob("persons-*")}
    assert names_there == {"persons-train.array_record-00002-of-00004"}
    assert check_shard(str(tmp_path / "out"), 2) == ""
    monkeypatch.setattr(prepare_module, "_make_plan", make_plan)
    run(tmp_path / "out", source)
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")


def test_check_names_damaged_shards_and_records(tmp_path):
    out = tmp_path / "out"
    run(out, write_folder(tmp_path / "source", members(260)))
    assert [check_shard(str(out), shard) for shard in range(3)] == ["", "", ""]
    file = out / "persons-train.array_record-00001-of-00003"
    whole = file.read_bytes()
    for name, stored in read(out)[128 + 7 : 128 + 8]:
        place = whole.index(stored) + len(stored) // 2
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        assert check_shard(str(out), 1) == f"{file.name}: damaged records 7", name
    file.write_bytes(whole[:-5000])
    assert f"{file.name}: 0 records instead of 128" == check_shard(str(out), 1)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 20):
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        assert file.name in check_shard(str(out), 1)
    file.unlink()
    assert check_shard(str(out), 1) == f"{file.name}: No such file or directory"
    checks = out / "checks" / "00002.npz"
    checks.write_bytes(checks.read_bytes()[:-100])
    assert "00002.npz is missing or damaged; preparing again" in check_shard(
        str(out), 2
    )


@pytest.mark.parametrize("drop", [False, True])
def test_the_advice_of_check_mends_a_data_set(tmp_path, drop):
    source = write_folder(tmp_path / "source", members(260))
    out = tmp_path / "out"
    run(out, source, drop_duplicates=drop)
    before = shards_of(out)
    file = out / "persons-train.array_record-00001-of-00003"
    for lost in (file, None):  # the summary alone, too
        if lost:
            lost.write_bytes(lost.read_bytes()[:-50])
            with pytest.raises(RunError, match="remove them and .*dataset_info.json"):
                check(str(out), num_processes=1)
            lost.unlink()
        (out / "dataset_info.json").unlink()
        run(out, source, drop_duplicates=drop)
        assert shards_of(out) == before
    (out / "dataset_info.json").unlink()
    some = sorted(source.rglob("*.jpg"))[0]
    some.rename(some.with_name("renamed.jpg"))
    with pytest.raises(ConfigError, match="images of other names than when .*name a"):
        run(out, source, drop_duplicates=drop)
    (source / "new.jpg").write_bytes(jpeg(1000))
    with pytest.raises(ConfigError, match="261 images, and 260 when .*name a new"):
        run(out, source, drop_duplicates=drop)


@pytest.mark.parametrize("is_there", [False, True])
def test_the_advice_of_check_mends_damaged_checks(tmp_path, is_there):
    source, out = write_folder(tmp_path / "source", members(260)), tmp_path / "out"
    run(out, source)
    before = shards_of(out)
    file = out / "checks" / "00001.npz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(RunError, match="1 of 3 shards are damaged; remove them and"):
        check(str(out), num_processes=1)
    file.unlink()
    if is_there:
        file.write_bytes(b"")
    (out / "dataset_info.json").unlink()
    run(out, source)
    assert shards_of(out) == before


def test_checks_of_another_form_are_damaged_and_pickles_never_advised(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("personmae_jax.foreign_files.MAX_TEXT", 10_000)
    path, rows = epath.Path(tmp_path), np.zeros(3, manifest.ROW)

    def reading(num_rows=3, **changes):
        checks = manifest.Checks(rows, [], np.zeros((2, 3), np.uint64), 0, "")
        manifest.write_checks(path, 0, dataclasses.replace(checks, **changes))
        return manifest.read_checks(path, 0, num_rows)

    assert len(reading().rows) == 3
    for changes in (
        {"num_rows": 4},
        {"rows": np.zeros(3)},
        {"rows": np.array([None] * 3)},
        {"sums": np.zeros(2000)},
    ):
        with pytest.raises(RunError, match="missing or damaged") as error:
            reading(**changes)
        assert "pickle" not in str(error.value)


def test_a_finished_shard_is_not_written_again(tmp_path):
    out = tmp_path / "out"
    run(out, write_folder(tmp_path / "source", members(3)))
    make_plan(
        prepare_module.epath.Path(out), Request(source=(str(tmp_path / "source"),))
    )
    file = out / "persons-train.array_record-00000-of-00001"
    before = file.stat().st_mtime_ns
    write_shard(str(out), 0)
    assert file.stat().st_mtime_ns == before


def test_a_finished_data_set_whose_plan_is_damaged_is_not_thrown_away(tmp_path):
    source, out = write_folder(tmp_path / "source", members(3)), tmp_path / "out"
    run(out, source)
    (out / "plan.json").write_text("")
    for start in (lambda: run(out, source), lambda: check(str(out))):
        with pytest.raises(ConfigError, match="damaged; the data .* can be trained on"):
            start()
    (out / "dataset_info.json").unlink()
    with pytest.raises(ConfigError, match="damaged; move .*out aside and start again"):
        run(out, source)


def test_a_plan_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "plan.json").symlink_to(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="may well be whole: fix the access"):
        read_plan(epath.Path(tmp_path))
    (tmp_path / "file").touch()
    assert read_plan(epath.Path(tmp_path / "file" / "out")) is None


@pytest.mark.parametrize(
    ("listed", "wanted", "shards"), [(2**31, 2**31, 2**18), (3, 4, 1), (3, 3, 2)]
)
def test_a_plan_whose_numbers_cannot_be_is_damaged(tmp_path, listed, wanted, shards):
    source = write_folder(tmp_path / "source", members(3))
    make_plan(epath.Path(tmp_path), Request(source=(str(source),)))
    file = tmp_path / "plan.json"
    numbers = {"num_listed": listed, "num_members": wanted, "num_shards": shards}
    file.write_text(json.dumps(json.loads(file.read_text()) | numbers))
    with pytest.raises(ConfigError, match="plan.json is damaged; move .* aside and"):
        read_plan(epath.Path(tmp_path))


def test_what_a_worker_process_tells_moves_no_cursor(capfd):
    with worker_pool(1) as pool:
        pool.submit(logging.warning, "%s", "a\x1b[31m.jpg").result()
    assert "a\\x1b[31m.jpg" in capfd.readouterr().err
