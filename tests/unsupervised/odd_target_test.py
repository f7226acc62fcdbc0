"""Targets that are not as data sets are: any folder, one camera, a broken file."""

import csv

import pytest
from launching import rows
from unlabelled import market, run

from personmae_jax.engine import loop
from personmae_jax.errors import RunError
from personmae_jax.unsupervised.data import open_target


@pytest.mark.parametrize("camera_folders", [False, True])
def test_a_folder_of_images_of_one_or_more_cameras_is_trained_on_without_scores(
    tmp_path, capsys, camera_folders
):
    cfg, workdir = market(tmp_path / "images"), tmp_path / "run"
    cfg.data.layout, cfg.data.camera_folders = "images", camera_folders
    cfg.train.rounds, cfg.train.steps_per_round = 2, 1
    assert run(cfg, str(workdir), *open_target(cfg)) == loop.FINISHED
    assert "No scores: there were no queries" in capsys.readouterr().out
    found = rows(workdir)
    assert [row["round"] for row in found] == [0, 1]
    assert len(found[-1]["params_sha256"]) == 64
    names = {name for row in found for name in row}
    assert not [n for n in names if n.startswith(("known_", "retrieval_"))]
    assert (found[0]["clusters_across_cameras"] > 0) == camera_folders
    with (workdir / "clusters.csv").open() as file:
        lines = [*csv.DictReader(file)]
    assert len({line["image"] for line in lines}) == len(lines) == 54
    cameras = {"0", "1", "2"} if camera_folders else {"0"}
    assert {line["camera"] for line in lines} == cameras


def test_a_file_that_is_no_image_ends_the_run_with_a_sentence_that_names_it(tmp_path):
    cfg = market(tmp_path / "people")
    file = tmp_path / "people/bounding_box_train/0003_c2_1.jpg"
    file.write_bytes(b"no picture")
    sentence = rf"^bounding_box_train/{file.name} cannot be used \(not an .*\); fix it"
    with pytest.raises(RunError, match=f"{sentence}, or take it out of the data set$"):
        run(cfg, str(tmp_path / "run"), *open_target(cfg))
