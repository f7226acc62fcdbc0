"""Promises about who is in which image, and about what is refused in one sentence."""

import pickle

import numpy as np
import pytest

from personmae_jax.config import SyntheticConfig
from personmae_jax.data.records import Records
from personmae_jax.errors import ConfigError
from personmae_jax.reid.dataset_layouts import LAYOUTS
from personmae_jax.reid.datasets import (
    JUNK,
    check_training,
    open_dataset,
    synthetic_dataset,
)
from personmae_jax.synthetic.pedestrian import encode_pedestrian


def _write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def _part(dataset, part):
    """(path, identity, camera) of the images of one part."""
    return [
        (dataset.records.name(int(i)), dataset.identities[i], dataset.cameras[i])
        for i in getattr(dataset, part)
    ]


_MARKET = (
    "query/0003_c1s1_000451_00.jpg",
    "query/0003_c12s3_2.JPG",
    "query/Thumbs.db",
    "bounding_box_test/-1_c2s1_1_00.jpg",
    "bounding_box_test/0000_c1s1_1_00.jpg",
    "bounding_box_test/0003_c2s1_000451_01.jpg",
    "bounding_box_test/.0003_c2s1_000451_01.jpg",
)
_MARKET_TRAIN = (
    "bounding_box_train/-1_c1s1_1_00.jpg",
    "bounding_box_train/0002_c1s1_1_00.jpg",
    "bounding_box_train/0002_c2s1_1_00.jpg",
    "bounding_box_train/0007_c1_f0046182.jpg",
    "bounding_box_train/0007_c2_f0046182.jpg",
    "gt_bbox/0001_c1s1_001051_00.jpg",
)


def test_market1501_names_tell_identity_and_camera(tmp_path):
    dataset = open_dataset("market1501", _write(tmp_path, *_MARKET, *_MARKET_TRAIN))
    assert _part(dataset, "query") == [
        ("query/0003_c12s3_2.JPG", 3, 12),
        ("query/0003_c1s1_000451_00.jpg", 3, 1),
    ]
    assert _part(dataset, "gallery") == [  # junk and distractors are kept
        ("bounding_box_test/-1_c2s1_1_00.jpg", JUNK, 2),
        ("bounding_box_test/0000_c1s1_1_00.jpg", 0, 1),
        ("bounding_box_test/0003_c2s1_000451_01.jpg", 3, 2),
    ]
    assert [identity for _, identity, _ in _part(dataset, "train")] == [2, 2, 7, 7]
    check_training(dataset)


def test_market1501_is_evaluated_without_its_training_images(tmp_path):
    dataset = open_dataset("market1501", _write(tmp_path, *_MARKET))
    assert not len(dataset.train)
    with pytest.raises(ConfigError, match="no images to train on"):
        check_training(dataset)


def test_records_are_read_by_index_also_after_pickling(tmp_path):
    records = open_dataset("market1501", _write(tmp_path, *_MARKET)).records
    assert isinstance(records, Records)
    for index, name in enumerate(map(records.name, range(len(records)))):
        assert pickle.loads(pickle.dumps(records)).read(index) == name.encode()


def _write_msmt17(root, folders=("train", "test"), **lists):
    lists = {
        "train": "0000/0000_000_01_0303morning_0008_0.jpg 0\n",
        "val": "0000/0000_001_15_0303morning_0009_0.jpg 0\n",
        "query": "0000/0000_000_02_0303morning_0008_0.jpg 0\n\n",
        "gallery": "0000/0000_001_03_0303morning_0008_0.jpg 0\n"
        "0001/0001_001_03_0303morning_0008_0.jpg 1\n",
    } | lists
    for name, text in lists.items():
        folder = folders[0] if name in ("train", "val") else folders[1]
        paths = [line.split()[0] for line in text.splitlines() if line]
        _write(root, *(f"{folder}/{path}" for path in paths))
        (root / f"list_{name}.txt").write_text(text)
    return str(root)


@pytest.mark.parametrize(
    "folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")]
)
def test_msmt17_lists_tell_identities_and_names_cameras(tmp_path, folders):
    dataset = open_dataset("msmt17", _write_msmt17(tmp_path, folders))
    (query,) = _part(dataset, "query")
    assert query == (f"{folders[1]}/0000/0000_000_02_0303morning_0008_0.jpg", 0, 2)
    assert [place[1:] for place in _part(dataset, "gallery")] == [(0, 3), (1, 3)]
    assert [place[1:] for place in _part(dataset, "train")] == [(0, 1), (0, 15)]
    assert dataset.records.read(0) == query[0].encode()


