"""Promises about metric rows: which are written, and the step that went wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from tiny import tiny_config

from personmae_jax import sharding
from personmae_jax.data.bad_records import BadRecords
from personmae_jax.data.images import Outcome
from personmae_jax.data.records import SyntheticRecords
from personmae_jax.engine.rows import Rows
from personmae_jax.errors import RunError
from personmae_jax.pretrain import program as programs
from personmae_jax.pretrain.run import make_training

NUM_STEPS = 6
GOOD = {"loss": 1.0, "pixel_loss": 0.7, "teacher_std": 0.8, "feature_explained": 0.5}


@pytest.fixture
def kept(tmp_path):
    cfg = tiny_config()
    cfg.log.every_steps = 50
    built = programs.build(cfg, sharding.make_mesh(), NUM_STEPS)
    records = SyntheticRecords(cfg.data.synthetic)
    bad = BadRecords(records, 0.05)

    def count_images(batch):
        return bad.count(batch["record"], batch["outcome"])

    training = dataclasses.replace(
        make_training(cfg, built, records), count_images=count_images
    )
    with Rows(training, epath.Path(tmp_path), 0) as kept:
        kept.bad = bad
        yield kept


def note(kept, step: int, bad: int = 0, **metrics) -> None:
    outcome = np.zeros(8, np.int8)
    outcome[:bad] = Outcome.EMPTY
    rows = {"record": np.arange(8), "outcome": outcome}
    metrics = {k: jnp.asarray(v) for k, v in (GOOD | metrics).items()}
    kept.note(step, metrics, rows, 0.0)


def rows(tmp_path) -> list[dict]:
    return [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


def test_rows_are_written_at_the_first_the_last_and_every_bad_step(kept, tmp_path):
    for step in range(1, NUM_STEPS + 1):
        note(kept, step, bad=2 if step == 4 else 0)
    kept.write(final_params={"w": np.zeros(3)})
    assert [row["step"] for row in rows(tmp_path)] == [1, 4, NUM_STEPS]
    assert [row["bad_images"] for row in rows(tmp_path)] == [0, 2, 0]
    assert "params_sha256" in rows(tmp_path)[-1]
    assert "params_sha256" not in rows(tmp_path)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_value_in_a_step_without_a_row_stops_the_run(kept, value):
    note(kept, 1)
    note(kept, 2)
    note(kept, 3, param_norm=value)
    note(kept, 4)
    with pytest.raises(RunError, match=r"^step 3: param_norm is (nan|inf)"):
        kept.write()


def test_too_many_bad_images_leave_the_rows_before(kept, tmp_path):
    kept.bad._max_fraction = 0.0
    note(kept, 1)
    with pytest.raises(RunError, match="bad"):
        note(kept, 2, bad=1)
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_a_host_that_stops_does_not_wait_for_the_others(kept, monkeypatch):
    kept.bad._max_fraction = 0.0
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def wait_in_vain(values):
        raise AssertionError("the other hosts are not there")

    monkeypatch.setattr(multihost_utils, "process_allgather", wait_in_vain)
    note(kept, 1)
    with pytest.raises(RunError, match="bad"):
        note(kept, 2, bad=1)


@pytest.fixture
def evaluated(kept, tmp_path, clock, capsys):
    """Rows and output of six steps of a second each, scored before and at the 3rd.

    Rows are due every 50 steps.
    """

    def make_scores():
        clock.now += 60
        return {"retrieval_mAP": 0.25, "retrieval_rank1": 0.5, "occluded_mAP": np.nan}

    kept._row_time = clock.now
    kept.add_scores(0, make_scores)
    for step in range(1, NUM_STEPS + 1):
        clock.now += 1
        note(kept, step)
        if step == 3:
            kept.add_scores(step, make_scores)
    kept.write(final_params={})
    return rows(tmp_path), capsys.readouterr().out


def test_scores_come_with_a_row_and_before_the_first_step_as_a_row(evaluated):
    scored = {row["step"]: row for row in evaluated[0] if "retrieval_mAP" in row}
    assert [row["step"] for row in evaluated[0]] == [0, 1, 3, NUM_STEPS]
    assert list(scored) == [0, 3]
    assert "loss" not in scored[0]
    assert scored[3]["loss"] == 1.0
    assert scored[3]["occluded_mAP"] is None  # nan, which JSON does not know


def test_evaluating_does_not_count_as_training_slowly(evaluated):
    speeds = {row["step"]: row.get("images_per_second") for row in evaluated[0]}
    # Batches of 8. Step 1 was waited for at second 2, step 3 before it was scored.
    assert speeds[3] == pytest.approx(2 * 8 / 1)
    assert speeds[NUM_STEPS] == pytest.approx(3 * 8 / 3)


def test_the_latest_scores_are_shown(evaluated):
    assert "mAP 0.250  rank-1 0.500  " in evaluated[1].splitlines()[-1]
