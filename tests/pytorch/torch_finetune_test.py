"""The chain that a PyTorch user walks: pretrained here, exported, fine-tuned there."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from exported import make_run, small_config, trained_like

import personmae_jax
from personmae_jax.config import SyntheticConfig
from personmae_jax.data import images
from personmae_jax.data.images import Box
from personmae_jax.pytorch.export import export
from personmae_jax.reid import datasets, retrieval

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the fine-tuning is in PyTorch")

ROOT = pathlib.Path(__file__).parents[2]


def _run(*command: str, code: int = 0) -> subprocess.CompletedProcess:
    process = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == code, process.stderr
    return process


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """Workdir of a run, with its export in `export.pth`."""
    workdir, cfg = tmp_path_factory.mktemp("run"), small_config()
    student, teacher = (trained_like(cfg.encoder, seed) for seed in range(2))
    make_run(workdir, cfg, {7: (student, teacher)})
    export(workdir, workdir / "export.pth")
    return workdir


def _finetune(weights, *flags: str, code: int = 0) -> subprocess.CompletedProcess:
    flags = ("--steps=2", "--seeds=2", *flags)
    return _run(
        "benchmarks/torch_finetune.py", f"--weights={weights}", *flags, code=code
    )


def _frozen_scores(workdir, cfg: SyntheticConfig, num_train: int) -> retrieval.Scores:
    """What JAX's cls tokens of a run retrieve."""
    dataset = datasets.synthetic_dataset(cfg, num_train)
    params, apply = personmae_jax.load_encoder(str(workdir))
    features, people = [], []
    for part in (dataset.query, dataset.gallery):
        pixels = np.empty((len(part), 32, 16, 3), np.uint8)
        for n, index in enumerate(part.tolist()):
            image, _ = images.decode(
                dataset.records.read(index), max_pixels=10**6, min_side=8
            )
            images.crop_resize(image, Box(0, 0, *image.shape[:2]), out=pixels[n])
        features.append(np.asarray(apply(params, pixels))[:, 0])
        people.append(retrieval.people_in(dataset, part))
    return retrieval.score(retrieval.cosine_distances(*features), *people)


def test_fine_tuning_starts_from_the_network_that_was_pretrained(run):
    process = _finetune(run / "export.pth", "--identities=4", "--json")
    results = json.loads(process.stdout.splitlines()[-1])
    cfg = SyntheticConfig(identities=8, cameras=3, first_identity=1_000_000)
    expected = _frozen_scores(run, cfg, num_train=4)
    for scores in results["export"]:
        assert scores["before"]["mAP"] == pytest.approx(expected.mAP, abs=1e-3)
        assert scores["after"] != scores["before"]
    for scores in results["random"]:
        assert abs(scores["before"]["mAP"] - expected.mAP) > 1e-3
    assert results["random"][0]["before"] != results["random"][1]["before"]
    mean = 100 * np.mean([scores["after"]["mAP"] for scores in results["export"]])
    (row,) = [x for x in process.stdout.splitlines() if x.startswith("| export")]
    assert f" {mean:.1f} (" in row


def test_fine_tuning_reads_a_folder_of_identities(run, tmp_path):
    cfg = SyntheticConfig(identities=4, cameras=2, shots=2)
    drawn = datasets.synthetic_dataset(cfg).records
    for index in range(len(drawn)):
        identity, (camera, shot) = index // 4, divmod(index % 4, 2)
        folder = tmp_path / ("train" if identity < 2 else "val") / str(identity)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{camera}_{shot}.jpg").write_bytes(drawn.read(index))
    process = _finetune(run / "export.pth", f"--data={tmp_path}")
    assert "8 images to train on, 4 queries, 4 in the gallery" in process.stdout


def test_fine_tuning_refuses_a_file_that_does_not_fit(run, tmp_path):
    content = torch.load(run / "export.pth", weights_only=True)
    del content["model"]["blocks.1.mlp.fc2.bias"]
    torch.save(content, tmp_path / "lacking.pth")
    error = _finetune(tmp_path / "lacking.pth", code=2).stderr
    assert error.startswith("error: --weights=")
    assert "blocks.1.mlp.fc2.bias" in error
    assert len(error.splitlines()) == 1
