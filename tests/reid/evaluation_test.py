"""Promises of an evaluation: the right encoder, the right people, whole files."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from exported import make_run, small_config, trained_like
from PIL import Image

import personmae_jax
from personmae_jax import sharding
from personmae_jax.config import Config, SyntheticConfig
from personmae_jax.data import images
from personmae_jax.data.images import Box
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.pretrain import program as programs
from personmae_jax.pretrain import scorer
from personmae_jax.pytorch.export import encoder_tensors
from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.model_card import describe_export
from personmae_jax.reid import datasets, evaluation, retrieval
from personmae_jax.reid.evaluation_inputs import Request
from personmae_jax.reid.reranking import rerank
from personmae_jax.reid.retrieval import People
from personmae_jax.synthetic import pedestrian

FIELDS = ["mAP", "rank1", "rank5", "rank10", "mINP"]
FIELDS += ["queries", "queries_without_match", "gallery"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints of a run whose training data are not here."""
    folder, cfg = tmp_path_factory.mktemp("runs") / "run", small_config()
    cfg.data.source, cfg.data.path = "tfds", "/not/here"
    encoders = [trained_like(cfg.encoder, seed) for seed in range(4)]
    make_run(
        folder, cfg, {0: (encoders[0], encoders[1]), 5: (encoders[2], encoders[3])}
    )
    return str(folder)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Nine people as Market-1501 has them; one was never seen again, one is a crowd."""
    root = tmp_path_factory.mktemp("people")
    for part, camera in (("query", 1), ("bounding_box_test", 2)):
        (root / part).mkdir()
        for who in range(1, 10):
            name = f"{who + (who == 9 and camera):04}_c{camera}s1_{who:06}_00.jpg"
            image = pedestrian.encode_pedestrian(0, who, camera, 0)
            (root / part / name).write_bytes(image)
    crowd = pedestrian.encode_pedestrian(0, 50, 2, 0)
    (root / "bounding_box_test" / "0000_c2s1_000050_00.jpg").write_bytes(crowd)
    return str(root)


def request_of(people, **changes) -> Request:
    return Request(dataset="market1501", data=people, **changes)


def features_of(workdir, people, **which) -> dict[str, np.ndarray]:
    """Of query and gallery, one image at a time, by `load_encoder`."""
    params, apply = personmae_jax.load_encoder(workdir, **which)
    dataset, found = datasets.open_dataset("market1501", people), {}
    for part in ("query", "gallery"):
        pixels = np.empty((len(getattr(dataset, part)), 32, 16, 3), np.uint8)
        for row, record in zip(pixels, getattr(dataset, part), strict=True):
            file = dataset.records.read(int(record))
            image, _ = images.decode(file, max_pixels=10**6, min_side=1)
            images.crop_resize(image, Box(0, 0, *image.shape[:2]), row)
        found[part] = np.asarray(apply(params, pixels)[:, 0])
    return found


def expected_scores(found, distances=retrieval.cosine_distances):
    query = People(np.array([*range(1, 9), 10]), np.ones(9, int))
    gallery = People(np.array([0, *range(1, 9), 11]), np.full(10, 2))
    blocks = distances(found["query"], found["gallery"])
    return dataclasses.asdict(retrieval.score(blocks, query, gallery))


@pytest.mark.parametrize("which", [{}, {"weights": "teacher"}, {"step": 0}])
def test_the_encoder_that_was_asked_for_is_scored_without_its_training_data(
    run, people, tmp_path, which
):
    scores = evaluation.evaluate(
        request_of(people, workdir=run, out=str(tmp_path), save_features=True, **which)
    )
    found = features_of(run, people, **which)
    with np.load(tmp_path / "features.npz") as stored:
        for part in ("query", "gallery"):
            unit = found[part] / np.linalg.norm(found[part], axis=1, keepdims=True)
            np.testing.assert_allclose(stored[part], unit, rtol=1e-4, atol=1e-5)
        assert stored["query_identities"].tolist() == [*range(1, 9), 10]
        assert stored["gallery_cameras"].tolist() == [2] * 10
        assert stored["query_names"][0] == "query/0001_c1s1_000001_00.jpg"
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert list(written) == FIELDS
    assert written == dataclasses.asdict(scores) == expected_scores(found)
    assert (written["queries"], written["queries_without_match"]) == (9, 1)
    assert written["gallery"] == 10
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"retrieval.json", "features.npz", "ranking.png"}


def test_reranked_distances_are_scored_if_asked(run, people):
    scores = evaluation.evaluate(request_of(people, workdir=run, rerank=True))
    found = features_of(run, people)
    assert dataclasses.asdict(scores) == expected_scores(found, rerank)
    assert scores != evaluation.evaluate(request_of(people, workdir=run))


def test_a_file_for_pytorch_is_scored_as_the_run_that_it_is_of(
    run, people, tmp_path, capsys
):
    file, cfg = tmp_path / "vit.safetensors", small_config()
    tensors = encoder_tensors(cfg, trained_like(cfg.encoder, 2), (5, 5))
    meta = describe_export(
        cfg, (5, 5), "student", 5, {"git_revision": None, "versions": {}, "config": {}}
    )
    LAYOUTS["safetensors"].write(file, tensors, meta)
    outs = [tmp_path / "run", tmp_path / "file"]
    options = {"feature": "cls+mean", "flip": True, "save_features": True}
    whole = [
        evaluation.evaluate(request_of(people, out=str(out), **source, **options))
        for out, source in zip(
            outs, ({"workdir": run}, {"torch_weights": str(file)}), strict=True
        )
    ]
    assert whole[0] == whole[1]
    stored = [np.load(out / "features.npz")["gallery"] for out in outs]
    assert stored[0].shape == (10, 64)
    np.testing.assert_allclose(stored[0], stored[1], atol=1e-5)
    said = capsys.readouterr().out
    assert "WARNING" not in said
    assert "GUESS" not in said


def test_drawn_people_are_those_that_the_run_has_not_seen(
    tmp_path, capsys, monkeypatch
):
    four = functools.partial(datasets.held_out_dataset, identities=4)
    monkeypatch.setattr(datasets, "held_out_dataset", four)
    cfg = small_config()
    cfg.data.source = "synthetic"
    cfg.data.synthetic = SyntheticConfig(identities=30, first_identity=7, seed=3)
    encoder = trained_like(cfg.encoder)
    make_run(tmp_path / "run", cfg, {0: (encoder, encoder)})
    request = Request(
        workdir=str(tmp_path / "run"),
        dataset="synthetic",
        out=str(tmp_path),
        save_features=True,
    )
    assert evaluation.evaluate(request).queries == 16
    with np.load(tmp_path / "features.npz") as stored:
        assert np.unique(stored["gallery_identities"]).tolist() == [37, 38, 39, 40]
    assert "4 synthetic identities" in capsys.readouterr().out


def test_a_run_is_scored_as_it_scored_itself(tmp_path):
    cfg = small_config()
    cfg.data.source, cfg.eval.every_steps = "synthetic", 1
    cfg.eval.feature, cfg.eval.centre_cameras = "patches", True
    student, teacher = (trained_like(cfg.encoder, seed) for seed in range(2))
    make_run(tmp_path / "run", cfg, {0: (student, teacher)})
    program = programs.build(cfg, sharding.make_mesh(cfg.mesh), 1000)
    people = scorer.open_people(cfg)
    assert people is not None
    itself = scorer.Scorer(cfg, program, people)
    student, teacher = sharding.replicate((student, teacher), program.mesh)
    told = itself(
        0,
        dataclasses.replace(
            program.abstract_state,
            params={"encoder": student},
            teacher_params=teacher,
        ),
    )
    request = Request(
        workdir=str(tmp_path / "run"),
        dataset="synthetic",
        feature="patches",
        centre_cameras=True,
    )
    found = evaluation.evaluate(request)
    assert told["retrieval_mAP"] == pytest.approx(found.mAP, rel=1e-3)
    assert told["retrieval_rank1"] == pytest.approx(found.rank1, abs=0.01)


def test_the_picture_has_a_row_for_each_of_eight_queries(run, people, tmp_path):
    evaluation.evaluate(request_of(people, workdir=run, out=str(tmp_path)))
    with Image.open(tmp_path / "ranking.png") as picture:
        pixels = np.asarray(picture)
    panel = (128 + 2 * 4 + 4, 64 + 2 * 4 + 4)
    assert pixels.shape == (24 + 8 * panel[0], 11 * panel[1] + 12 + 4, 3)


def test_the_table_is_in_percent_and_counts_queries_without_a_match():
    scores = retrieval.Scores(
        mAP=0.1234,
        rank1=1.0,
        rank5=1.0,
        rank10=1.0,
        mINP=0.0,
        queries=3368,
        queries_without_match=2,
        gallery=15913,
    )
    head, row = evaluation.table(scores).splitlines()
    assert head.split()[:5] == ["mAP", "rank-1", "rank-5", "rank-10", "mINP"]
    assert head.split()[5:] == ["queries", "without", "match", "gallery"]
    assert row.split() == "12.3% 100.0% 100.0% 100.0% 0.0% 3,368 2 15,913".split()
    assert len(head) == len(row)


def refusal(request: Request) -> str:
    with pytest.raises(ConfigError) as error:
        evaluation.evaluate(request)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workdir": None}, ["either --workdir=RUN or --torch-weights=FILE"]),
        ({"torch_weights": "vit.pth"}, ["either --workdir=RUN or --torch-weights"]),
        ({"workdir": "/no/run"}, ["/no/run holds no run"]),
        ({"step": 3}, ["no whole checkpoint of step 3", "there are steps 0, 5"]),
        ({"weights": "pupil"}, ["'pupil' is unknown", "student, teacher"]),
        ({"height": 256, "width": 128}, ["--height goes with --torch-weights"]),
        ({"grid": (24, 8)}, ["--grid goes with --torch-weights"]),
        ({"dataset": None}, ["no data set: give --dataset=market1501|"]),
        ({"dataset": "market"}, ["--dataset=market is no", "market1501"]),
        ({"data": None}, ["--dataset=market1501 is read from --data=DIR"]),
        ({"data": "/no/data"}, ["'/no/data' does not exist", "query/"]),
        ({"dataset": "msmt17"}, ["is not msmt17", "list_query.txt", "query"]),
        ({"query_camera": 1}, ["market1501 says what its queries are"]),
        ({"dataset": "synthetic"}, ["leave out --data"]),
        ({"save_features": True}, ["--save-features needs a folder"]),
        ({"out": ""}, ["--out= is empty"]),
        ({"out": "gs://bucket/out"}, ["gs://bucket/out is not local"]),
        ({"out": "/dev/null/out"}, ["/dev/null/out cannot be written"]),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence_before_any_work(
    run, people, monkeypatch, changes, words
):
    monkeypatch.setattr(evaluation, "Extractor", lambda *_: pytest.fail("work"))
    text = refusal(dataclasses.replace(request_of(people, workdir=run), **changes))
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("content", "changes", "words"),
    [
        (b"text", {}, ["--torch-weights=", "neither a PyTorch nor a safetensors"]),
        (None, {}, ["--torch-weights=", "no such file"]),
        (b"", {"step": 0}, ["--weights and --step go with --workdir"]),
        (b"", {"height": 256}, ["both --height and --width"]),
    ],
)
def test_a_file_that_is_no_vit_is_told_in_a_sentence(
    people, tmp_path, content, changes, words
):
    file = tmp_path / "vit.pth"
    if content is not None:
        file.write_bytes(content)
    text = refusal(request_of(people, torch_weights=str(file), **changes))
    for word in words:
        assert word in text


def test_a_file_that_cannot_be_written_after_the_work_is_told(run, people, tmp_path):
    (tmp_path / "retrieval.json").mkdir()
    with pytest.raises(RunError, match="retrieval.json could not be written"):
        evaluation.evaluate(request_of(people, workdir=run, out=str(tmp_path)))


def test_the_scores_of_a_run_are_not_replaced(run, people):
    assert "is the folder of a run" in refusal(
        dataclasses.replace(request_of(people, workdir=run), out=str(run))
    )


def test_features_of_which_nothing_is_left_are_told(run, tmp_path):
    """Each camera has the same picture twice: less their mean, both are zero."""
    for part, camera in (("query", 1), ("bounding_box_test", 2)):
        (tmp_path / part).mkdir()
        for who in (1, 2):
            image = pedestrian.encode_pedestrian(0, 1, camera, 0)
            (tmp_path / part / f"000{who}_c{camera}.jpg").write_bytes(image)
    with pytest.raises(RunError, match="a feature is zero or not finite"):
        evaluation.evaluate(request_of(str(tmp_path), workdir=run, centre_cameras=True))


def test_features_that_are_not_finite_are_told(people, tmp_path):
    cfg: Config = small_config()
    encoder = trained_like(cfg.encoder)
    encoder["norm"]["scale"][:] = np.nan
    make_run(tmp_path, cfg, {0: (encoder, encoder)})
    with pytest.raises(RunError, match="a feature is zero or not finite"):
        evaluation.evaluate(request_of(people, workdir=str(tmp_path)))
