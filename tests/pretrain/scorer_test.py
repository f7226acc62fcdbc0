"""Retrieval scores while a run trains: what they tell, and what they leave alone."""

import json
import math

import jax
import numpy as np
import pytest
from etils import epath
from tiny import tiny_config

from personmae_jax import sharding
from personmae_jax.data.records import open_records
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.engine.profiling import Trace
from personmae_jax.engine.rows import Rows
from personmae_jax.errors import ConfigError
from personmae_jax.pretrain import program as programs
from personmae_jax.pretrain.run import make_training, run
from personmae_jax.pretrain.scorer import Scorer, open_people
from personmae_jax.reid.features import Extractor
from personmae_jax.synthetic.pedestrian import encode_pedestrian

NAMES = {
    *("retrieval_mAP", "retrieval_rank1", "occluded_mAP"),
    *("teacher_retrieval_mAP", "teacher_retrieval_rank1", "teacher_occluded_mAP"),
}
NUM_STEPS = 5


def config(every_steps: int | None = 2):
    cfg = tiny_config()
    cfg.train.steps = NUM_STEPS
    cfg.teacher.start_fraction = cfg.teacher.end_fraction = 0.3
    cfg.log.every_steps = 1
    cfg.eval.every_steps, cfg.eval.identities = every_steps, 6
    cfg.eval.feature, cfg.eval.centre_cameras = "patches", True
    return cfg


def build(cfg):
    return programs.build(cfg, sharding.make_mesh(cfg.mesh), NUM_STEPS)


@pytest.fixture(scope="module")
def program():
    return build(config())


@pytest.fixture(scope="module")
def people():
    return open_people(config())


class _NoCheckpoints(Checkpoints):
    """Keeps what is saved in memory."""

    def __init__(self):
        self.saved = {}

    def reached_preemption(self, step: int) -> bool:
        return False

    def save(self, step: int, state) -> None:
        self.saved[step] = jax.device_get(state)


def train(
    program, workdir, monitor, start=0, state=None, checkpoints=None
) -> list[dict]:
    """The rows of a run."""
    records = open_records(program.cfg.data)
    training = make_training(program.cfg, program, records, monitor)
    with (
        loop.Streams(training, start) as streams,
        Rows(training, epath.Path(workdir), start) as rows,
    ):
        loop.train(
            *(training, state or program.init_state(), start, streams, rows),
            *(checkpoints or _NoCheckpoints(), None, Trace(program.cfg.profile, None)),
        )
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def placed(program, state):
    """The state where the program's sharding says that it belongs."""
    where = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    return jax.device_put(state, where)


def trained(row) -> dict:
    clock = {"images_per_second", "data_seconds"}
    return {k: v for k, v in row.items() if k not in NAMES | clock}


@pytest.fixture(scope="module")
def watched(program, people, tmp_path_factory):
    """The rows of an evaluated run, and what evaluated it."""
    monitor = Scorer(program.cfg, program, people)
    return train(program, tmp_path_factory.mktemp("watched"), monitor), monitor


def test_watching_changes_no_number_of_the_training(program, watched, tmp_path):
    alone = train(program, tmp_path, None)
    assert [row["step"] for row in alone] == [1, 2, 3, 4, 5]
    assert not any(NAMES & row.keys() for row in alone)
    assert [trained(row) for row in watched[0][1:]] == [trained(row) for row in alone]
    assert len(alone[-1]["params_sha256"]) == 64


def test_scores_stand_in_the_rows_of_their_steps_and_before_the_first(watched):
    rows = watched[0]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    scored = {row["step"]: NAMES & row.keys() for row in rows if NAMES & row.keys()}
    assert scored == dict.fromkeys([0, 2, 4, 5], NAMES)
    assert rows[0].keys() == NAMES | {"step"}
    assert all(0 < row[name] <= 1 for row in rows for name in NAMES & row.keys())


def test_evaluating_is_compiled_once(watched):
    assert watched[1]._monitor.extract._encode._cache_size() == 1


def test_before_the_first_step_the_teacher_is_the_student(watched):
    first = watched[0][0]
    for name in ("retrieval_mAP", "retrieval_rank1", "occluded_mAP"):
        assert first[f"teacher_{name}"] == first[name]


def test_a_resumed_run_evaluates_no_step_twice_and_leaves_none_out(
    program, watched, tmp_path
):
    class Interrupted(_NoCheckpoints):
        def reached_preemption(self, step: int) -> bool:
            return step == 2  # where an evaluation is due

    checkpoints, monitor = Interrupted(), watched[1]
    train(program, tmp_path, monitor, checkpoints=checkpoints)
    state = placed(program, checkpoints.saved[2])
    rows = train(program, tmp_path, monitor, 2, state)
    clock = ("images_per_second", "data_seconds")
    for row in [*rows, *watched[0]]:
        for name in clock:
            row.pop(name, None)
    assert rows == watched[0]


