"""Promises about features after a batch norm: a run and evaluate agree on them."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from exported import make_run, small_config, trained_like
from finetuning import tiny_finetuning
from unlabelled import market, run

import personmae_jax
from personmae_jax import sharding
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints, restore_head
from personmae_jax.errors import ConfigError
from personmae_jax.finetune import run as finetune
from personmae_jax.reid import evaluation
from personmae_jax.reid.datasets import open_dataset
from personmae_jax.reid.evaluation_inputs import Request
from personmae_jax.unsupervised.data import open_target


@pytest.fixture(autouse=True)
def _one_device_that_nobody_takes_away(monkeypatch):
    make, one = sharding.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(sharding, "make_mesh", lambda cfg=None: make(cfg, one))
    monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)


def finetuned(people: str, workdir: str) -> None:
    """With a batch norm after the cls token."""
    cfg = tiny_finetuning()
    cfg.data.layout, cfg.data.path = "market1501", people
    cfg.head.feature = "after"
    assert finetune.run(cfg, workdir, open_dataset("market1501", people)) == 0


def adapted(people: str, workdir: str) -> None:
    """With a batch norm after the means of stripes, which are longer than a token."""
    cfg = market(pathlib.Path(people))
    cfg.head.feature, cfg.train.rounds = "stripes", 1
    assert run(cfg, workdir, *open_target(cfg)) == loop.FINISHED


def evaluate(people: str, workdir: str, feature: str, **more) -> dict[str, float]:
    request = Request(
        workdir=workdir, dataset="market1501", data=people, feature=feature, **more
    )
    return dataclasses.asdict(evaluation.evaluate(request))


@pytest.mark.parametrize("train", [finetuned, adapted])
def test_the_score_of_a_run_and_that_of_evaluate_agree_exactly(tmp_path, capsys, train):
    people, workdir, out = (str(tmp_path / name) for name in ("people", "run", "out"))
    market(tmp_path / "people")
    train(people, workdir)
    own = json.loads((tmp_path / "run" / "retrieval.json").read_text())
    found = evaluate(people, workdir, "neck", out=out, save_features=True)
    assert found == {name: own[name] for name in found}
    saved = np.load(tmp_path / "out" / "features.npz")
    files = [tmp_path / "people" / name for name in saved["query_names"]]
    np.testing.assert_allclose(
        saved["query"], after_batch_norm(workdir, train, files), rtol=1e-3, atol=1e-4
    )
    capsys.readouterr()
    evaluate(people, workdir, "cls")
    assert "the run's own scores are by --feature=neck" in capsys.readouterr().out


def after_batch_norm(workdir: str, train, files: list[pathlib.Path]) -> np.ndarray:
    """By the formula of torch.nn.BatchNorm1d, from the encoder alone."""
    params, apply = personmae_jax.load_encoder(workdir)
    tokens = np.asarray(apply(params, personmae_jax.load_images(files, 32, 16)))
    before = tokens[:, 0]
    if train is adapted:  # 4 x 2 patches; the middle half of two columns is both
        before = tokens[:, 1:].reshape(-1, 4, 2, tokens.shape[-1]).mean(axis=2)
        before = before.reshape(len(before), -1)
    head = restore_head(workdir)
    centred = before - head["statistics"]["mean"]
    scale = head["params"]["bottleneck"]["scale"]
    return centred / np.sqrt(head["statistics"]["var"] + 1e-5) * scale


def test_a_run_without_a_batch_norm_is_told_so_in_one_sentence(tmp_path):
    cfg = small_config()
    encoder = trained_like(cfg.encoder)
    make_run(tmp_path / "run", cfg, {0: (encoder, encoder)})
    with pytest.raises(ConfigError, match="pretrained and has no batch norm .*=cls$"):
        evaluate("unread", str(tmp_path / "run"), "neck")
    request = Request(torch_weights="x.pth", feature="neck")
    with pytest.raises(ConfigError, match="--feature=neck goes with --workdir"):
        evaluation.evaluate(request)
