"""Promises about a fine-tuning run: it learns, resumes, keeps its best, and leaves."""

import dataclasses
import functools
import json
import subprocess
import sys

import exported
import jax
import numpy as np
import pytest
from finetuning import start, tiny_finetuning, tiny_people
from launching import ROOT, environment

from personmae_jax import sharding
from personmae_jax.config import SyntheticConfig
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints, restore_encoder
from personmae_jax.engine.metrics import MetricsWriter
from personmae_jax.engine.workdir import read_settings
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.finetune import run as finetune
from personmae_jax.pytorch.export import export
from personmae_jax.reid import init
from personmae_jax.reid.datasets import open_scored, synthetic_dataset
from personmae_jax.reid.evaluation import evaluate
from personmae_jax.reid.evaluation_inputs import Request
from personmae_jax.reid.monitor import Monitor
from personmae_jax.reid.retrieval import Scores
from personmae_jax.synthetic import pedestrian

SCORES = Scores(
    mAP=0.5,
    rank1=0.5,
    rank5=0.5,
    rank10=0.5,
    mINP=0.5,
    queries=1,
    queries_without_match=0,
    gallery=1,
)


pytestmark = pytest.mark.usefixtures("no_preemption")


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    make, one = sharding.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(sharding, "make_mesh", lambda cfg=None: make(cfg, one))


