"""Promises about the images of the target: no identity, no order of the file names."""

import ast
import dataclasses
import functools

import numpy as np
import pytest
from architecture_test import FILES, module_of, modules_of
from unlabelled import market, tiny_unsupervised

from personmae_jax.errors import ConfigError
from personmae_jax.unsupervised.data import open_target

PATHS = {module_of(path): path for path in FILES}
RUN, QUALITY = "unsupervised.run", "unsupervised.quality"
BLIND = [
    f"unsupervised.{name}"
    for name in "clustering memory model program report rounds sampling step".split()
]
SERVING_SCORES = ("reid.datasets", "reid.features", "reid.retrieval")
# Words for what holds identities, and what reads them.
OF_PEOPLE = "ReidDataset identities open_people open_scored people_in People".split()


def test_images_have_no_identity_and_their_order_is_that_of_their_bytes(tmp_path):
    plain, _ = open_target(market(tmp_path / "a"))
    names = np.random.default_rng(0).permutation(9)
    other, _ = open_target(market(tmp_path / "b", lambda i: 7 * int(names[i]) + 1))
    assert [plain.records.read(i) for i in range(36)] == [
        other.records.read(i) for i in range(36)
    ]
    np.testing.assert_array_equal(plain.cameras, other.cameras)
    assert plain.sha256 == other.sha256
    assert {f.name for f in dataclasses.fields(plain)} == {
        *("records", "indices", "cameras", "sha256")
    }
    order = [plain.records.name(i) for i in range(36)]
    assert order != sorted(order)


def test_another_image_or_camera_is_another_target(tmp_path):
    cfg = market(tmp_path)
    before = open_target(cfg)[0].sha256
    one = tmp_path / "bounding_box_train/0000_c1_0.jpg"
    one.rename(one.with_name("0000_c2_9.jpg"))
    moved = open_target(cfg)[0].sha256
    one.with_name("0000_c2_9.jpg").write_bytes(b"another")
    assert len({before, moved, open_target(cfg)[0].sha256}) == 3


@functools.cache
def words_of(path) -> set[str]:
    """All names and attributes in a file, and what it imports."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    words = {n.id for n in nodes if isinstance(n, ast.Name)}
    words |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    words |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    return words | {alias.name for node in imports for alias in node.names}


def reached_from(module: str) -> set[str]:
    """Our own modules that it imports, and that these import, and so on."""
    reached, left = set(), {module}
    while left:
        reached |= left
        left = {n for name in left for n in modules_of(PATHS[name])} - reached
    return reached


def test_what_labels_and_trains_reaches_no_reader_of_identities():
    scoring = {f"reid.{name}" for name in ("evaluation", "monitor", "scorer")}
    for name in BLIND:
        assert not words_of(PATHS[name]) & {*OF_PEOPLE, "known", "quality"}, name
        reached = reached_from(name)
        assert not reached & {RUN, QUALITY, *scoring}, name
        # The opener drops them; the others serve the scores of who asks for these.
        others = {"unsupervised.data", *SERVING_SCORES}
        rooms = {n for n in reached if n.startswith(("reid.", "unsupervised."))}
        assert {n for n in rooms if words_of(PATHS[n]) & {*OF_PEOPLE}} <= others, name


def test_only_the_run_s_report_sees_labels_and_identities():
    assert [n for n, p in PATHS.items() if QUALITY in modules_of(p)] == [RUN]
    room = [n for n in PATHS if n.startswith("unsupervised.")]
    assert {n for n in room if "identities" in words_of(PATHS[n])} == {RUN, QUALITY}


def test_training_images_alone_suffice_and_then_nothing_is_scored(tmp_path):
    cfg = market(tmp_path)
    target, people = open_target(cfg)
    assert people is not None
    for folder in ("query", "bounding_box_test"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
        (tmp_path / folder).rmdir()
    alone, people = open_target(cfg)
    assert people is None
    assert alone.sha256 == target.sha256


def test_queries_without_a_gallery_are_refused_unless_others_are_scored(tmp_path):
    cfg = market(tmp_path)
    for file in (tmp_path / "bounding_box_test").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=r"gallery|match"):
        open_target(cfg)
    cfg.eval.path = str(tmp_path / "elsewhere")
    assert open_target(cfg)[1] is not None


def test_scores_that_nobody_asks_for_leave_query_and_gallery_unread(tmp_path):
    cfg = market(tmp_path)
    cfg.eval.every_rounds = 0
    assert open_target(cfg)[1] is None


def test_a_folder_of_images_is_a_target_with_or_without_cameras(tmp_path):
    market(tmp_path)
    cfg = tiny_unsupervised()
    cfg.data.layout, cfg.data.path = "images", str(tmp_path)
    target, people = open_target(cfg)
    assert len(target) == 54
    assert target.num_cameras == 1
    assert people is None
    cfg.data.camera_folders = True
    target, _ = open_target(cfg)
    tops = [target.records.name(i).split("/")[0] for i in range(54)]
    np.testing.assert_array_equal(
        target.cameras, np.unique(tops, return_inverse=True)[1]
    )
    (tmp_path / "alone.jpg").touch()
    with pytest.raises(
        ConfigError, match=r"1 images .* no camera's folder.*alone\.jpg"
    ):
        open_target(cfg)


@pytest.mark.parametrize(
    ("layout", "words"),
    [("images", "holds no image"), ("market1501", "is not market1501, which is")],
)
def test_an_empty_folder_is_refused(tmp_path, layout, words):
    cfg = tiny_unsupervised()
    cfg.data.layout, cfg.data.path = layout, str(tmp_path)
    with pytest.raises(ConfigError, match=words):
        open_target(cfg)


@pytest.mark.parametrize(("k1", "clusters", "least"), [(72, 4, 73), (8, 37, 74)])
def test_fewer_images_than_neighbours_or_two_a_cluster_are_refused(k1, clusters, least):
    cfg = tiny_unsupervised()
    cfg.cluster.k1, cfg.sampling.clusters = k1, clusters
    words = f"has 72 images to train on; {clusters} clusters .* k1={k1} take {least} or"
    with pytest.raises(ConfigError, match=words):
        open_target(cfg)
    cfg.cluster.k1, cfg.sampling.clusters = k1 - 1, clusters - 1
    assert len(open_target(cfg)[0]) == 72


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    cfg = market(tmp_path)
    gone = tmp_path / "bounding_box_train/0000_c9_9.jpg"
    gone.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="0000_c9_9.jpg cannot be read"):
        open_target(cfg)