def test_an_interruption_while_evaluating_is_noticed_at_the_next_step(
    program, people, tmp_path
):
    asked = []

    class Counted(Scorer):
        def __call__(self, step, state):
            asked.append(state)
            return dict.fromkeys(NAMES, 0.5)

    class Interrupted(_NoCheckpoints):
        def reached_preemption(self, step: int) -> bool:
            return len(asked) == 2  # at step 0 and step 2

    checkpoints = Interrupted()
    monitor = Counted(program.cfg, program, people)
    train(program, tmp_path, monitor, checkpoints=checkpoints)
    assert list(checkpoints.saved) == [3]


def test_split_parameters_give_the_same_scores(program, people, watched, monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_SPLIT", 64)
    cfg = config()
    cfg.mesh.fsdp = 4
    split = build(cfg)
    state = placed(split, jax.device_get(program.init_state()))
    first = {name: watched[0][0][name] for name in NAMES}
    # Rounding may swap two neighbours of a ranking.
    assert Scorer(split.cfg, split, people)(0, state) == pytest.approx(first, abs=0.02)


def test_the_drawn_people_are_not_the_runs_own_and_sought_across_cameras(people):
    own = config().data.synthetic
    assert people.identities.min() == own.first_identity + own.identities
    assert len(np.unique(people.identities)) == 6
    assert set(people.cameras[people.query]) == {0}
    assert set(people.cameras[people.gallery]) == {1}
    assert len(people.query) == len(people.gallery) == 24


@pytest.mark.parametrize("never", [None, 0])
def test_nobody_is_sought_unless_asked_for(never):
    cfg = config(never)
    cfg.eval.path = "nowhere"  # not even looked for
    assert open_people(cfg) is None


def test_a_wrong_folder_is_told_before_any_device_work(tmp_path, monkeypatch):
    cfg = config()
    cfg.eval.path = str(tmp_path / "none")
    monkeypatch.setattr(jax, "device_count", lambda: pytest.fail("device work"))
    with pytest.raises(ConfigError, match="does not exist; market1501 is"):
        run(cfg, str(tmp_path / "run"), open_records(cfg.data))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_known_people_is_evaluated(program, tmp_path):
    for identity in range(3):
        (tmp_path / str(identity)).mkdir()
        for camera in (1, 2):
            image = encode_pedestrian(0, identity, camera, 0)
            (tmp_path / str(identity) / f"{camera}_0.jpg").write_bytes(image)
    cfg = config()
    cfg.eval.path, cfg.eval.layout = str(tmp_path), "id_folders"
    scores = Scorer(cfg, program, open_people(cfg))(0, program.init_state())
    assert scores.keys() == NAMES
    assert all(math.isfinite(score) for score in scores.values())


@pytest.fixture
def judge(program, people, monkeypatch):
    """Scores of features that are functions of (identity, camera, whether occluded)."""

    def judge(student, teacher):
        monitor = Scorer(program.cfg, program, people)

        def extract(self, networks, records, indices, cameras=None, change=None):
            found = []
            for i in indices:
                who = int(people.identities[i] - people.identities[0])
                seen_by = int(people.cameras[i])
                both = [f(who, seen_by, change is not None) for f in (student, teacher)]
                found.append(np.concatenate(both))
            return np.array(found, np.float32)

        monkeypatch.setattr(Extractor, "__call__", extract)
        return monitor(0, program.init_state())

    return judge


def identity_under_camera(who: int, camera: int, is_occluded: bool) -> np.ndarray:
    """Who it is, far less loudly than which camera; nothing of who if occluded."""
    feature = np.zeros(8)
    feature[who] = 0.01 if not is_occluded else -0.01
    feature[6 + camera] = 1.0
    return feature


def test_who_is_told_however_loud_the_camera(judge):
    scores = judge(identity_under_camera, lambda *_: np.arange(1.0, 9.0))
    assert scores["retrieval_mAP"] == scores["retrieval_rank1"] == 1.0
    assert scores["occluded_mAP"] < 0.5
    # A collapsed network ranks nobody.
    assert math.isnan(scores["teacher_retrieval_mAP"])
    assert math.isnan(scores["teacher_occluded_mAP"])


def test_features_that_are_not_finite_stop_nothing_by_themselves(judge):
    scores = judge(lambda *_: np.full(8, np.nan), identity_under_camera)
    assert math.isnan(scores["retrieval_mAP"])
    assert scores["teacher_retrieval_mAP"] == 1.0
