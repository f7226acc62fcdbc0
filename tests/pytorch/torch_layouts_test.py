"""Every layout holds exactly what its readers look at."""

import json

import exported
import numpy as np
import pytest

from personmae_jax.errors import RunError
from personmae_jax.pytorch import export, verification, weights
from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.model_card import describe_export

torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")

ABOUT = {
    "config": {},
    "git_revision": "0123abc",
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
}
# Loaders of ReID code act on these.
FORBIDDEN = {
    *("arch", "args", "epoch", "optimizer", "encoder", "teacher", "module"),
    *("model_ema", "state_dict_ema", "state_dict"),
}


class Case:
    def __init__(self):
        self.cfg = exported.small_config()
        params = exported.trained_like(self.cfg.encoder)
        self.tensors = export.encoder_tensors(self.cfg, params, self.cfg.grid)
        self.meta = describe_export(self.cfg, self.cfg.grid, "teacher", 1200, ABOUT)

    def write(self, path, layout: str):
        path = path / ("file" + "".join(LAYOUTS[layout].suffixes[:1]))
        LAYOUTS[layout].write(path, self.tensors, self.meta)
        return path


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def assert_plain(tensors) -> None:
    for name, tensor in tensors.items():
        assert type(tensor) is torch.Tensor, name
        assert tensor.dtype == torch.float32, name
        assert tensor.is_contiguous(), name
        assert not tensor.requires_grad, name
        # A view would carry the storage of another tensor into the file.
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_may_be_read_by_whoever_may_read_new_files(case, tmp_path, layout):
    path = case.write(tmp_path, layout)
    (tmp_path / "new").touch()
    for file in [path] if path.is_file() else path.iterdir():
        assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, file.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_back_is_what_was_written(case, tmp_path, layout):
    back, _ = verification.read_back(case.write(tmp_path, layout))
    assert back.keys() == case.tensors.keys()
    for name, tensor in case.tensors.items():
        assert back[name].tobytes() == tensor.tobytes(), name


def test_a_folder_may_be_called_as_a_file_is(case, tmp_path):
    LAYOUTS["huggingface"].write(tmp_path / "vit.pth", case.tensors, case.meta)
    back, _ = verification.read_back(tmp_path / "vit.pth")
    assert back.keys() == case.tensors.keys()


def test_mae_is_model_and_meta_and_nothing_else(case, tmp_path):
    file = torch.load(case.write(tmp_path, "mae"), weights_only=True)
    assert set(file) == {"model", "meta"}
    assert list(file["model"]) == list(
        weights.tensor_shapes(case.cfg.encoder, case.cfg.grid)
    )
    assert_plain(file["model"])


@pytest.mark.parametrize("layout", ["mae", "flat", "pass"])
def test_no_key_is_one_that_loaders_act_on(case, tmp_path, layout):
    file = torch.load(case.write(tmp_path, layout), weights_only=True)
    assert not FORBIDDEN & set(file)


def test_meta_holds_primitives_only(case, tmp_path):
    meta = torch.load(case.write(tmp_path, "mae"), weights_only=True)["meta"]
    for name, value in meta.items():
        values = value if type(value) is list else [value]
        assert {type(v) for v in values} <= {str, int, float}, name
    assert meta == case.meta
    assert meta["weights"] == "teacher"
    assert meta["step"] == 1200
    assert meta["grid"] == meta["trained_grid"] == [8, 4]
    assert meta["mean"] == [0.485, 0.456, 0.406]
    assert meta["std"] == [0.229, 0.224, 0.225]
    assert json.loads(meta["config"])["encoder"]["width"] == 32
    assert "jax 0.10.2" in meta["versions"]


def test_flat_is_the_bare_dict(case, tmp_path):
    file = torch.load(case.write(tmp_path, "flat"), weights_only=True)
    assert file.keys() == case.tensors.keys()
    assert_plain(file)


def test_the_same_export_gives_the_same_bytes(case, tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    first.mkdir()
    second.mkdir()
    files = [case.write(folder, "mae") for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_pass_splits_the_positions_and_copies_cls_into_parts(case, tmp_path):
    file = torch.load(case.write(tmp_path, "pass"), weights_only=True)
    assert set(file) == {"model", "meta"}
    tensors, d = file["model"], case.cfg.encoder.width
    assert_plain(tensors)
    added = {"cls_pos"}
    added |= {f"part{i}_pos" for i in (1, 2, 3)}
    added |= {f"part_token{i}" for i in (1, 2, 3)}
    assert tensors.keys() == case.tensors.keys() | added
    assert all(tensors[name].shape == (1, 1, d) for name in added)
    positions = case.tensors["pos_embed"]
    np.testing.assert_array_equal(tensors["pos_embed"], positions[:, 1:])
    for i in (1, 2, 3):
        np.testing.assert_array_equal(
            tensors[f"part_token{i}"], case.tensors["cls_token"]
        )
        np.testing.assert_array_equal(tensors[f"part{i}_pos"], positions[:, :1])


@pytest.mark.parametrize("name", ["part_token2", "part3_pos"])
def test_parts_of_pass_that_are_not_those_of_cls_are_not_verified(case, tmp_path, name):
    path = case.write(tmp_path, "pass")
    file = torch.load(path, weights_only=True)
    file["model"][name][0, 0, 0] += 1
    torch.save(file, path)
    with pytest.raises(RunError, match=f"{name} differs from cls"):
        verification.read_back(path)


def test_safetensors_tells_of_itself(case, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(case.write(tmp_path, "safetensors"), "numpy") as file:
        assert set(file.keys()) == case.tensors.keys()
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["weights"] == "teacher"
    assert json.loads(metadata["grid"]) == [8, 4]


def test_a_contiguity_that_was_lost_is_found(case, tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(2, 3).T}, path)
    with pytest.raises(Exception, match="a is not contiguous"):
        verification.read_back(path)
