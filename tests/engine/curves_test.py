"""A finished run leaves its curves, and never fails for them."""

import json
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from personmae_jax.engine.curves import write_curves

_LOSSES = [{"step": step, "loss": 2.0 / step} for step in range(1, 50)]
_SCORES = [{"step": 1, "retrieval_mAP": 0.02}, {"step": 49, "retrieval_mAP": 0.1}]


@pytest.fixture
def run(tmp_path):
    return epath.Path(tmp_path)


def write_rows(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def picture(run):
    return np.array(Image.open(run / "pictures" / "curves.png").convert("RGB"))


def test_losses_and_scores_have_a_panel_each(run):
    write_rows(run, _LOSSES)
    write_curves(run)
    height, width, _ = picture(run).shape
    write_rows(run, _LOSSES + _SCORES)
    write_curves(run)
    assert picture(run).shape == (height, 2 * width, 3)


def test_rounds_of_clusters_have_panels_of_their_own(run):
    write_rows(run, _LOSSES)
    write_curves(run)
    height, width, _ = picture(run).shape
    rounds = [{"step": 1, "clusters": 9, "outliers": 4, "label_agreement": 0.5}]
    write_rows(run, _LOSSES + rounds)
    write_curves(run)
    assert picture(run).shape == (height, 3 * width, 3)


def test_a_score_that_is_missing_does_not_hide_the_others(run):
    write_rows(run, [*_SCORES, {"step": 50, "retrieval_mAP": None}])
    write_curves(run)
    assert picture(run).std() > 0


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "lo', '{"lr": 1}\n'])
def test_what_prevents_the_picture_is_said_and_not_raised(run, text, caplog):
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    write_curves(run)
    assert not (run / "pictures" / "curves.png").exists()
    assert "pictures/curves.png was not written" in caplog.text


def test_a_run_without_matplotlib_still_finishes(run, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_rows(run, _LOSSES)
    write_curves(run)
    assert "pictures/curves.png was not written" in caplog.text
