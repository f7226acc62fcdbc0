"""Promises about whole runs without labels: resumed, renamed, collapsed, reported."""

import csv
import dataclasses
import json
import shutil

import exported
import jax
import numpy as np
import pytest
from PIL import Image
from unlabelled import last_state, market, run, tiny_unsupervised

from personmae_jax import sharding
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints, restore_encoder
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.reid import init
from personmae_jax.reid.datasets import open_scored
from personmae_jax.unsupervised import clustering, data, memory
from personmae_jax.unsupervised.clustering import OUTLIER
from personmae_jax.unsupervised.data import open_target
from personmae_jax.unsupervised.program import build
from personmae_jax.unsupervised.run import make_training
from personmae_jax.unsupervised.sampling import ClusterBatches

CLOCK = {"images_per_second", "data_seconds", "cluster_seconds"}


def train(cfg: UnsupervisedConfig, workdir) -> int:
    return run(cfg, str(workdir), *open_target(cfg))


def rows(workdir) -> list[dict]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def settings() -> UnsupervisedConfig:
    cfg = tiny_unsupervised()
    cfg.log.every_steps = 1
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three rounds, its traces, the steps of its batches."""
    workdir, traced, made = tmp_path_factory.mktemp("whole") / "run", [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)
        similarities = memory.similarities
        patch.setattr(
            memory,
            "similarities",
            lambda *given: traced.append(1) or similarities(*given),
        )
        choose = ClusterBatches.choose
        patch.setattr(
            ClusterBatches,
            "choose",
            lambda self, step: made.append(step) or choose(self, step),
        )
        assert train(settings(), workdir) == loop.FINISHED
    return workdir, len(traced), made


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_resumed_in_or_between_rounds_is_the_uninterrupted_one_to_the_bit(
    tmp_path, whole, no_preemption, step
):
    no_preemption.add(step)
    assert train(settings(), tmp_path / "run") == loop.INTERRUPTED
    no_preemption.clear()
    assert train(settings(), tmp_path / "run") == loop.FINISHED
    assert rows(tmp_path / "run") == rows(whole[0])
    states = (last_state(w) for w in (tmp_path / "run", whole[0]))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_trace_does_for_rounds_of_different_numbers_of_clusters(whole):
    workdir, traced, _ = whole
    assert len({row["clusters"] for row in rows(workdir) if "clusters" in row}) > 1
    assert traced == 1


def test_no_batch_is_made_twice_or_for_nothing(whole):
    assert sorted(whole[2]) == list(range(12))


def test_every_round_is_told_and_the_start_and_the_end_are_scored(whole):
    found = rows(whole[0])
    assert [row["step"] for row in found] == list(range(13))
    assert [row["step"] for row in found if "round" in row] == [1, 5, 9]
    assert [r["step"] for r in found if "retrieval_mAP" in r] == [0, 8, 12]
    begun = found[5]
    for name in ("eps", "clusters", "outliers", "largest_cluster", "known_purity"):
        assert name in begun
    assert -1 <= begun["label_agreement"] <= 1
    scores = json.loads((whole[0] / "retrieval.json").read_text())
    assert (scores["step"], scores["selected"]) == (12, "last")
    saved = [path.name for path in (whole[0] / "checkpoints").iterdir()]
    assert saved == ["12"]


def test_clusters_csv_names_every_image_once_and_pages_show_some(whole):
    target, _ = open_target(settings())
    with (whole[0] / "clusters.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {x["image"] for x in lines} == {target.records.name(i) for i in range(72)}
    assert len(lines) == 72
    labels = last_state(whole[0]).labels
    assert [int(x["cluster"]) for x in lines] == labels.tolist()
    for row in (r for r in rows(whole[0]) if r.get("round") in (0, 2)):
        count = 3 * min(row["clusters"], 4) + bool(row["outliers"])
        with Image.open(whole[0] / f"pictures/clusters-{row['round']:04}.png") as page:
            assert page.size == (10 * 50, count * 114)


def test_identities_are_never_read(tmp_path):
    """Files renamed so that all identities and the order of names are permuted."""
    names = np.random.default_rng(0).permutation(9)
    found = []
    for folder, rename in (
        ("plain", lambda i: i),
        ("renamed", lambda i: 7 * int(names[i]) + 1),
    ):
        own = market(tmp_path / folder, rename)
        cfg = settings()
        cfg.data.layout, cfg.data.path = own.data.layout, own.data.path
        cfg.train.rounds = 2
        assert train(cfg, tmp_path / f"run_{folder}") == loop.FINISHED
        # These alone may differ: which part of a query is hidden follows the number
        # of its file, and sums over people follow their order.
        found.append(
            [
                {
                    k: v
                    for k, v in row.items()
                    if not k.startswith(("occluded_", "retrieval_", "known_"))
                }
                for row in rows(tmp_path / f"run_{folder}")
            ]
        )
    assert "params_sha256" in found[0][-1]
    assert found[0] == found[1]


class Untouchable(np.ndarray):
    """Identities that raise whatever is done with them."""

    def _refuse(self, *given, **options):
        raise AssertionError("an identity was read")

    __getitem__ = __iter__ = __array_ufunc__ = __array_function__ = _refuse
    tolist = astype = copy = take = _refuse


def test_without_scores_no_identity_is_even_looked_at(tmp_path, monkeypatch):
    open_people = data.open_people

    def open_untouchable(*given, **options):
        people = open_people(*given, **options)
        hidden = people.identities.view(Untouchable)
        return dataclasses.replace(people, identities=hidden)

    monkeypatch.setattr(data, "open_people", open_untouchable)
    cfg = settings()
    with pytest.raises(AssertionError, match="an identity was read"):
        train(cfg, tmp_path / "scored")
    cfg.train.rounds, cfg.eval.every_rounds = 1, 0
    assert train(cfg, tmp_path / "run") == loop.FINISHED
    names = {name for row in rows(tmp_path / "run") for name in row}
    assert not [n for n in names if n.startswith(("known_", "retrieval_"))]


@pytest.mark.parametrize(
    ("eps", "words"),
    [
        (0.8, r"round 0: 72 of 72 images .*eps=None.* clusters by eps: 0.3 \d+, "),
        (0.05, r"round 0: none of 72 images has enough others within eps=0.05"),
    ],
)
def test_a_collapse_stops_the_run_with_the_clusters_by_eps(tmp_path, eps, words):
    cfg = settings()
    cfg.cluster.eps, cfg.cluster.min_samples, cfg.cluster.k1 = eps, 2, 60
    if eps < 0.1:
        cfg.cluster.k1, cfg.cluster.min_samples = 8, 9
    with pytest.raises(RunError, match=words):
        train(cfg, tmp_path)


def test_a_collapse_in_a_later_round_says_so_and_leaves_the_round_before_to_go_on(
    tmp_path, whole, no_preemption, monkeypatch
):
    cluster, cfg, asked = clustering.cluster, settings(), []

    def collapse_at_second(features, cfg, cameras):
        asked.append(cfg)
        if len(asked) == 2:
            cfg = dataclasses.replace(cfg, eps=0.05, min_samples=9)
        return cluster(features, cfg, cameras)

    monkeypatch.setattr(clustering, "cluster", collapse_at_second)
    with pytest.raises(RunError, match=r"^round 1: none of 72 .* by eps: 0.3 \d+, .*"):
        train(cfg, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["4"]
    assert train(cfg, tmp_path / "run") == loop.FINISHED
    assert rows(tmp_path / "run") == rows(whole[0])


def test_adaptation_begins_with_the_encoder_of_the_other_run_and_a_fresh_neck(
    tmp_path, no_preemption
):
    source = exported.small_config()
    params = exported.trained_like(source.encoder)
    exported.make_run(tmp_path / "source", source, {3: (params, params)})
    cfg = settings()
    cfg.init.workdir = str(tmp_path / "source")
    init.settle(cfg, str(tmp_path / "run"))
    target, _ = open_target(cfg)
    program = build(cfg, sharding.make_mesh(cfg.mesh), num_images=len(target))
    encoder, _ = init.read_encoder(cfg)
    state = jax.device_get(program.init_state(encoder))
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], params)
    assert (state.params["bottleneck"]["scale"] == 1).all()
    assert not state.statistics["mean"].any()
    assert (state.statistics["var"] == 1).all()
    assert (state.labels == OUTLIER).all()


def test_other_images_are_refused_by_a_run_that_knows_its_own(tmp_path, no_preemption):
    no_preemption.add(2)
    assert train(settings(), tmp_path) == loop.INTERRUPTED
    cfg = settings()
    target, people = open_target(cfg)
    other = dataclasses.replace(target, sha256="0" * 64)
    with pytest.raises(
        ConfigError, match=r"SHA-256 0{12}\) for 12 steps, but .* began"
    ):
        run(cfg, str(tmp_path), other, people)


def test_the_encoder_of_a_run_can_be_taken_up_by_others(whole):
    params = restore_encoder(whole[0])
    state = last_state(whole[0])
    jax.tree.map(np.testing.assert_array_equal, params, state.params["encoder"])


def test_clusters_and_scores_are_made_by_one_compiled_network(tmp_path):
    cfg = settings()
    training = make_training(cfg, str(tmp_path), *open_target(cfg))
    state, _, _ = training.batches.open(1, training.program.init_state())
    training.scorer(0, state)
    assert training.batches.extract._encode._cache_size() == 1


def test_a_run_may_be_scored_by_people_of_another_data_set(tmp_path):
    cfg = market(tmp_path / "whole")
    assert train(cfg, tmp_path / "own") == 0
    images = "bounding_box_train"
    shutil.copytree(tmp_path / "whole" / images, tmp_path / "train" / images)
    cfg.data.path, cfg.eval.path = str(tmp_path / "train"), cfg.data.path
    scored = open_scored(cfg.eval.layout, cfg.eval.path)
    assert run(cfg, str(tmp_path / "other"), *open_target(cfg), scored) == 0
    others = rows(tmp_path / "other")
    assert sum("retrieval_mAP" in row for row in others) == 3  # rounds 0, 2 and 3
    assert others == [
        {k: v for k, v in row.items() if not k.startswith("known_")}
        for row in rows(tmp_path / "own")
    ]