def test_msmt17_with_images_missing_is_refused(tmp_path):
    root = _write_msmt17(tmp_path)
    lost = "test/0001/0001_001_03_0303morning_0008_0.jpg"
    (tmp_path / lost).unlink()
    with pytest.raises(ConfigError, match=f"lists 1 images.* {lost}.*unpack"):
        open_dataset("msmt17", root)


@pytest.mark.parametrize(
    "line",
    [
        "0000/0000_000_02_a.jpg",
        "0000/0000_000_02_a.jpg -1",
        "a " + "1" * 20,
        "../a 0",
        "/a 0",
    ],
)
def test_msmt17_with_a_line_that_is_none_of_its_is_refused(tmp_path, line):
    root = _write_msmt17(tmp_path)
    (tmp_path / "list_gallery.txt").write_text(line)
    with pytest.raises(ConfigError, match="list_gallery.txt' has the line"):
        open_dataset("msmt17", root)


_FOLDERS = ("004/01_1.png", "004/02_1.png", "012/02_7.png", "012/03_1.png")


def test_id_folders_take_the_lowest_camera_for_the_query(tmp_path):
    dataset = open_dataset("id_folders", _write(tmp_path, *_FOLDERS, "readme.txt"))
    assert _part(dataset, "query") == [("004/01_1.png", 0, 1)]
    assert [place[1:] for place in _part(dataset, "gallery")] == [
        (0, 2),
        (1, 2),
        (1, 3),
    ]
    assert not len(dataset.train)


def test_id_folders_take_the_camera_that_is_named_for_the_query(tmp_path):
    root = _write(tmp_path, *_FOLDERS)
    dataset = open_dataset("id_folders", root, query_camera=2)
    assert [place[1:] for place in _part(dataset, "query")] == [(0, 2), (1, 2)]
    assert [place[1:] for place in _part(dataset, "gallery")] == [(0, 1), (1, 3)]
    with pytest.raises(ConfigError, match="query camera 7; its cameras are 1, 2, 3"):
        open_dataset("id_folders", root, query_camera=7)


def test_a_market1501_is_not_scored_as_folders_of_three_people(tmp_path):
    parts = ("query", "bounding_box_test", "bounding_box_train")
    root = _write(tmp_path, *(f"{part}/0001_c1s1_1_00.jpg" for part in parts))
    with pytest.raises(ConfigError, match="is market1501: its folders are no id"):
        open_dataset("id_folders", root)


def test_id_folders_in_train_and_val_are_trained_and_tested_on(tmp_path):
    _write(tmp_path / "val", *_FOLDERS)
    _write(tmp_path / "train", *(f"1{name}" for name in _FOLDERS))
    dataset = open_dataset("id_folders", str(tmp_path))
    assert _part(dataset, "query") == [("val/004/01_1.png", 0, 1)]
    assert len(dataset.gallery) == 3
    assert [place[0] for place in _part(dataset, "train")] == [
        f"train/1{name}" for name in _FOLDERS
    ]
    check_training(dataset)


_PAIR = ("occluded_body_images", "whole_body_images")


def test_occluded_reid_seeks_the_whole_by_the_occluded(tmp_path):
    names = [
        f"{f}/{i}/{i}_0{n}.tif" for f in _PAIR for i in ("007", "012") for n in "12"
    ]
    dataset = open_dataset("occluded_whole", _write(tmp_path, *names))
    assert _part(dataset, "query") == [
        (name, number, 0) for name, number in zip(names, (0, 0, 1, 1), strict=False)
    ]
    assert [place[1:] for place in _part(dataset, "gallery")] == [
        *((0, 1), (0, 1), (1, 1), (1, 1))
    ]
    assert not len(dataset.train)


def test_partial_reid_is_flat_and_its_queries_are_the_partial(tmp_path):
    names = [
        f"{f}/00{i}_001.jpg" for f in ("partial_body_images", *_PAIR) for i in "12"
    ]
    dataset = open_dataset("occluded_whole", _write(tmp_path, *names))
    assert _part(dataset, "query") == [(names[0], 0, 0), (names[1], 1, 0)]
    assert _part(dataset, "gallery") == [(names[4], 0, 1), (names[5], 1, 1)]


