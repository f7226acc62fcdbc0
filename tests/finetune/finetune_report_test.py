"""Promises about what fine-tuning says of itself."""

import json
import types

import jax.numpy as jnp
from etils import epath
from finetuning import tiny_finetuning

from personmae_jax import sharding
from personmae_jax.finetune import report as finetune_report
from personmae_jax.finetune.report import FinetuneReport
from personmae_jax.finetune.step import build
from personmae_jax.reid.retrieval import Scores


def test_what_scores_take_is_not_in_the_images_per_second(tmp_path, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(finetune_report, "time", clock)
    run = build(
        tiny_finetuning(),
        sharding.make_mesh(),
        num_images=32,
        num_identities=8,
        num_cameras=2,
    )
    counts = {"queries": 1, "queries_without_match": 0, "gallery": 1}
    scores = Scores(mAP=0.5, rank1=0.5, rank5=0.5, rank10=0.5, mINP=0.5, **counts)
    with FinetuneReport(run, epath.Path(tmp_path), 0, is_main=True) as report:
        report.note(1, {"loss": jnp.ones(())})
        now[0] = 2.0
        report.check()
        now[0] = 50.0
        report.add_scores(scores, 0.1)
        report.write()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["images_per_second"] == 16 / 2
