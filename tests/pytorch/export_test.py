"""The command from a run to a file: what it writes, refuses, and never leaves."""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import exported
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from personmae_jax.errors import ConfigError, RunError
from personmae_jax.models import personmae
from personmae_jax.pixels import patchify
from personmae_jax.pytorch import export as export_module
from personmae_jax.pytorch import verification, weights
from personmae_jax.pytorch.export import export
from personmae_jax.pytorch.layouts import LAYOUTS

ROOT = pathlib.Path(__file__).parents[2]
OF_ENCODERS = [name for name, layout in LAYOUTS.items() if not layout.has_neck]


@pytest.fixture(scope="module")
def encoders():
    """(student, teacher) by step."""
    encoder = exported.small_config().encoder
    trained = [exported.trained_like(encoder, seed) for seed in range(4)]
    return {10: tuple(trained[:2]), 20: tuple(trained[2:])}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, encoders):
    folder = tmp_path_factory.mktemp("run")
    exported.make_run(folder, exported.small_config(), encoders)
    return folder


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


needs_torch = pytest.mark.skipif(
    not export_module._has_torch(), reason="needs torch: requirements-torch.txt"
)


def read(file):
    return verification.read_back(file)[0]


def tensors_of(params, cfg=None):
    return export_module.encoder_tensors(
        cfg or exported.small_config(), params, exported.small_config().grid
    )


def assert_holds(file, params) -> None:
    for name, tensor in tensors_of(params).items():
        np.testing.assert_array_equal(read(file)[name], tensor)


def left_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@needs_torch
@pytest.mark.parametrize("layout", OF_ENCODERS)
def test_every_layout_is_written_verified_with_a_card(workdir, tmp_path, layout):
    suffix = "".join(LAYOUTS[layout].suffixes[:1])
    file = tmp_path / f"vit{suffix}"
    told = export(workdir, file, layout=layout)
    assert LAYOUTS[layout].verified + ": read back and run in plain PyTorch" in told
    assert ("Verified: " in told) == (layout != "pass")  # its part tokens take part
    if layout == "huggingface":
        assert left_in(tmp_path) == {"vit"}
        assert left_in(file) == {
            *("config.json", "model.safetensors", "preprocessor_config.json"),
            "README.md",
        }
        card = file / "README.md"
    else:
        card = tmp_path / f"vit{suffix}.md"
        assert left_in(tmp_path) == {file.name, card.name}
    text = card.read_text()
    assert "Verified" in text
    assert "student after step 20" in text
    assert '"seed": 0' in text


def test_student_of_the_latest_step_by_default_or_as_told(workdir, encoders, tmp_path):
    file = tmp_path / "vit.safetensors"
    export(workdir, file, layout="safetensors")
    assert_holds(file, encoders[20][0])
    export(workdir, file, layout="safetensors", step=10, weights="teacher")
    assert_holds(file, encoders[10][1])


def test_the_settings_choose_the_weights(tmp_path, encoders):
    cfg = exported.small_config()
    cfg.export.weights = "teacher"
    exported.make_run(tmp_path / "run", cfg, encoders)
    export(tmp_path / "run", tmp_path / "vit.safetensors", layout="safetensors")
    assert_holds(tmp_path / "vit.safetensors", encoders[20][1])


def test_a_grid_of_more_patches_than_attention_takes_is_refused(workdir, tmp_path):
    with pytest.raises(ConfigError, match="--grid=999x999 makes 998001 patches"):
        export(
            workdir, tmp_path / "a.safetensors", layout="safetensors", grid=(999, 999)
        )


def test_another_grid_gets_its_own_positions(workdir, tmp_path):
    file = tmp_path / "vit.safetensors"
    export(workdir, file, layout="safetensors", grid=(6, 6))
    table = weights.position_table(32, (8, 4), (6, 6))
    np.testing.assert_array_equal(read(file)["pos_embed"], table)


@needs_torch
def test_learned_positions_are_exported_and_resampled(tmp_path):
    cfg = exported.small_config()
    cfg.encoder.learned_positions = True
    table = np.random.default_rng(0).standard_normal((1, 33, 32), np.float32)
    params = exported.trained_like(cfg.encoder) | {"pos_embed": table}
    exported.make_run(tmp_path / "run", cfg, {1: (params, params)})
    export(tmp_path / "run", tmp_path / "vit.pth")
    np.testing.assert_array_equal(read(tmp_path / "vit.pth")["pos_embed"], table)
    export(tmp_path / "run", tmp_path / "grid.pth", grid=(4, 4))
    resampled = read(tmp_path / "grid.pth")["pos_embed"]
    assert resampled.shape == (1, 17, 32)
    np.testing.assert_array_equal(resampled[:, 0], table[:, 0])  # cls
    assert "learned" in (tmp_path / "grid.pth.md").read_text()