def rows(workdir) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saved(workdir) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run that may see its own people as often as it likes, and what it printed."""
    cfg, workdir = tiny_finetuning(), tmp_path_factory.mktemp("learnt") / "run"
    cfg.encoder.width = 32
    cfg.train.steps, cfg.eval.every_epochs = 100, 100.0
    cfg.optim.base_lr, cfg.optim.layer_decay = 0.03, 1.0  # so short a run wants more
    cfg.head.drop_path = cfg.augment.erase_probability = 0.0
    cfg.augment.flip_probability, cfg.augment.padding = 0.0, 0
    cfg.head.use_cameras = True
    with pytest.MonkeyPatch.context() as patch:
        make, one = sharding.make_mesh, jax.devices()[:1]
        patch.setattr(sharding, "make_mesh", lambda cfg=None: make(cfg, one))
        patch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)
        assert finetune.run(cfg, str(workdir), tiny_people()) == loop.FINISHED
    return workdir


def test_it_finds_everybody_that_it_was_trained_on(learnt):
    scores = json.loads((learnt / "retrieval.json").read_text())
    assert scores["rank1"] == 1.0
    assert scores["mAP"] > 0.95
    assert rows(learnt)[-1]["accuracy"] == 1.0


def test_the_last_row_carries_scores_and_the_hash_of_the_parameters(learnt):
    last = rows(learnt)[-1]
    scores = json.loads((learnt / "retrieval.json").read_text())
    assert last["step"] == scores["step"] == 100
    assert last["retrieval_mAP"] == scores["mAP"]
    assert last["retrieval_rank1"] == scores["rank1"]
    assert len(last["params_sha256"]) == 64
    assert last["data_seconds"] >= 0


def test_a_finished_run_leaves_its_curves(learnt):
    assert (learnt / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_transreid_gets_encoder_neck_and_classifier_to_the_bit(learnt, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")
    told = export(learnt, tmp_path / "file.pth", layout="transreid")
    assert "Verified" in told
    assert "use_cameras" not in told
    tensors = torch.load(tmp_path / "file.pth", weights_only=True)
    outside = {name for name in tensors if not name.startswith("base.")}
    assert outside == {
        *(f"bottleneck.{n}" for n in ("weight", "bias", "running_mean")),
        *("bottleneck.running_var", "bottleneck.num_batches_tracked"),
        "classifier.weight",
    }
    assert tensors["classifier.weight"].shape == (8, 32)
    assert tensors["base.sie_embed"].shape == (2, 1, 32)
    # It is what another fine-tuning may start from.
    cfg = tiny_finetuning()
    cfg.init.torch_weights = str(tmp_path / "file.pth")
    init.settle(cfg, str(tmp_path / "new"))
    # No shape tells the heads, which this layout has no word for either.
    cfg.encoder.num_heads = 2
    params, _ = init.read_encoder(cfg)
    jax.tree.map(np.testing.assert_array_equal, params, restore_encoder(learnt))


def test_the_plain_layouts_hold_the_fine_tuned_encoder(learnt, tmp_path):
    pytest.importorskip("safetensors", reason="needs requirements-torch.txt")
    export(learnt, tmp_path / "file.safetensors", layout="safetensors")
    card = (tmp_path / "file.safetensors.md").read_text()
    assert "fine-tuned" in card
    assert "an embedding of the camera" in card  # that the file has not
    cfg = tiny_finetuning()
    cfg.init.torch_weights = str(tmp_path / "file.safetensors")
    init.settle(cfg, str(tmp_path / "new"))
    params, _ = init.read_encoder(cfg)
    jax.tree.map(np.testing.assert_array_equal, params, restore_encoder(learnt))


def test_a_fine_tuned_run_has_no_teacher(learnt):
    with pytest.raises(ConfigError, match="has no teacher: it was fine-tuned"):
        restore_encoder(learnt, weights="teacher")


def test_a_pretrained_run_has_no_head_to_export(tmp_path):
    pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")
    cfg = exported.small_config()
    params = exported.trained_like(cfg.encoder)
    exported.make_run(tmp_path / "run", cfg, {1: (params, params)})
    with pytest.raises(ConfigError, match="was not fine-tuned: it has no head"):
        export(tmp_path / "run", tmp_path / "file.pth", layout="transreid")


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, no_preemption):
    whole, halves, cfg = tmp_path / "whole", tmp_path / "halves", tiny_finetuning()
    cfg.log.every_steps = 1
    assert finetune.run(cfg, str(whole), tiny_people()) == loop.FINISHED
    no_preemption.add(5)
    assert finetune.run(cfg, str(halves), tiny_people()) == loop.INTERRUPTED
    assert rows(halves)[-1]["step"] == 5
    no_preemption.clear()
    assert finetune.run(cfg, str(halves), tiny_people()) == loop.FINISHED
    clock = {"images_per_second", "data_seconds"}
    one, other = (
        [{k: v for k, v in row.items() if k not in clock} for row in rows(run)]
        for run in (whole, halves)
    )
    assert one == other
    assert [row["step"] for row in one] == list(range(1, 9))
    # Every 2 epochs of 32 images, 16 a step.
    assert [r["step"] for r in one if "retrieval_mAP" in r] == [4, 8]
    assert [r["step"] for r in one if 0 < r.get("occluded_mAP", 0) < 1] == [4, 8]


def test_the_best_checkpoint_and_the_last_are_kept_across_a_restart(
    tmp_path, no_preemption, monkeypatch, capsys
):
    found = iter([0.3, 0.9, 0.5, 0.9])  # at steps 2, 4, 6 and 8
    monkeypatch.setattr(
        Monitor,
        "__call__",
        lambda *_: [(dataclasses.replace(SCORES, mAP=next(found)), SCORES)],
    )
    cfg = tiny_finetuning()
    cfg.eval.every_epochs, cfg.checkpoint.every_steps = 1.0, 1
    no_preemption.add(6)
    finetune.run(cfg, str(tmp_path), tiny_people())
    assert saved(tmp_path) == {4, 6}
    no_preemption.clear()
    finetune.run(cfg, str(tmp_path), tiny_people())
    assert saved(tmp_path) == {4, 8}
    scores = json.loads((tmp_path / "retrieval.json").read_text())
    assert (scores["step"], scores["best"]["step"]) == (8, 4)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.endswith("best")]
    assert line.split()[:3] == ["4", "2.0", "0.900"]
    finetune.run(cfg, str(tmp_path), tiny_people())  # finished: nothing to do
    assert saved(tmp_path) == {4, 8}


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    cfg = tiny_finetuning()
    cfg.optim.optimizer, cfg.optim.base_lr = "sgd", 2e9
    cfg.loss.triplet_weight = 0.0
    with pytest.raises(RunError, match=r"step \d: \w+ is (nan|inf)"):
        finetune.run(cfg, str(tmp_path), tiny_people())
    assert saved(tmp_path) == set()


def test_a_start_that_is_not_there_leaves_the_workdir_to_a_better_one(tmp_path):
    cfg, source = tiny_finetuning(), exported.small_config()
    start(cfg, source, tmp_path)
    cfg.init.step = 7
    with pytest.raises(ConfigError, match="no whole checkpoint of step 7"):
        finetune.run(cfg, str(tmp_path / "new"), tiny_people())
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_run_goes_on_with_its_own_network_and_its_own_people_only(
    tmp_path, no_preemption
):
    no_preemption.add(2)
    finetune.run(tiny_finetuning(), str(tmp_path), tiny_people())
    other = tiny_finetuning()
    other.encoder.depth = 1
    init.settle(other, str(tmp_path))
    with pytest.raises(ConfigError, match="config.encoder.depth: 2 there, 1 here"):
        finetune.run(other, str(tmp_path), tiny_people())
    # As many images, of half the people.
    people = synthetic_dataset(SyntheticConfig(identities=4, cameras=2, shots=4))
    people = dataclasses.replace(people, train=np.arange(32))
    words = "32 records of 4 identities .* 8 steps, but .* 32 records of 8 identities"
    with pytest.raises(ConfigError, match=words):
        finetune.run(tiny_finetuning(), str(tmp_path), people)


def test_rows_are_on_storage_before_every_checkpoint_that_is_newer(
    tmp_path, monkeypatch
):
    acts = []
    for kind, name in ((MetricsWriter, "flush"), (Checkpoints, "save")):
        act = functools.partial(acts.append, name)
        monkeypatch.setattr(kind, name, lambda *_, act=act: act())
    cfg = tiny_finetuning()
    cfg.checkpoint.every_steps, cfg.eval.every_epochs, cfg.train.steps = 1, 100.0, 2
    finetune.run(cfg, str(tmp_path), tiny_people())
    assert acts == ["flush", "save"] * 2


def test_a_run_is_resumed_without_what_it_started_from(tmp_path, no_preemption):
    cfg, source = tiny_finetuning(), exported.small_config()
    cfg.encoder.learned_positions = True  # of no avail: the run brings its own
    cfg.data.height = 48
    start(cfg, source, tmp_path)
    no_preemption.add(2)
    finetune.run(cfg, str(tmp_path / "new"), tiny_people())
    (tmp_path / "source").rename(tmp_path / "gone")
    again = tiny_finetuning()
    again.data.height, again.init.workdir = 48, cfg.init.workdir
    init.settle(again, str(tmp_path / "new"))
    assert again == cfg
    no_preemption.clear()
    assert finetune.run(again, str(tmp_path / "new"), tiny_people()) == 0
    assert read_settings(tmp_path / "new").pos_embed_grid == (8, 4)


def launch(*arguments: str, env: dict) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/finetune.py", *arguments],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command_trains_evaluates_and_leaves_with_its_codes(tmp_path, cache):
    small = (
        "--config=configs/finetune_quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        *("--config.encoder.width=16", "--config.encoder.depth=1"),
        "--config.encoder.num_heads=2",
        *("--config.data.height=32", "--config.data.width=16"),
        *("--config.data.synthetic.identities=20", "--config.data.synthetic_train=16"),
        "--config.train.steps=2",
    )
    done = launch(*small, env=cache)
    assert done.returncode == 0, done.stderr
    assert "rank1" in done.stdout
    assert "retrieval.json" in done.stdout
    again = launch(*small, env=cache)
    assert again.stdout.startswith(f"{tmp_path / 'run'} holds a finished run")
    wrong = launch(*small, "--config.sampling.identites=4", env=cache)
    assert wrong.returncode == 2
    assert "did you mean --config.sampling.identities?" in wrong.stderr
    other = launch("--config=configs/quickstart.py", env=cache)
    assert other.returncode == 2
    assert "FinetuneConfig" in other.stderr


def test_a_run_may_be_scored_by_people_of_another_data_set(tmp_path):
    for shot, folder in enumerate(("occluded_body_images", "whole_body_images")):
        for who in range(1, 6):
            path = tmp_path / "people" / folder / f"{who:03}" / "1.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(pedestrian.encode_pedestrian(0, who, shot, shot))
    cfg, people = tiny_finetuning(), str(tmp_path / "people")
    cfg.eval.layout, cfg.eval.path = "occluded_whole", people
    scored = open_scored(cfg.eval.layout, cfg.eval.path)
    finetune.run(cfg, str(tmp_path / "run"), tiny_people(), scored)
    own = json.loads((tmp_path / "run" / "retrieval.json").read_text())
    found = dataclasses.asdict(
        evaluate(
            Request(
                workdir=str(tmp_path / "run"), dataset="occluded_whole", data=people
            )
        )
    )
    assert found["queries"] == 5
    assert found == {name: own[name] for name in found}
    # By these scores a checkpoint is kept: others cannot go on with them.
    with pytest.raises(ConfigError, match="8 steps, but .*, scored by 5 queries of"):
        finetune.run(cfg, str(tmp_path / "run"), tiny_people())
