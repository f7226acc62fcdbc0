"""Promises about what pretraining says: warnings and the last summary."""

import json
import logging

import pytest
from etils import epath

from personmae_jax.config import Config
from personmae_jax.pretrain.run import Warnings, summarise

NUM_STEPS = 6
GOOD = {"teacher_std": 0.8, "feature_explained": 0.5}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    warn = Warnings(NUM_STEPS)

    def said(*rows: dict) -> list[str]:
        for row in rows:
            warn(row["step"], row)
        return [record.getMessage() for record in caplog.records]

    return said


def test_collapse_and_unlearnt_features_are_said_once(said):
    first, second = said(
        {"step": 1, **GOOD, "teacher_std": 0.05},
        {"step": NUM_STEPS, "teacher_std": 0.04, "feature_explained": 0.1},
    )
    assert "teacher_std is 0.05" in first
    assert "feature_explained ends at 0.1" in second


def test_healthy_run_says_nothing(said):
    assert not said({"step": 1, **GOOD}, {"step": NUM_STEPS, **GOOD})


@pytest.fixture
def summary(tmp_path):
    rows = [
        {"step": 0, "retrieval_mAP": 0.25, "occluded_mAP": None},
        {"step": 1, "pixel_loss": 0.99},
        {"step": NUM_STEPS, "pixel_loss": 0.7, "retrieval_mAP": 0.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"torn')
    cfg = Config()
    cfg.data.source = "synthetic"
    return summarise(epath.Path(tmp_path), cfg, NUM_STEPS)


def test_summary_tells_the_first_values_and_the_last(summary):
    assert "  retrieval_mAP     0.250 -> 0.500" in summary.splitlines()
    assert "  pixel_loss        0.990 -> 0.700" in summary.splitlines()
    assert "occluded_mAP" not in summary


def test_the_next_commands_fit_the_folder_and_the_size_of_images(tmp_path):
    cfg = Config()
    cfg.data.height = 384
    summary = summarise(epath.Path(tmp_path / "my run"), cfg, NUM_STEPS)
    assert summary.endswith("IMAGES --config.data.height=384 --config.data.width=128")
    assert f"--config.init.workdir='{tmp_path}/my run'\n" in summary


def test_summary_names_places_and_the_next_commands(summary, tmp_path):
    places = ("pictures/6.png", "pictures/curves.png", "metrics.jsonl", "tensorboard")
    for place in (*places, "checkpoints/6"):
        assert str(tmp_path / place) in summary
    assert "launch/finetune.py --config=configs/finetune_quickstart.py" in summary
    assert f"--config.init.workdir={tmp_path}\n" in summary
    assert "python launch/pretrain.py --config=configs/vitb.py" in summary