def test_the_reference_holds_inputs_and_the_answers_of_jax(workdir, encoders, tmp_path):
    npz = tmp_path / "reference.npz"
    export(workdir, tmp_path / "a.safetensors", layout="safetensors", reference=npz)
    with np.load(npz) as arrays:
        images, tokens = arrays["images"], arrays["tokens"]
    assert images.shape == (6, 32, 16, 3)
    assert tokens.shape == (6, 33, 32)
    assert images.dtype == tokens.dtype == np.float32
    with jax.default_matmul_precision("highest"):
        expected = personmae.encode(
            exported.small_config().encoder,
            exported.small_config().grid,
            jax.tree.map(jnp.asarray, encoders[20][0]),
            patchify(jnp.asarray(images), 4),
        )
    np.testing.assert_allclose(tokens, expected.tokens, rtol=0, atol=1e-5)


@needs_torch
def test_what_pytorch_disputes_is_not_written(workdir, tmp_path, monkeypatch):
    old = tmp_path / "vit.pth"
    old.write_bytes(b"older")
    write = weights.encoder_to_torch

    def untransposed(params, pos_embed):
        tensors = write(params, pos_embed)
        name = "blocks.1.attn.proj.weight"
        return tensors | {name: np.ascontiguousarray(tensors[name].T)}

    monkeypatch.setattr(weights, "encoder_to_torch", untransposed)
    with pytest.raises(RunError, match="gives other tokens"):
        export(workdir, old, reference=tmp_path / "reference.npz")
    assert left_in(tmp_path) == {"vit.pth"}
    assert old.read_bytes() == b"older"


@needs_torch
@pytest.mark.parametrize("layout", OF_ENCODERS)
def test_a_full_disk_is_said_and_leaves_nothing(workdir, tmp_path, layout):
    suffix = "".join(LAYOUTS[layout].suffixes[:1])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(RunError, match="vit.* could not be written .*too large"):
            export(workdir, tmp_path / f"vit{suffix}", layout=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left_in(tmp_path) == set()


def test_a_reference_that_cannot_be_written_leaves_nothing(
    workdir, tmp_path, monkeypatch
):
    def full(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError, match="a.npz could not be written .*No space left"):
        export(
            workdir,
            tmp_path / "vit.safetensors",
            layout="safetensors",
            reference=tmp_path / "a.npz",
        )
    assert left_in(tmp_path) == set()


@needs_torch
def test_an_older_file_is_replaced(workdir, encoders, tmp_path):
    file = tmp_path / "vit.pth"
    file.write_bytes(b"older")
    export(workdir, file)
    assert_holds(file, encoders[20][0])


class Killed(BaseException):
    """As a process that is killed, this leaves whatever is there."""


def test_what_a_killed_export_leaves_is_gone_after_the_next(
    workdir, tmp_path, monkeypatch
):
    file, reference = tmp_path / "vit.safetensors", tmp_path / "a.npz"
    arguments = {"layout": "safetensors", "reference": reference}
    with monkeypatch.context() as patch:

        def kill(*_, **__):
            raise Killed

        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(export_module, "model_card", kill)
        with pytest.raises(Killed):
            export(workdir, file, **arguments)
    assert left_in(tmp_path) - {"a.npz"} == {".vit.safetensors.export"}
    (tmp_path / "a.npz.part").write_bytes(b"half")
    export(workdir, file, **arguments)
    assert left_in(tmp_path) == {"vit.safetensors", "vit.safetensors.md", "a.npz"}


def test_numbers_that_are_not_finite_are_refused(tmp_path, encoders):
    broken = jax.tree.map(np.copy, encoders[10][0])
    broken["blocks_1"]["mlp"]["fc1"]["bias"][3] = np.nan
    exported.make_run(
        tmp_path / "run", exported.small_config(), {5: (broken, encoders[10][1])}
    )
    with pytest.raises(RunError, match="not finite.*blocks_1/mlp/fc1/bias"):
        export(tmp_path / "run", tmp_path / "a.safetensors", layout="safetensors")
    assert left_in(tmp_path) == {"run"}


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, encoders):
    cfg = exported.small_config()
    cfg.encoder.depth = 2
    exported.make_run(tmp_path / "run", cfg, encoders)
    with pytest.raises(RunError, match="not those of the run's config.json"):
        export(tmp_path / "run", tmp_path / "a.safetensors", layout="safetensors")


@pytest.mark.parametrize(
    ("out", "arguments", "sentence"),
    [
        ("a.pth", {"layout": "onnx"}, "--layout=onnx is unknown; choose one of mae"),
        ("a.bin", {"layout": "safetensors"}, "must end in .safetensors"),
        ("a.pth", {"layout": "safetensors"}, "must end in .safetensors"),
        ("gs://bucket/a.safetensors", {"layout": "safetensors"}, "is not local"),
        ("folder.safetensors", {"layout": "safetensors"}, "is a folder; name a file"),
        ("a.safetensors/b.safetensors", {"layout": "safetensors"}, "cannot be written"),
        ("b.safetensors", {"layout": "safetensors", "weights": "ema"}, "weights='ema'"),
        (
            "b.safetensors",
            {"layout": "safetensors", "reference": "x.npy"},
            "--reference=x.npy must end in .npz",
        ),
    ],
)
def test_wrong_arguments_are_refused(
    workdir, tmp_path, monkeypatch, out, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"older")
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        export(workdir, out, **arguments)
    assert left_in(tmp_path) == {"folder.safetensors", "a.safetensors"}


