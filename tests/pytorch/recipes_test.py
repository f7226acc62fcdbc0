"""A card names only settings that the codebase has, and one rule on the grid."""

import re

import pytest

from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.recipes import instructions

_TRANSREID = {
    *("MODEL.PRETRAIN_PATH", "MODEL.PRETRAIN_CHOICE", "MODEL.TRANSFORMER_TYPE"),
    *(
        "MODEL.STRIDE_SIZE",
        "MODEL.SIE_CAMERA",
        "MODEL.SIE_COE",
        "TEST.WEIGHT",
        "TEST.NECK_FEAT",
    ),
    *("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD"),
}
_SSL = _TRANSREID | {"MODEL.PRETRAIN_HW_RATIO", "MODEL.STEM_CONV"}
_CLUSTER = {"-a", "-pp", "--height", "--width", "--hw-ratio", "--self-norm"}
# What each codebase has, by its default settings or its argument parser.
KEYS = {
    "TransReID-SSL, PersonViT": _SSL,
    "cluster-contrast (USL, UDA)": _CLUSTER,
    "TransReID (the original)": _TRANSREID,
    "fast-reid": {
        *(f"MODEL.BACKBONE.{k}" for k in ("NAME", "DEPTH", "PRETRAIN", "STRIDE_SIZE")),
        *("MODEL.BACKBONE.PRETRAIN_PATH", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
        *("INPUT.SIZE_TRAIN", "INPUT.SIZE_TEST"),
    },
    "HAP": {"--model", "--resume", "--size", "CHECKPOINT_POS_EMBED_SIZE"},
    "MALE": {"MODEL.CHECKPOINT_PATH", "CHECKPOINT_POS_EMBED_SIZE"},
    "MAE": {"--model", "--finetune"},
    "PASS": _SSL,
    "PASS, cluster-contrast (USL, UDA)": _CLUSTER,
    "TransReID": _TRANSREID,
    "TransReID-SSL": _SSL,
}
VITS = {
    **{"uses_cameras": 0, "width": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4},
    **{"patch_size": 16, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    **{"architecture": "ViT-S/16", "neck_feature": "after"},
}
VITB = VITS | {"width": 768, "num_heads": 12, "architecture": "ViT-B/16"}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def told(
    layout: str, meta: dict, grid=(16, 8), file: str = "vit.pth"
) -> dict[str, str]:
    """Recipe by codebase."""
    sizes = {"grid": list(grid), "image_size": [16 * side for side in grid]}
    text = instructions(file, layout, meta | sizes)
    parts = re.split(r"^### (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def settings(text: str) -> dict[str, str]:
    """Key -> value of the indented lines of a recipe."""
    found = {}
    for line in re.findall(r"^ {4}(.*)", text, flags=re.MULTILINE):
        if line.startswith("-"):
            words = re.findall(r"(--?[a-z][\w-]*)(?: ([^-]\S*))?", line)
            found |= dict(words)
        elif line != "MODEL:":
            key, _, value = line.strip().partition(" ")
            found[key.rstrip(":")] = value.strip("\"'")
    return found


@pytest.mark.parametrize("layout", ["mae", "pass", "transreid"])
@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (21, 10), (14, 14)])
@pytest.mark.parametrize(
    "meta", [VITS, VITB, VITB | HALF | {"uses_cameras": 1, "camera_scale": 3.0}]
)
def test_a_recipe_names_no_setting_that_the_codebase_does_not_have(layout, grid, meta):
    checked = 0
    for codebase, text in told(layout, meta, grid).items():
        if codebase != "timm":
            unknown = settings(text).keys() - KEYS[codebase]
            assert not unknown, codebase
            checked += len(settings(text))
    assert checked > 10


# Calls in Python, whose keyword arguments must exist.
CALLS = {
    "timm": {"img_size", "num_classes", "checkpoint_path"},
    "OML": {"weights", "arch", "normalise_features"},
    "transformers": {"add_pooling_layer", "return_tensors"},
    "cluster-contrast-reid": {"img_size", "pretrained_path", "strip"},
}


def test_every_recipe_is_held_against_a_table():
    found = {}
    for layout in LAYOUTS:
        found |= told(layout, VITB, (14, 14))
    assert found.keys() == KEYS.keys() | CALLS.keys()
    for codebase, names in CALLS.items():
        code = "".join(re.findall(r"^ {4}(.*)", found[codebase], flags=re.MULTILINE))
        assert set(re.findall(r"(\w+)=", code)) == names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_path_with_a_space_is_one_word_in_every_recipe(layout):
    for codebase, text in told(layout, VITB, (14, 14), file="my vit.pth").items():
        assert text.count("my vit.pth") == text.count("'my vit.pth'") > 0, codebase


@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (21, 10)])
def test_the_grid_of_the_model_is_told_by_size_and_stride_and_refused_by_nobody(grid):
    recipes = told("mae", VITB, grid)
    for codebase in ("TransReID-SSL, PersonViT", "TransReID (the original)"):
        found = settings(recipes[codebase])
        height, width = map(int, re.findall(r"\d+", found["INPUT.SIZE_TRAIN"]))
        stride = int(re.findall(r"\d+", found["MODEL.STRIDE_SIZE"])[0])
        model = ((height - 16) // stride + 1, (width - 16) // stride + 1)
        assert model == grid, codebase
        assert found["INPUT.SIZE_TEST"] == found["INPUT.SIZE_TRAIN"]
    assert "--grid=14x14" in recipes["MAE"]
    assert "moves fixed ones by 1e-2 to 6e-2" in recipes["timm"]


def test_what_a_fine_tuned_run_needs_in_transreid_is_set():
    recipes = told("transreid", VITS | {"uses_cameras": 1, "camera_scale": 1.5})
    original, ssl = (settings(recipes[k]) for k in ("TransReID", "TransReID-SSL"))
    assert original["MODEL.TRANSFORMER_TYPE"] == "deit_small_patch16_224_TransReID"
    assert ssl["MODEL.TRANSFORMER_TYPE"] == "vit_small_patch16_224_TransReID"
    for found in (original, ssl):
        assert found["MODEL.SIE_CAMERA"] == "True"
        assert found["MODEL.SIE_COE"] == "1.5"
        assert found["MODEL.PRETRAIN_CHOICE"] == "none"
        assert found["TEST.NECK_FEAT"] == "after"
    assert "SIE_CAMERA" not in told("transreid", VITS)["TransReID"]


def test_statistics_that_a_codebase_replaces_by_imagenets_are_warned_of():
    recipes = told("mae", VITB | HALF, (14, 14))
    for codebase in ("HAP", "MALE", "MAE"):
        assert "WARNING: " + codebase in recipes[codebase]
        assert "WARNING" not in told("mae", VITB, (14, 14))[codebase]
    assert "--self-norm" in settings(recipes["cluster-contrast (USL, UDA)"])
    assert settings(recipes["fast-reid"])["MODEL.PIXEL_MEAN"] == "[127.5, 127.5, 127.5]"


def test_codebases_without_a_vit_s_have_no_recipe_for_it():
    assert not {"HAP", "MALE", "MAE", "fast-reid"} & told("mae", VITS).keys()


def test_hap_and_male_read_another_grid_from_below_model_in_their_yaml():
    recipes = told("mae", VITB, (24, 8))
    for codebase in ("HAP", "MALE"):
        nested = "    MODEL:\n      CHECKPOINT_POS_EMBED_SIZE: [24, 8]\n"
        assert nested in recipes[codebase]
        assert "YAML" not in told("mae", VITB)[codebase]
    assert "--size 384" in recipes["HAP"]


def test_the_two_logs_of_pass_are_quoted():
    recipes = told("pass", VITS)
    assert "`Load 157 / 159 layers.`" in recipes["PASS"]
    assert "`Load 157 / 177 layers.`" in recipes["PASS, cluster-contrast (USL, UDA)"]
