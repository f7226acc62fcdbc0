"""Exports in the hands of those who load them: transformers, timm, ReID loaders."""

import json
import math
from functools import partial

import exported
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: requirements-torch.txt")

from torch.nn import functional  # noqa: E402

from personmae_jax.pytorch import recipes  # noqa: E402
from personmae_jax.pytorch.export import export  # noqa: E402
from personmae_jax.pytorch.weights import position_table, tensor_shapes  # noqa: E402


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a narrow ViT of 12 blocks on 256 x 128 pixels."""
    cfg = exported.vit_config(48, 12, 3)
    student, teacher = (exported.trained_like(cfg.encoder, seed) for seed in (0, 1))
    folder = tmp_path_factory.mktemp("run")
    exported.make_run(folder, cfg, {7: (student, teacher)})
    return folder


@pytest.fixture(scope="module")
def examples(workdir):
    """Images for PyTorch, and JAX's tokens, from --reference."""
    path = workdir / "reference.npz"
    export(workdir, workdir / "file.pth", reference=path)
    with np.load(path) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        return images.contiguous(), arrays["tokens"]


@pytest.fixture(scope="module")
def file(workdir, examples):
    """The default export."""
    return workdir / "file.pth"


@pytest.fixture(scope="module")
def folder(workdir):
    """The export for transformers."""
    export(workdir, workdir / "hf", layout="huggingface")
    return workdir / "hf"


