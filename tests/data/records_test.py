"""Promises about where images come from, and about what is said when they do not."""

import io
import json
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from image_files import jpeg, write_folder

from personmae_jax.config import DataConfig, SyntheticConfig
from personmae_jax.data.records import folder_records, open_records
from personmae_jax.errors import ConfigError
from personmae_jax.synthetic import pedestrian


def _write(root, *names):
    write_folder(root, {name: jpeg(number) for number, name in enumerate(names)})


def _open(source, path, split="train"):
    return open_records(DataConfig(source=source, path=str(path), split=split))


def _names(records):
    return [records.name(index) for index in range(len(records))]


def _store(root, features, examples):
    """A tfds data set with a split `train`, in the order given."""
    root.mkdir(exist_ok=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name="people",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(root),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(features),
    )
    writer = tfds.core.SequentialWriter(info, 100, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_all()
    return root


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Five encoded images and their names, as a tfds data set."""
    features = {"image": tfds.features.Image(), "name": tfds.features.Text()}
    examples = [
        {"image": io.BytesIO(jpeg(number)), "name": f"person_{number}"}
        for number in range(5)
    ]
    return _store(tmp_path_factory.mktemp("tfds"), features, examples)


def test_a_folder_is_listed_in_the_order_of_relative_paths(tmp_path):
    _write(tmp_path, "b/1.jpg", "a.png", "b.jpeg", "b/Ü.JPG", "b/0/x.webp", "B/2.tif")
    records = _open("folder", tmp_path)
    names = ["B/2.tif", "a.png", "b.jpeg", "b/0/x.webp", "b/1.jpg", "b/Ü.JPG"]
    assert _names(records) == names
    for index, name in enumerate(names):
        assert records.read(index) == (tmp_path / name).read_bytes()


def test_hidden_files_and_other_suffixes_are_left_out(tmp_path):
    _write(tmp_path, "1.jpg", ".2.jpg", ".git/3.jpg", "notes.txt", "list.jpg/4.png")
    assert _names(_open("folder", tmp_path)) == ["1.jpg", "list.jpg/4.png"]


def test_files_that_are_left_out_are_counted_and_one_is_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        logging, "warning", lambda form, *args: said.append(form % args)
    )
    _write(tmp_path, "1.jpg", ".2.heic")
    os.mkfifo(tmp_path / "pipe.txt")
    _open("folder", tmp_path)
    assert not said
    _write(tmp_path, "sub/3.heic", "sub/4.heic")
    _open("folder", tmp_path)
    assert "left out 2 files beside 1 images" in said[0]
    assert said[0].endswith(("sub/3.heic", "sub/4.heic"))


def test_an_image_needs_no_suffix_and_may_have_a_rare_one(tmp_path):
    names = ["1.JFIF", "2.jpe", "0002", "sub/0003"]
    _write(tmp_path, *names)
    assert _names(_open("folder", tmp_path)) == ["0002", "1.JFIF", "2.jpe", "sub/0003"]


def test_links_are_followed_and_loops_are_harmless(tmp_path):
    _write(tmp_path / "data", "sub/1.jpg")
    _write(tmp_path / "elsewhere", "2.jpg")
    data = tmp_path / "data"
    (data / "loop").symlink_to(data)
    (data / "sub" / "up").symlink_to(data)
    (data / "other").symlink_to(tmp_path / "elsewhere")
    (data / "twice").symlink_to(tmp_path / "elsewhere")
    assert _names(_open("folder", data)) == ["other/2.jpg", "sub/1.jpg"]


def test_a_dangling_link_is_a_record_that_cannot_be_read(tmp_path):
    _write(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "3.jpg")  # reading it would wait for ever
    records = _open("folder", tmp_path)
    assert _names(records) == ["1.jpg", "2.jpg"]
    with pytest.raises(OSError, match=r"2\.jpg"):
        records.read(1)


def test_a_file_that_comes_in_pieces_is_read_to_its_end(tmp_path, monkeypatch):
    _write(tmp_path, "a.jpg")
    records, read = _open("folder", tmp_path), os.read
    monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 100)))
    assert records.read(0) == jpeg(0)
    file_size = os.path.getsize(tmp_path / "a.jpg")
    monkeypatch.setattr(os, "read", lambda file, size: b"")  # it has been cut
    assert file_size > 100
    assert records.read(0) == b""


def test_a_name_that_is_not_unicode_can_be_read_and_said(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(jpeg(0))
    records = _open("folder", tmp_path)
    assert records.name(0) == r"\xff.jpg"
    assert records.read(0) == jpeg(0)


def test_tfds_gives_encoded_bytes_and_names_in_order(people):
    records = _open("tfds", people)
    assert [records.read(index) for index in range(5)] == [jpeg(i) for i in range(5)]
    assert _names(records) == [f"person_{index}" for index in range(5)]
    assert len(_open("tfds", people, "train[:2]")) == 2


def test_tfds_without_names_says_split_and_index(tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    path = _store(tmp_path, features, [{"image": io.BytesIO(jpeg(0)), "label": 7}])
    assert _names(_open("tfds", path)) == ["train[0]"]


def test_a_damaged_tfds_record_is_an_oserror_and_the_others_stay(people, tmp_path):
    for file in people.iterdir():
        content = file.read_bytes()
        if "array_record" in file.name:
            content = content[:100] + bytes(100) + content[200:]
        (tmp_path / file.name).write_bytes(content)
    records = _open("tfds", tmp_path)
    with pytest.raises(OSError, match=r"train\[0\]"):
        records.read(0)
    assert records.name(0) == "train[0]"
    assert records.read(1) == jpeg(1)


def test_other_images_of_the_same_number_have_another_digest(tmp_path):
    for folder, names in (("a", "xy"), ("b", "xz"), ("c", "xy")):
        for name in names:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.jpg").touch()
    digests = [folder_records(str(tmp_path / folder)).sha256 for folder in "abc"]
    assert digests[0] == digests[2] != digests[1]


def test_a_prepared_set_is_no_folder_of_images(tmp_path):
    (tmp_path / "dataset_info.json").touch()
    cfg = DataConfig(source="folder", path=str(tmp_path))
    with pytest.raises(ConfigError, match="set --config.data.source=tfds"):
        open_records(cfg)


def test_an_error_without_words_is_told_by_its_kind(people, monkeypatch):
    class Wordless:
        def __getitem__(self, index):
            raise ValueError(" \n")

    records = _open("tfds", people)
    monkeypatch.setattr(records, "_examples", Wordless())
    with pytest.raises(OSError, match=r"train\[3\]: ValueError"):
        records.read(3)


def test_synthetic_records_are_identity_by_camera_by_shot():
    cfg = SyntheticConfig(identities=3, cameras=2, shots=2, first_identity=10, seed=5)
    records = open_records(DataConfig(source="synthetic", synthetic=cfg))
    assert len(records) == 12
    assert records.name(0) == "identity 10 camera 0 shot 0"
    assert records.name(7) == "identity 11 camera 1 shot 1"
    assert records.read(7) == pedestrian.encode_pedestrian(5, 11, 1, 1)


def test_a_synthetic_image_is_rendered_once():
    cfg = SyntheticConfig(identities=3, cameras=2, shots=2, seed=6)
    first, second = (
        open_records(DataConfig(source="synthetic", synthetic=cfg)) for _ in range(2)
    )
    assert first.read(7) is second.read(7)


@pytest.mark.parametrize("source", ["folder", "tfds", "synthetic"])
def test_records_survive_pickling(source, people, tmp_path):
    _write(tmp_path, "1.jpg", "sub/2.jpg")
    records = _open(source, people if source == "tfds" else tmp_path)
    copied = pickle.loads(pickle.dumps(records))
    assert _names(copied)[:5] == _names(records)[:5]
    assert copied.read(1) == records.read(1)
    assert len(pickle.dumps(records)) < 1000


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_a_missing_path_says_how_to_get_data(source, tmp_path):
    (tmp_path / "file").write_text("")
    for path, what in (("gone", "does not exist"), ("file", "is not a folder")):
        with pytest.raises(ConfigError, match=what) as caught:
            _open(source, tmp_path / path)
        message = str(caught.value)
        assert "--config.data.path" in message
        assert "python launch/prepare_data.py --source PATH --out DIR" in message
        assert "configs/quickstart.py" in message


def test_a_folder_without_images_says_so(tmp_path):
    _write(tmp_path, "notes.txt", "more.csv")
    with pytest.raises(ConfigError, match=r"holds no image \(2 files"):
        _open("folder", tmp_path)


def test_a_tfds_set_that_says_other_than_its_shards_is_refused(people, tmp_path):
    shutil.copytree(people, tmp_path / "a")
    info = tmp_path / "a" / "dataset_info.json"
    whole = info.read_text()
    info.write_text(whole.replace('"5"', '"3"'))
    with pytest.raises(ConfigError, match=r"holds 5 records where .* says 3"):
        _open("tfds", tmp_path / "a")
    many = json.loads(whole)
    many["splits"][0]["shardLengths"] = ["1"] * 1_000_000
    info.write_text(json.dumps(many))
    with pytest.raises(ConfigError, match="lists 1000000 shards"):
        _open("tfds", tmp_path / "a")


def test_features_json_imports_nothing_but_tfds_itself(people, tmp_path):
    shutil.copytree(people, tmp_path / "a")
    features = tmp_path / "a" / "features.json"
    features.write_text(
        features.read_text().replace("tensorflow_datasets.core.features.text", "this")
    )
    with pytest.raises(ConfigError, match=r"features\.json names 'this_"):
        _open("tfds", tmp_path / "a")
    assert "this_feature" not in sys.modules


def test_features_json_has_no_other_way_to_name_a_module(people, tmp_path):
    """The spelling of protobuf, and JSON inside of a string."""
    shutil.copytree(people, tmp_path / "a")
    features = tmp_path / "a" / "features.json"
    whole = features.read_text()
    for hostile in (
        whole.replace("pythonClassName", "python_class_name", 1),
        json.dumps({"jsonFeature": {"json": json.dumps({"a": {"type": "x.y"}})}}),
    ):
        evil = re.sub(r'(class_name": ")[\w.]+', r"\1evil.X", hostile)
        features.write_text(evil)
        with pytest.raises(ConfigError, match=r"features\.json names '(evil|x\.y)"):
            _open("tfds", tmp_path / "a")


def test_shards_are_counted_however_their_field_is_spelled(people, tmp_path):
    shutil.copytree(people, tmp_path / "a")
    file = tmp_path / "a" / "dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["shard_lengths"] = ["1"] * 200_000
    file.write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="lists 20000[01] shards"):
        _open("tfds", tmp_path / "a")


def test_a_link_to_itself_and_a_pipe_cost_one_image_at_most(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "x.jpg").symlink_to("x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "y.jpg").symlink_to("pipe.jpg")
    records = _open("folder", tmp_path)
    assert _names(records) == ["a.jpg", "x.jpg", "y.jpg"]
    for index in (1, 2):
        with pytest.raises(OSError, match="links|pipe"):
            records.read(index)


def test_what_is_wrong_with_a_tfds_data_set_is_said(people, tmp_path):
    with pytest.raises(ConfigError, match="is not a tfds data set"):
        _open("tfds", tmp_path)
    with pytest.raises(ConfigError, match="'test'.*its splits are train"):
        _open("tfds", people, "test")
    path = _store(tmp_path / "text", {"name": tfds.features.Text()}, [{"name": "a"}])
    with pytest.raises(ConfigError, match="no image feature named `image`.*has name"):
        _open("tfds", path)
