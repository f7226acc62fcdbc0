"""Exports of a run without labels: its batch norm, in the hands of who loads them."""

import dataclasses

import exported
import jax
import numpy as np
import pytest
from etils import epath
from unlabelled import tiny_unsupervised

from personmae_jax import sharding
from personmae_jax.config_json import config_to_json
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.pytorch import verification
from personmae_jax.pytorch.export import export
from personmae_jax.reid.features import make_neck_encode
from personmae_jax.unsupervised.program import build


@pytest.fixture(scope="module")
def learnt() -> dict:
    """Parameters and statistics that are far from those at the start."""
    rng = np.random.default_rng(0)
    scale, mean, var = rng.uniform(0.5, 1.5, (3, 16)).astype(np.float32)
    encoder = exported.trained_like(tiny_unsupervised().encoder)
    return {
        "params": {"encoder": encoder, "bottleneck": {"scale": scale}},
        "statistics": {"mean": mean, "var": var},
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, learnt):
    """Of a run that was saved after 7 steps."""
    cfg, folder = tiny_unsupervised(), epath.Path(tmp_path_factory.mktemp("run"))
    (folder / "config.json").write_text(config_to_json(cfg))
    state = build(cfg, sharding.make_mesh(), num_images=72).init_state()
    about = dataclasses.asdict(cfg)
    with Checkpoints(folder, keep=1, config=about) as checkpoints:
        checkpoints.save(7, dataclasses.replace(state, **learnt))
    return folder


def peer(layout: str, num_patches: int):
    """The network that code of a layout would load the file into."""
    from torch import nn

    from personmae_jax.pytorch.vit import VisionTransformer

    vit = VisionTransformer(tiny_unsupervised().encoder, num_patches)
    if layout == "cluster-contrast":
        vit.bottleneck = nn.BatchNorm1d(16)
        return nn.DataParallel(vit)
    network = nn.Module()
    network.base, network.bottleneck = vit, nn.BatchNorm1d(16)
    network.classifier = nn.Linear(16, 5, bias=False)
    return network


@pytest.mark.parametrize("layout", ["cluster-contrast", "transreid"])
def test_a_peer_s_network_takes_every_tensor_and_gives_the_feature_of_jax(
    workdir, learnt, tmp_path, layout
):
    torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")
    file, cfg = tmp_path / "file.pth", tiny_unsupervised()
    told = export(workdir, file, layout=layout)
    assert "Verified" in told
    assert "and the feature of unit length after the batch norm is within" in told
    card = (tmp_path / "file.pth.md").read_text()
    assert "trained without labels" in card
    assert "the encoder's tensors and the batch norm's after it, float32" in card
    content, network = torch.load(file, weights_only=True), peer(layout, 8)
    if layout == "cluster-contrast":
        assert content.keys() == {"state_dict", "meta"}
        network.load_state_dict(content["state_dict"], strict=True)
        vit, neck = network.module, network.module.bottleneck
    else:
        told = network.load_state_dict(content, strict=False)
        assert told == (["classifier.weight"], [])  # missing, and not known to it
        vit, neck = network.base, network.bottleneck
    assert neck.num_batches_tracked == 7
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 16, 3), np.uint8)
    encode = jax.jit(make_neck_encode(cfg.encoder, cfg.data, "cls", "float32"))
    expected = encode(learnt, images, np.zeros(6, np.int32))
    pixels = (images / 255 - cfg.data.mean) / np.array(cfg.data.std)
    with torch.inference_mode():
        pixels = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
        found = neck.eval()(vit.eval()(pixels)[:, 0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_file_whose_batch_norm_says_something_else_is_not_written(
    workdir, tmp_path, monkeypatch
):
    pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")
    read_back = verification.read_back

    def other(path):
        tensors, neck = read_back(path)
        return tensors, neck | {"running_mean": neck["running_mean"] + 0.1}

    monkeypatch.setattr(verification, "read_back", other)
    with pytest.raises(RunError, match="other tokens than the checkpoint in JAX"):
        export(workdir, tmp_path / "file.pth", layout="cluster-contrast")
    assert not (tmp_path / "file.pth").exists()


@pytest.mark.parametrize("feature", ["mean", "stripes"])
def test_a_batch_norm_after_another_feature_is_not_exported_as_that_of_cls(
    tmp_path, feature
):
    cfg = tiny_unsupervised()
    cfg.head.feature = feature
    (tmp_path / "config.json").write_text(config_to_json(cfg))
    with pytest.raises(
        ConfigError, match=f"trained with config.head.feature={feature}"
    ):
        export(tmp_path, tmp_path / "file.pth", layout="cluster-contrast")
