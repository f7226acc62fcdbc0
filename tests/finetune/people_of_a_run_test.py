"""Promises about whom a fine-tuning run knows, and what it starts from."""

import dataclasses
import json

import exported
import pytest
from etils import epath
from finetuning import start, tiny_finetuning, tiny_people

from personmae_jax.config_finetune import check_finetuning
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import has_checkpoint
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.finetune import run as finetune
from personmae_jax.reid import init
from personmae_jax.reid.datasets import labels_sha256
from personmae_jax.reid.monitor import Monitor
from personmae_jax.reid.scorer import Scorer

pytestmark = pytest.mark.usefixtures("no_preemption")


def test_a_run_goes_on_with_the_same_labels_only(tmp_path, no_preemption):
    no_preemption.add(2)
    people = tiny_people()
    assert finetune.run(tiny_finetuning(), str(tmp_path), people) == loop.INTERRUPTED
    # As many images of as many people, two of whom have changed their numbers.
    renamed = people.identities.copy()
    renamed[people.identities == 0], renamed[people.identities == 1] = 1, 0
    others = dataclasses.replace(people, identities=renamed)
    assert labels_sha256(others) != labels_sha256(people)
    with pytest.raises(ConfigError, match=r"32 records of 8 identities \(SHA-256 .*"):
        finetune.run(tiny_finetuning(), str(tmp_path), others)
    # A version before this one wrote no digest.
    facts = json.loads((tmp_path / "run.json").read_text())
    del facts["labels_sha256"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert finetune.run(tiny_finetuning(), str(tmp_path), others) == loop.FINISHED


def test_the_order_of_images_is_no_part_of_their_labels():
    people = tiny_people()
    backwards = dataclasses.replace(
        people, train=people.train[::-1], query=people.query[::-1]
    )
    assert labels_sha256(backwards) == labels_sha256(people)
    fewer = dataclasses.replace(people, query=people.query[1:])
    assert labels_sha256(fewer) != labels_sha256(people)


def test_an_image_that_cannot_be_scored_costs_no_step(tmp_path, monkeypatch):
    def fail(*_):
        raise RunError("0003.jpg cannot be used")

    monkeypatch.setattr(Monitor, "__call__", fail)
    with pytest.raises(RunError, match="0003.jpg"):
        finetune.run(tiny_finetuning(), str(tmp_path), tiny_people())
    assert has_checkpoint(tmp_path)


def test_the_best_step_is_known_without_its_row(tmp_path):
    """Rows may be lost where storage failed; its checkpoint must not be."""
    scores = dict.fromkeys(("rank1", "rank5", "rank10", "mINP"), 0.5)
    best = {"step": 4, "mAP": 0.7} | scores
    text = json.dumps({"step": 8, "mAP": 0.1, "best": best})
    (tmp_path / "retrieval.json").write_text(text)
    scorer = Scorer(
        monitor=Monitor.__new__(Monitor), last=12, every=4, unit=("epoch", 4.0)
    )
    scorer.restore(epath.Path(tmp_path), 8)
    assert scorer.best_step == 4
    scorer.restore(epath.Path(tmp_path), 3)  # from before it
    assert scorer.best_step == 0
    (tmp_path / "retrieval.json").write_text("[]")
    scorer.restore(epath.Path(tmp_path), 8)
    assert scorer.best_step == 0


def source_at(tmp_path, *steps: int, last: int | None = None):
    source = exported.small_config()
    params = exported.trained_like(source.encoder)
    exported.make_run(tmp_path / "source", source, dict.fromkeys(steps, (params,) * 2))
    if last is not None:
        (tmp_path / "source/run.json").write_text(json.dumps({"num_steps": last}))
    cfg = tiny_finetuning()
    cfg.init.workdir = str(tmp_path / "source")
    init.settle(cfg, None)
    return cfg


def test_a_run_that_has_trained_nothing_is_no_start_unless_it_is_asked_for(tmp_path):
    cfg = source_at(tmp_path, 0)
    with pytest.raises(ConfigError, match="trained nothing yet.*init.step=0"):
        init.read_encoder(cfg)
    cfg.init.step = 0
    _, (note,) = init.read_encoder(cfg)
    assert note.endswith("student at step 0.")


@pytest.mark.parametrize(("last", "is_warned"), [(3, False), (4, True)])
def test_a_run_that_is_not_trained_to_its_end_is_told(tmp_path, last, is_warned):
    _, (note,) = init.read_encoder(source_at(tmp_path, 3, last=last))
    assert "at step 3" in note
    assert ("WARNING: it is not trained to its end" in note) == is_warned


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"step": 3}, "init.step is a run's: it goes with config.init.workdir"),
        ({"weights": "teacher"}, "init.weights is a run's"),
        ({"num_heads": 4}, "init.num_heads is a file's.*init.torch_weights"),
        ({"torch_weights": "a.pth", "step": 3}, "init.step is a run's"),
        ({"workdir": "a", "mean": (0.5, 0.5, 0.5)}, "init.mean is a file's"),
    ],
)
def test_settings_of_a_start_that_is_not_named_are_refused(fields, words):
    cfg = tiny_finetuning()
    for name, value in fields.items():
        setattr(cfg.init, name, value)
    with pytest.raises(ConfigError, match=words):
        init.settle(cfg, None)


def test_a_folder_that_synthetic_people_would_hide_is_refused():
    cfg = tiny_finetuning()
    cfg.data.path = "Market-1501"
    with pytest.raises(ConfigError, match="is not read with data.layout=synthetic"):
        check_finetuning(cfg)


def test_the_encoder_of_a_run_of_cameras_is_said_to_lack_them(tmp_path):
    import personmae_jax

    source = tiny_finetuning()
    source.head.use_cameras = True
    start(tiny_finetuning(), source, tmp_path)
    with pytest.warns(UserWarning, match="camera embeddings, which its encoder lacks"):
        personmae_jax.load_encoder(str(tmp_path / "source"))