transformers_or_skip = partial(
    pytest.importorskip, "transformers", reason="needs requirements-clients.txt"
)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_transformers_gives_the_same_features(folder, examples):
    transformers = transformers_or_skip()
    model, told = transformers.ViTModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(told.values()), told
    images, tokens = examples
    assert images.shape == (6, 3, 256, 128)
    with torch.inference_mode():
        found = model.eval()(pixel_values=images).last_hidden_state.numpy()
    np.testing.assert_allclose(found, tokens, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_transformers_prepares_images_as_the_run_did(folder):
    transformers = transformers_or_skip()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (256, 128, 3), np.uint8)
    prepared = processor(image, return_tensors="np")["pixel_values"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (image / 255 - mean) / std
    assert prepared.shape == (1, 3, 256, 128)
    np.testing.assert_allclose(
        prepared[0].transpose(1, 2, 0), expected, rtol=0, atol=1e-5
    )
    small = np.zeros((64, 32, 3), np.uint8)
    assert processor(small, return_tensors="np")["pixel_values"].shape == (
        *(1, 3, 256, 128),
    )


def test_the_folder_for_transformers_names_the_numerics(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == "gelu"
    assert config["layer_norm_eps"] == 1e-6
    assert config["image_size"] == [256, 128]
    assert config["num_attention_heads"] == 3
    assert config["intermediate_size"] == 4 * 48


@pytest.mark.filterwarnings("ignore")
def test_timm_loads_strictly_and_gives_the_same_tokens(file, examples):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.models.VisionTransformer(
        img_size=(256, 128), num_classes=0, embed_dim=48, depth=12, num_heads=3
    )
    timm.models.load_checkpoint(model, str(file))
    images, tokens = examples
    with torch.inference_mode():
        found = model.eval().forward_features(images).numpy()
    np.testing.assert_allclose(found, tokens, rtol=0, atol=2e-5)


def load_as_transreid_ssl(path, model: dict, grid, ratio: int) -> str:
    """What load_param of TransReID-SSL does, told from its description.

    Wrappers are opened in the order model, state_dict, teacher; heads are passed over;
    a table of another size is resized bilinearly, its rows and columns computed from
    the ratio; every name must be the model's.
    """
    file = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        file = file.get(wrapper, file)
    assert "teacher" not in file
    count = 0
    for name, tensor in file.items():
        assert not {"head", "dist", "pre_logits"} & set(name.split("."))
        if name == "pos_embed" and tensor.shape != model[name].shape:
            cls, codes = tensor[:, :1], tensor[0, 1:]
            rows = int(math.sqrt(len(codes) * ratio))
            codes = codes.reshape(1, rows, rows // ratio, -1).permute(0, 3, 1, 2)
            codes = functional.interpolate(codes, size=grid, mode="bilinear")
            codes = codes.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
            tensor = torch.cat([cls, codes], dim=1)
        model[name].copy_(tensor)
        count += 1
    return f"Load {count} / {len(model)} layers."


def transreid_model(shapes, grid, own) -> dict:
    """Tensors of a downstream model: the encoder's and `own`."""
    model = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    width = model["cls_token"].shape[-1]
    model["pos_embed"] = torch.full((1, 1 + grid[0] * grid[1], width), torch.nan)
    return model | {name: torch.zeros(1) for name in own}


HEADS = {  # what the codebase adds to the encoder, and what it prints then
    "TransReID-SSL": (("fc.weight", "fc.bias"), "Load 150 / 152 layers."),
    "cluster-contrast": (
        ("b.weight", "b.bias", "b.running_mean", "b.running_var", "b.num_batches"),
        "Load 150 / 155 layers.",
    ),
}


@pytest.mark.parametrize("codebase", HEADS)
@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (21, 10)])
def test_a_transreid_ssl_loader_loads_all_150_layers(file, codebase, grid):
    cfg = exported.vit_config(48, 12, 3)
    own, success = HEADS[codebase]
    model = transreid_model(tensor_shapes(cfg.encoder, grid), grid, own)
    assert load_as_transreid_ssl(file, model, grid, 2) == success
    assert all(torch.isfinite(tensor).all() for tensor in model.values())
    # Rows and columns were not mistaken: a resized code is near to its own place.
    codes = position_table(48, (16, 8), grid)[0, 1:]
    found = model["pos_embed"].numpy()[0, 1:]
    distances = np.linalg.norm(found[:, None] - codes[None], axis=-1)
    inner = np.zeros(grid, bool)
    inner[1:-1, 1:-1] = True  # codes outside the outermost centres cannot be told
    nearest = distances.argmin(axis=1)
    np.testing.assert_array_equal(
        nearest[inner.ravel()], np.arange(grid[0] * grid[1])[inner.ravel()]
    )


VITS = {  # meta of a ViT-S
    "uses_cameras": 0,
    **{"width": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4},
    **{"patch_size": 16, "grid": [16, 8], "image_size": [256, 128]},
    **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}
VITB = VITS | {"width": 768, "num_heads": 12}


@pytest.mark.parametrize("codebase", HEADS)
def test_the_recipe_quotes_what_success_looks_like(codebase):
    told = recipes.instructions("vits.pth", "mae", VITS)
    assert f"`{HEADS[codebase][1]}`" in told


def test_hap_is_told_for_the_models_that_it_has():
    told = recipes.instructions("vitb.pth", "mae", VITB)
    assert "--model vit_base_patch16 --resume vitb.pth" in told
    assert "HAP" not in recipes.instructions("vits.pth", "mae", VITS)


@pytest.mark.parametrize("grid", [[16, 8], [16, 16], [14, 14]])
def test_oml_is_told_for_the_one_grid_that_it_opens(grid):
    told = recipes.instructions("vits.pth", "flat", VITS | {"grid": grid})
    assert ("ViTExtractor(" in told) == (grid == [14, 14])
    assert ("--grid=14x14" in told) == (grid != [14, 14])


def test_a_square_export_serves_loaders_that_expect_a_square(workdir):
    export(workdir, workdir / "square.pth", grid=(14, 14))
    table = torch.load(workdir / "square.pth", weights_only=True)["model"]["pos_embed"]
    side = math.isqrt(table.shape[1] - 1)  # TransReID, MAE and OML compute it so
    codes = table[0, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    codes = functional.interpolate(codes, size=(16, 8), mode="bilinear")
    codes = codes[0].permute(1, 2, 0).reshape(128, -1).numpy()
    trained = position_table(48, (16, 8), (16, 8))[0, 1:]
    assert np.abs(codes - trained).max() < 0.2
