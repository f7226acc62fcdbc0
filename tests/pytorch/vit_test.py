"""Parity of JAX and PyTorch, and that every usual mistake is found."""

import exported
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")

from personmae_jax.errors import RunError  # noqa: E402
from personmae_jax.pytorch import verification, vit, weights  # noqa: E402
from personmae_jax.pytorch.layouts import LAYOUTS  # noqa: E402


class Case:
    """An encoder, its tensors, and JAX's answers."""

    def __init__(self, cfg, grid=None):
        self.cfg, grid = cfg, grid or cfg.grid
        params = exported.trained_like(cfg.encoder)
        table = weights.position_table(cfg.encoder.width, cfg.grid, grid)
        self.tensors = weights.encoder_to_torch(params, table)
        self.examples = verification.make_examples(cfg, params, grid, table)

    def deviation(self) -> float:
        tokens = vit.encode(self.cfg.encoder, self.tensors, self.examples.images)
        return float(np.abs(tokens - self.examples.tokens).max())

    def verify(self, tensors, folder) -> str:
        LAYOUTS["flat"].write(folder / "vit.pth", tensors, {})
        return verification.verify(
            *("Verified", folder / "vit.pth", self.cfg, self.examples)
        )


@pytest.fixture(scope="module")
def small() -> Case:
    return Case(exported.small_config())


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(verification, "NUM_NOISE", 1)
    monkeypatch.setattr(verification, "NUM_PEDESTRIANS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("size", exported.SIZES)
def test_every_token_of_a_full_size_vit_agrees_with_jax(size):
    case = Case(exported.vit_config(*exported.SIZES[size]))
    assert case.examples.tokens.shape == (2, 129, case.cfg.encoder.width)
    # Float32 sums of up to 3,072 terms in another order, 12 blocks deep.
    assert case.deviation() < 2e-5


@pytest.mark.parametrize("grid", [None, (14, 14), (12, 4), (3, 5)])
def test_every_token_agrees_on_any_grid(grid):
    case = Case(exported.small_config(), grid)
    assert case.deviation() < 5e-6


def test_examples_are_noise_and_drawn_pedestrians_normalised(small):
    images = small.examples.images
    assert images.shape == (6, 32, 16, 3)
    assert images.dtype == np.float32
    noise, drawn = images[:2], images[2:]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    pixels = drawn * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406])
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-3)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    # Neighbours are alike in photographs, and in noise they are not.
    assert np.abs(np.diff(drawn, axis=1)).mean() < np.abs(np.diff(noise, axis=1)).mean()


def test_the_right_tensors_are_verified(small, tmp_path):
    assert small.verify(small.tensors, tmp_path).startswith("Verified")


def untransposed_proj(tensors):
    return {"blocks.1.attn.proj.weight": tensors["blocks.1.attn.proj.weight"].T.copy()}


def keys_before_queries(tensors):
    q, k, v = np.split(tensors["blocks.0.attn.qkv.weight"], 3)
    return {"blocks.0.attn.qkv.weight": np.concatenate([k, q, v])}


def values_before_keys(tensors):
    q, k, v = np.split(tensors["blocks.0.attn.qkv.weight"], 3)
    return {"blocks.0.attn.qkv.weight": np.concatenate([q, v, k])}


def heads_inside_of_channels(tensors):
    weight = tensors["blocks.2.attn.qkv.weight"]
    moved = weight.reshape(3, 4, 8, -1).transpose(0, 2, 1, 3).reshape(weight.shape)
    return {"blocks.2.attn.qkv.weight": moved.copy()}


def column_major_positions(tensors):
    cls, patches = np.split(tensors["pos_embed"], [1], axis=1)
    patches = patches.reshape(1, 8, 4, -1).swapaxes(1, 2).reshape(patches.shape)
    return {"pos_embed": np.concatenate([cls, patches], axis=1)}


def x_and_y_swapped_in_the_codes(tensors):
    return {"pos_embed": np.roll(tensors["pos_embed"], 16, axis=2)}


def swapped_sides_of_patches(tensors):
    weight = tensors["patch_embed.proj.weight"]
    return {"patch_embed.proj.weight": weight.swapaxes(2, 3).copy()}


def blue_for_red(tensors):
    weight = tensors["patch_embed.proj.weight"]
    return {"patch_embed.proj.weight": weight[:, ::-1].copy()}


def norms_exchanged(tensors):
    return {
        "blocks.0.norm1.weight": tensors["blocks.0.norm2.weight"],
        "blocks.0.norm2.weight": tensors["blocks.0.norm1.weight"],
    }


@pytest.mark.parametrize(
    "mistake",
    [
        untransposed_proj,
        keys_before_queries,
        values_before_keys,
        heads_inside_of_channels,
        column_major_positions,
        x_and_y_swapped_in_the_codes,
        swapped_sides_of_patches,
        blue_for_red,
        norms_exchanged,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_in_the_tensors_is_found(small, tmp_path, mistake):
    with pytest.raises(RunError, match="gives other tokens than"):
        small.verify(small.tensors | mistake(small.tensors), tmp_path)


def use_tanh_gelu(monkeypatch):
    def tanh_gelu(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    def forward(mlp, x):
        return mlp.fc2(tanh_gelu(mlp.fc1(x)))

    monkeypatch.setattr(vit.Mlp, "forward", forward)


def use_eps(monkeypatch):
    class VisionTransformer(vit.VisionTransformer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for module in self.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.eps = 1e-5

    monkeypatch.setattr(vit, "VisionTransformer", VisionTransformer)


def use_post_norm(monkeypatch):
    def forward(block, x):
        x = block.norm1(x + block.attn(x))
        return block.norm2(x + block.mlp(x))

    monkeypatch.setattr(vit.Block, "forward", forward)


@pytest.mark.parametrize(
    "mistake", [use_tanh_gelu, use_eps, use_post_norm], ids=lambda m: m.__name__
)
def test_a_network_of_other_numerics_is_found(small, tmp_path, monkeypatch, mistake):
    mistake(monkeypatch)
    with pytest.raises(RunError, match="gives other tokens than"):
        small.verify(small.tensors, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("norm.bias"),
        lambda tensors: tensors.update(gate=tensors["cls_token"]),
        lambda tensors: tensors.update(cls_token=tensors["cls_token"][..., :4]),
    ],
    ids=["missing", "too_many", "misshapen"],
)
def test_tensors_that_are_not_exactly_the_encoders_are_found(small, tmp_path, change):
    tensors = dict(small.tensors)
    change(tensors)
    with pytest.raises(RunError, match="cannot be read back"):
        small.verify(tensors, tmp_path)


def test_not_a_number_is_no_agreement(small, tmp_path):
    bias = np.full_like(small.tensors["norm.bias"], np.nan)
    with pytest.raises(RunError, match="gives other tokens than"):
        small.verify(small.tensors | {"norm.bias": bias}, tmp_path)