def test_p_duke_trains_on_both_kinds_of_its_training_people(tmp_path):
    names = [
        f"{part}/{f}/{i}/c1_f{i}.jpg"
        for part in ("test", "train")
        for f in _PAIR
        for i in ((1, 2) if part == "test" else (1, 9))
    ]
    dataset = open_dataset("occluded_whole", _write(tmp_path, *names))
    assert [place[0] for place in _part(dataset, "train")] == names[4:]
    assert [place[1:] for place in _part(dataset, "train")] == [
        *((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    assert [place[0] for place in _part(dataset, "query")] == names[:2]
    check_training(dataset)


@pytest.mark.parametrize(
    ("layout", "names", "hint"),
    [
        ("market1501", ("detected/query/a", "labeled/bounding_box_test/a",
          "labeled/query/a", "detected/bounding_box_test/a"),
         "take its subfolder detected or labeled"),
        ("msmt17", ("MSMT17_V2/MSMT17_V2/list_train.txt",),
         "take its subfolder MSMT17_V2/MSMT17_V2"),
        ("market1501", ("list_query.txt", "list_gallery.txt"), "it looks like msmt17"),
        ("msmt17", ("train/0001/a.jpg", "test/0001/a.jpg"),
         "list_val.txt .both are trained on., which are part of the release"),
    ],
)  # fmt: skip
def test_a_folder_above_or_beside_the_data_set_gets_a_hint(
    tmp_path, layout, names, hint
):
    with pytest.raises(ConfigError, match=hint):
        open_dataset(layout, _write(tmp_path, *names))


def test_training_images_alone_are_opened_where_nobody_is_sought(tmp_path):
    root = _write(tmp_path, *_MARKET_TRAIN)
    dataset = open_dataset("market1501", root, is_scored=False)
    assert len(dataset.train) == 4
    with pytest.raises(ConfigError, match="has no query image"):
        open_dataset("market1501", root)


def test_synthetic_identities_are_trained_on_or_tested_on():
    cfg = SyntheticConfig(identities=5, cameras=3, shots=2, first_identity=70, seed=4)
    dataset = synthetic_dataset(cfg, num_train=2)
    assert set(dataset.identities[dataset.train]) == {70, 71}
    assert set(dataset.identities[dataset.gallery]) == {72, 73, 74}
    assert len(dataset.gallery) == 3 * 3 * 2
    seen = [(dataset.identities[i], dataset.cameras[i]) for i in dataset.query]
    assert seen == [(who, camera) for who in (72, 73, 74) for camera in range(3)]
    for index in dataset.query:
        person, camera = dataset.identities[index], dataset.cameras[index]
        drawn = encode_pedestrian(4, int(person), int(camera), 0)
        assert dataset.records.read(int(index)) == drawn
    with pytest.raises(ConfigError, match="leave none to test on"):
        synthetic_dataset(cfg, num_train=5)


def test_more_synthetic_images_than_anybody_waits_for_are_refused():
    with pytest.raises(
        ConfigError, match="makes 48000000 images; take at most 1000000"
    ):
        synthetic_dataset(SyntheticConfig(identities=2_000_000))


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_a_wrong_folder_says_what_was_expected_and_what_was_found(tmp_path, layout):
    root = _write(tmp_path, "Market/readme", *(f"part{n}" for n in range(7)))
    expected = {"market1501": "query/, bounding", "msmt17": "list_query.txt"}
    expected["occluded_whole"] = "occluded_body_images/"
    words = expected.get(layout, "a folder for each identity")
    found = "it holds Market, part0, part1, part2, part3 and 3 more"
    with pytest.raises(
        ConfigError, match=f"is not {layout}, which is {words}.*{found}"
    ):
        open_dataset(layout, root)
    with pytest.raises(ConfigError, match=f"does not exist; {layout} is {words}"):
        open_dataset(layout, root + "/nowhere")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("query/0003-c1.jpg",), "1 of 1 names .* query/0003-c1.jpg"),
        (("bounding_box_test/person.jpg",), "names .* bounding_box_test/person.jpg"),
        ((), "has no query image"),
        (("query/0009_c1s1_1_00.jpg",), "no identity .* 9 to 9 against -1 to 5"),
        (("query/-1_c1s1_1_00.jpg",), "no identity of the query"),
        (("query/0005_c1s1_1_00.jpg",), "seen by one camera only"),
    ],
)
def test_a_folder_in_which_nothing_can_be_found_is_refused(tmp_path, names, sentence):
    (tmp_path / "query").mkdir()
    gallery = ("-1_c3s1_1.jpg", "0003_c2s1_1.jpg", "0005_c1s1_2.jpg")
    _write(tmp_path, *(f"bounding_box_test/{name}" for name in gallery), *names)
    with pytest.raises(ConfigError, match=sentence):
        open_dataset("market1501", str(tmp_path))


@pytest.mark.parametrize("name", ["{}.png", "photo_{}.png", "01_{}.png", "x{}_c4.png"])
def test_where_no_camera_is_told_or_one_the_first_image_is_sought_among_the_others(
    tmp_path, caplog, name
):
    names = [f"{who}/{name.format(n)}" for who in "ab" for n in range(3)]
    dataset = open_dataset("id_folders", _write(tmp_path, *names))
    assert [place[:2] for place in _part(dataset, "query")] == [
        (names[0], 0),
        (names[3], 1),
    ]
    assert len(dataset.gallery) == 4
    assert "compare no published scores" in caplog.text