@needs_torch
def test_a_folder_that_holds_something_is_not_touched(workdir, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        export(workdir, tmp_path, layout="huggingface")
    assert left_in(tmp_path) == {"mine"}


def test_a_missing_run_or_step_is_said(workdir, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="holds no run"):
        export(tmp_path, file, layout="safetensors")
    with pytest.raises(ConfigError, match="no whole checkpoint of step 3; there are"):
        export(workdir, file, layout="safetensors", step=3)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("layout", ["mae", "flat", "pass", "huggingface"])
def test_without_torch_other_layouts_are_refused(workdir, tmp_path, layout):
    with pytest.raises(ConfigError, match="needs torch; pip install -r requirements-t"):
        export(workdir, tmp_path / "vit", layout=layout)


@pytest.mark.usefixtures("without_torch")
def test_without_torch_safetensors_is_written_and_called_unverified(
    workdir, encoders, tmp_path
):
    file = tmp_path / "vit.safetensors"
    told = export(workdir, file, layout="safetensors")
    assert "NOT verified" in told
    assert "NOT verified" in (tmp_path / "vit.safetensors.md").read_text()
    assert_holds(file, encoders[20][0])


@pytest.mark.usefixtures("without_torch")
def test_without_torch_the_file_is_still_read_back(workdir, tmp_path, monkeypatch):
    read_back = verification.read_back

    def lossy(path):
        tensors, neck = read_back(path)
        return tensors | {"norm.bias": np.zeros(32, np.float32)}, neck

    monkeypatch.setattr(verification, "read_back", lossy)
    with pytest.raises(RunError, match="reads back otherwise"):
        export(workdir, tmp_path / "vit.safetensors", layout="safetensors")
    assert left_in(tmp_path) == set()


def test_a_path_that_loaders_misread_is_warned_of(workdir, tmp_path):
    told = export(workdir, tmp_path / "distilled.safetensors", layout="safetensors")
    assert 'WARNING: the path contains "distilled"' in told
    told = export(workdir, tmp_path / "vit.safetensors", layout="safetensors")
    assert "WARNING" not in told


def run_command(*arguments: str, before: str = "pass") -> subprocess.CompletedProcess:
    """The launcher as people start it; `before` is run in its process first."""
    start = (
        f"import runpy, sys; {before}; sys.path.insert(0, 'launch'); "
        f"sys.argv = ['launch/export_torch.py', *{arguments!r}]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", start],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_works_where_torch_cannot_be_imported(workdir, encoders, tmp_path):
    file = tmp_path / "vit.safetensors"
    done = run_command(
        f"--workdir={workdir}",
        f"--out={file}",
        "--layout=safetensors",
        "--grid=8x4",
        before="sys.modules['torch'] = None",
    )
    assert done.returncode == 0, done.stderr
    assert "NOT verified" in done.stdout
    assert_holds(file, encoders[20][0])
    refused = run_command(
        f"--workdir={workdir}",
        f"--out={tmp_path}/vit.pth",
        before="sys.modules['torch'] = None",
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --layout=mae needs torch;")
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_exit_codes_of_the_command(workdir, tmp_path, tmp_path_factory):
    out = f"--out={tmp_path}/vit.safetensors"
    damaged = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(workdir, damaged)
    next((damaged / "checkpoints" / "20" / "state" / "d").iterdir()).unlink()
    for code, arguments in [
        (2, [out]),
        (2, [f"--workdir={workdir}", out, "--grid=16"]),
        (2, [f"--workdir={workdir}", out, "--layout=safetensors", "--step=3"]),
        (1, [f"--workdir={damaged}", out, "--layout=safetensors"]),
    ]:
        done = run_command(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
    assert left_in(tmp_path) == set()


def test_meta_is_told_in_the_file(workdir, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    file = tmp_path / "vit.safetensors"
    export(workdir, file, layout="safetensors", grid=(6, 6), weights="teacher")
    with safetensors.safe_open(file, "numpy") as opened:
        meta = opened.metadata()
    assert json.loads(meta["grid"]) == [6, 6]
    assert json.loads(meta["trained_grid"]) == [8, 4]
    assert json.loads(meta["image_size"]) == [24, 24]
    assert meta["weights"] == "teacher"
    assert json.loads(meta["step"]) == 20
    assert any(line.startswith("jax ") for line in json.loads(meta["versions"]))


def test_a_head_that_only_a_checkpoint_describes_is_not_believed(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/20"
    about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    about["custom_metadata"]["config"]["head"] = "use_cameras"
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    (folder / "state/digests.json").unlink()  # as of an earlier version
    told = export(tmp_path / "run", tmp_path / "a.safetensors", layout="safetensors")
    assert "camera" not in told
