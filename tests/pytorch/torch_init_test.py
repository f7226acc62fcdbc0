"""A run that starts from a file: its first state, and what a resume needs."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import torch_files
from exported import make_run, trained_like, vit_config
from launching import TINY, pretrain
from tiny import tiny_batch, tiny_config
from torch_files import save_torch
from workdir_test import open_workdir

import personmae_jax
from personmae_jax import sharding
from personmae_jax.data.records import open_records
from personmae_jax.engine.checkpoint import restore_encoder
from personmae_jax.errors import ConfigError
from personmae_jax.optim import decay_mask
from personmae_jax.pretrain import program
from personmae_jax.pretrain.run import run
from personmae_jax.pytorch.export import export
from personmae_jax.pytorch.importer import read_encoder
from personmae_jax.pytorch.read import open_file


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run whose file has learned positions, and what that file holds."""
    cfg = tiny_config()
    cfg.encoder.learned_positions, cfg.optim.warmup = True, 0.0
    tensors = torch_files.make_tensors(cfg)
    tensors["pos_embed"] = torch_files.learned_table(cfg, 8)
    file = tmp_path_factory.mktemp("file") / "f.pth"
    cfg.init.torch_weights = str(save_torch(file, tensors))
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    return program.build(cfg, mesh, num_steps=1500), read_encoder(cfg)[0]


def test_student_and_teacher_start_from_the_file_and_nothing_else_does(imported):
    run, params = imported
    state = run.init_state(sharding.replicate(params, run.mesh))
    assert_same(jax.device_get(state.params["encoder"]), params)
    assert_same(jax.device_get(state.teacher_params), params)
    random = run.init_state()
    for name in ("pixel_predictor", "feature_predictor"):
        assert_same(*jax.device_get((state.params[name], random.params[name])))
    assert_same(*jax.device_get((state.opt_state, random.opt_state)))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, random
    )


def test_a_step_after_the_file_trains_the_student_and_lags_in_the_teacher(imported):
    run, params = imported
    encoder = sharding.replicate(params, run.mesh)
    state = run.init_state(encoder)
    batch = sharding.to_devices(tiny_batch(run.cfg), run.mesh)
    state, _ = run.train_step(state, batch)
    student, teacher = (
        jax.device_get(x)["pos_embed"]
        for x in (state.params["encoder"], state.teacher_params)
    )
    moved = np.abs(student - params["pos_embed"])
    assert (moved.max(axis=(0, 2)) > 0).all(), "every row is trained, that of cls too"
    np.testing.assert_allclose(
        teacher - params["pos_embed"], (student - params["pos_embed"]) / 3, atol=1e-6
    )
    assert_same(jax.device_get(encoder), params)  # not taken over by the step


def test_learned_positions_have_no_weight_decay(imported):
    mask = decay_mask(imported[1])
    assert mask["pos_embed"] is False
    assert mask["patch_embed"]["kernel"] is True


def test_a_bad_file_is_told_before_any_device_work(tmp_path, monkeypatch):
    cfg = tiny_config()
    cfg.init.torch_weights = str(tmp_path / "none.pth")
    monkeypatch.setattr(sharding, "make_mesh", lambda: pytest.fail("device work"))
    with pytest.raises(ConfigError) as refused:
        run(cfg, str(tmp_path / "run"), open_records(cfg.data))
    assert str(refused.value) == (
        f"config.init.torch_weights={tmp_path}/none.pth: there is no such file"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_from_another_file_does_not_go_on_in_the_same_workdir(tmp_path):
    cfg = tiny_config()
    cfg.init.torch_weights = "a.pth"
    with open_workdir(tmp_path, cfg):
        pass
    cfg.export.weights = "teacher"  # changes nothing that is computed
    with open_workdir(tmp_path, cfg):
        pass
    cfg.init.torch_weights = "b.pth"
    with pytest.raises(ConfigError, match='torch_weights: "a.pth" there, "b.pth" here'):
        open_workdir(tmp_path, cfg).__enter__()


def digests(path) -> dict[str, str]:
    tree = open_file(path).tree
    tensors = tree.get("model", tree)
    return {
        name: hashlib.sha256(stored.array().tobytes()).hexdigest()
        for name, stored in tensors.items()
    }


@pytest.mark.slow
def test_a_run_really_starts_from_an_exported_file(tmp_path, cache):
    pytest.importorskip("torch", reason="torch is not installed")
    first, second = tmp_path / "first", tmp_path / "second"
    file = tmp_path / "first.pth"
    cfg = vit_config(16, 1, 2, patch_size=8)  # as TINY
    cfg.data.height, cfg.data.width = 32, 16
    make_run(first, cfg, {3: tuple(trained_like(cfg.encoder, s) for s in (0, 1))})
    export(first, file)

    words = (
        *(*TINY, "--config.train.steps=3", "--config.checkpoint.every_steps=1"),
        f"--config.init.torch_weights={file}",
    )
    begun = pretrain(second, *words, env=cache | {"PYTHONPATH": ""})
    assert begun.returncode == 0, begun.stderr
    assert f"Encoder from {file} (model)." in begun.stdout
    trained = restore_encoder(first, 3)
    assert_same(restore_encoder(second, 0), trained)
    assert_same(restore_encoder(second, 0, "teacher"), trained)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 3), np.uint8)
    tokens = [
        apply(params, images)
        for params, apply in (
            personmae_jax.load_encoder(str(first)),
            personmae_jax.load_encoder(str(second), step=0),
        )
    ]
    np.testing.assert_array_equal(*tokens)

    # Export, import, export: the same bytes of tensors.
    export(second, tmp_path / "second.pth", step=0)
    assert digests(tmp_path / "second.pth") == digests(file)

    # Resumed from step 0, without the file: the same run.
    def last_row():
        return json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])

    row = last_row()
    for step in (1, 2, 3):
        shutil.rmtree(second / "checkpoints" / str(step))
    file.rename(tmp_path / "elsewhere.pth")
    resumed = pretrain(second, *words, env=cache | {"PYTHONPATH": ""})
    assert resumed.returncode == 0, resumed.stderr
    assert "Encoder from" not in resumed.stdout
    assert last_row()["params_sha256"] == row["params_sha256"]