@pytest.mark.parametrize(
    "name", ["000{n}_cam{c}.jpg", "0002_c{c}s1_00{n}_03.jpg", "c{c}_{n}.jpg"]
)
def test_a_camera_is_taken_where_it_stands_not_from_the_frames_number(tmp_path, name):
    places = [(who, n, 1 + n % 2) for who in "ab" for n in range(6)]
    names = [f"{who}/{name.format(n=n, c=c)}" for who, n, c in places]
    dataset = open_dataset("id_folders", _write(tmp_path, *names))
    assert {place[2] for place in _part(dataset, "query")} == {1}
    assert {place[2] for place in _part(dataset, "gallery")} == {2}


def test_a_number_that_differs_in_all_images_of_a_person_is_no_camera(tmp_path):
    names = [f"{who}/{n:06}_x.jpg" for who in "ab" for n in range(3)]
    with pytest.raises(ConfigError, match=r"is no camera; name them \.\.\._cCAMERA"):
        open_dataset("id_folders", _write(tmp_path, *names))
    with pytest.raises(ConfigError, match="1 of 7 names tell no camera, e.g. x.jpg"):
        open_dataset("id_folders", _write(tmp_path, "a/x.jpg"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["{n:06}_x_c{n}.jpg"] * 70, "behind the c or cam of a name differs"),
        (["{i}_{n}.jpg"] * 3, "is the same in all images of a person"),
        (["{n}_x_c1.jpg", "{n}_y.jpg"], "tell no camera, e.g. "),
    ],
)
def test_numbers_of_frames_or_people_are_no_cameras(tmp_path, names, words):
    names = [
        f"{who}/{name.format(n=n, i=i)}"
        for i, who in enumerate("ab")
        for n, name in enumerate(names)
    ]
    with pytest.raises(ConfigError, match=words):
        open_dataset("id_folders", _write(tmp_path, *names))


def test_a_camera_named_in_full_goes_before_a_c_that_counts_clips(tmp_path):
    names = [f"{who}/x_c{n}_cam{1 + n % 2}.jpg" for who in "ab" for n in range(4)]
    dataset = open_dataset("id_folders", _write(tmp_path, *names))
    assert {*dataset.cameras.tolist()} == {1, 2}


def test_images_of_one_camera_are_refused_and_the_way_out_is_told(tmp_path):
    root = _write(
        tmp_path,
        *("query/0001_c1_1.jpg", "bounding_box_test/0001_c1_2.jpg"),
    )
    with pytest.raises(ConfigError, match="every image is of camera 1.*id_folders"):
        open_dataset("market1501", root)


@pytest.mark.parametrize("name", ["1{0}_c1_1.jpg", "0001_c1{0}_1.jpg"])
def test_numbers_of_twenty_digits_end_in_a_sentence(tmp_path, name):
    long = "0" * 19
    root = _write(
        tmp_path, f"query/{name.format(long)}", "bounding_box_test/0001_c2_1.jpg"
    )
    with pytest.raises(ConfigError, match="1 of 1 names"):
        open_dataset("market1501", root)


def test_an_empty_gallery_is_refused(tmp_path):
    (tmp_path / "bounding_box_test").mkdir()
    root = _write(tmp_path, "query/0001_c1.jpg", "query/0001_c2.jpg")
    with pytest.raises(ConfigError, match="has no gallery image"):
        open_dataset("market1501", root)


def test_an_identity_with_one_image_trains_and_is_warned_of(tmp_path, caplog):
    train = "bounding_box_train/0009_c1s1_1_00.jpg"
    root = _write(tmp_path, *_MARKET, *_MARKET_TRAIN, train)
    check_training(open_dataset("market1501", root))
    assert f"1 identities to train on have one image only, e.g. {train}" in caplog.text


def test_training_takes_two_identities(tmp_path):
    root = _write(tmp_path, *_MARKET, *_MARKET_TRAIN[:3])
    with pytest.raises(ConfigError, match="one identity to train on"):
        check_training(open_dataset("market1501", root))


def test_identities_of_one_layout_do_not_depend_on_the_order_of_listing(tmp_path):
    names = [
        f"{person:03}/0{camera}_1.png" for person in range(40) for camera in (1, 2)
    ]
    shuffled = np.random.default_rng(0).permutation(names)
    dataset = open_dataset("id_folders", _write(tmp_path, *shuffled))
    assert [place[0] for place in _part(dataset, "query")] == names[::2]
    np.testing.assert_array_equal(dataset.identities[dataset.query], np.arange(40))
