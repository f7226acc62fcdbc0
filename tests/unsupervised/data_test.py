"""Promises about the images of the target: no identity, no order of the file names."""

import ast
import dataclasses
import pathlib

import numpy as np
import pytest
from unlabelled import market, tiny_unsupervised

from personmae_jax.errors import ConfigError
from personmae_jax.unsupervised import data
from personmae_jax.unsupervised.data import open_target


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


def test_clustering_and_sampling_import_nothing_that_knows_identities():
    """The target's opener alone sees a ReidDataset, and drops its identities."""
    folder = pathlib.Path(data.__file__).parent
    for name in ("clustering", "memory", "sampling"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        words |= {alias.name for node in imported for alias in node.names}
        assert not words & {"ReidDataset", "identities", "open_dataset"}, name


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


def test_fewer_images_than_a_round_takes_are_refused():
    cfg = tiny_unsupervised()
    cfg.cluster.k1 = 72
    with pytest.raises(ConfigError, match="has 72 images to train on; .* take 73"):
        open_target(cfg)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    cfg = market(tmp_path)
    gone = tmp_path / "bounding_box_train/0000_c9_9.jpg"
    gone.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="0000_c9_9.jpg cannot be read"):
        open_target(cfg)
