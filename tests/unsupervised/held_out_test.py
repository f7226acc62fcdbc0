"""Promises about people who are held out: they are scored by, and by nothing else."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from finetuning import tiny_finetuning, tiny_people
from launching import rows
from unlabelled import market, run

from personmae_jax import sharding
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.data.records import ListedRecords
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.finetune import run as finetune
from personmae_jax.finetune.program import build
from personmae_jax.reid import evaluation, init
from personmae_jax.reid.evaluation_inputs import Request
from personmae_jax.reid.scorer import Scorer
from personmae_jax.unsupervised.data import open_target


def settings(people: pathlib.Path) -> UnsupervisedConfig:
    """Two rounds, each of which is scored, on 36 of 54 images that it writes."""
    cfg = market(people)
    cfg.train.rounds, cfg.train.steps_per_round = 2, 2
    cfg.eval.every_rounds = cfg.log.every_steps = 1
    return cfg


@pytest.fixture(autouse=True, scope="module")
def _one_device_that_nobody_takes_away():
    make, one = sharding.make_mesh, jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda cfg=None: make(cfg, one))
        patch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)
        yield


def train(cfg: UnsupervisedConfig, workdir: pathlib.Path) -> None:
    assert run(cfg, str(workdir), *open_target(cfg)) == loop.FINISHED


def scores(workdir: pathlib.Path) -> list[float]:
    return [r["retrieval_mAP"] for r in rows(workdir) if "retrieval_mAP" in r]


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run whose every round is scored."""
    folder = tmp_path_factory.mktemp("scored")
    train(settings(folder / "people"), folder / "run")
    return folder / "run"


def test_people_to_query_are_neither_clustered_nor_trained_on(
    tmp_path, scored, monkeypatch
):
    """A run that cannot read them learns the same as one that is scored by them."""
    cfg = settings(tmp_path / "people")
    cfg.eval.every_rounds = 0
    read = ListedRecords.read

    def read_training_images(records, index):
        assert records.name(index).startswith("bounding_box_train/")
        return read(records, index)

    monkeypatch.setattr(ListedRecords, "read", read_training_images)
    train(cfg, tmp_path / "run")
    assert not scores(tmp_path / "run")
    assert len(scores(scored)) == 3
    found = [
        rows(workdir)[-1]["params_sha256"] for workdir in (scored, tmp_path / "run")
    ]
    assert found[0] == found[1]


def test_the_last_step_is_kept_whatever_the_queries_say(tmp_path, scored):
    cfg = settings(tmp_path / "people")
    for file in sorted((tmp_path / "people/query").iterdir()):  # of people 6, 7 and 8
        who = 6 + (int(file.name[:4]) - 5) % 3
        file.rename(file.with_name(f"{who:04}_c1_9.jpg"))
    train(cfg, tmp_path / "run")
    assert scores(tmp_path / "run") != scores(scored)
    for workdir in (tmp_path / "run", scored):
        assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
        assert json.loads((workdir / "retrieval.json").read_text())["step"] == 4
    found = [
        rows(workdir)[-1]["params_sha256"] for workdir in (scored, tmp_path / "run")
    ]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """The workdir of a run on known people, and the parameters that it has saved."""
    cfg, workdir = tiny_finetuning(), tmp_path_factory.mktemp("fine_tuned") / "run"
    cfg.train.steps, cfg.train.seed = 2, 1  # adaptation's seed is 0
    assert finetune.run(cfg, str(workdir), tiny_people()) == loop.FINISHED
    counts = {"num_images": 32, "num_identities": 8, "num_cameras": 2}
    program = build(cfg, sharding.make_mesh(), **counts)
    with Checkpoints(epath.Path(workdir), keep=1, config={}) as checkpoints:
        return workdir, checkpoints.restore(program.abstract_state).params


def test_adaptation_begins_with_the_encoder_and_the_score_of_the_fine_tuned_run(
    tmp_path, fine_tuned, monkeypatch
):
    (source, params), score, begun = fine_tuned, Scorer.__call__, []

    def keep_state(scorer, step, state):
        begun.append(jax.device_get(state))
        return score(scorer, step, state)

    monkeypatch.setattr(Scorer, "__call__", keep_state)
    cfg, workdir = settings(tmp_path / "people"), tmp_path / "run"
    cfg.init.workdir, cfg.train.rounds = str(source), 1
    init.settle(cfg, str(workdir))
    train(cfg, workdir)
    state, first = begun[0], rows(workdir)[0]
    assert state.step == first["step"] == 0
    jax.tree.map(
        np.testing.assert_array_equal, state.params["encoder"], params["encoder"]
    )
    assert (state.params["bottleneck"]["scale"] == 1).all()
    assert not state.statistics["mean"].any()
    assert (state.statistics["var"] == 1).all()
    request = Request(
        workdir=str(source), dataset="market1501", data=cfg.data.path, feature="cls"
    )
    found = dataclasses.asdict(evaluation.evaluate(request))
    for name in ("mAP", "rank1", "rank5", "rank10", "mINP"):
        assert first[f"retrieval_{name}"] == pytest.approx(found[name], rel=1e-6)
