"""What to set in PyTorch codebases to load an export, and what success looks like.

A wrong setting often "loads" there with random weights, so every recipe ends in the
words by which one sees that the file was read. A file loads exactly where the model has
the file's own patch grid; every codebase resizes the position embedding otherwise.

Sources: the loaders and default settings of damo-cv/TransReID-SSL,
CASIA-IVA-Lab/PASS-reID, damo-cv/TransReID, hustvl/PersonViT, junkunyuan/HAP, MALE,
JDAI-CV/fast-reid, facebookresearch/mae, OML, timm and transformers, as of 2026.
"""

import shlex
from collections.abc import Callable
from functools import partial

from personmae_jax.pytorch.model_names import Meta, find_names

_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_RESIZED = (
    "A model of another patch grid resizes the position embedding, which moves fixed "
    "ones by 1e-2 to 6e-2; --grid=ROWSxCOLUMNS of that model avoids it"
)


def instructions(file: str, layout: str, meta: Meta) -> str:
    """Returns the recipes for one layout in Markdown; arguments as of `model_card`."""
    names = find_names(meta)
    texts = {
        title: recipe(called and getattr(names, called), file, meta)
        for title, (called, recipe) in _RECIPES[layout].items()
        # A codebase that names no model of this size can load none.
        if called is None or getattr(names, called, None)
    }
    told = [f"### {title}\n\n{text}\n" for title, text in texts.items()]
    if not told:
        told = [f"The codebases of this layout have no {meta['architecture']}.\n"]
    if meta["uses_cameras"] and layout != "transreid":
        told.insert(
            0,
            "WARNING: the run adds an embedding of the camera to every token "
            "(config.head.use_cameras), which is not in this file; its scores are of "
            "both. --layout=transreid has it.\n",
        )
    if "distilled" in file:
        told.insert(
            0,
            'WARNING: the path contains "distilled", by which TransReID and its kin '
            "take the first patch's position for a second token's; rename it.\n",
        )
    if layout not in ("huggingface", "safetensors"):  # timm's recipe says it
        told.append(f"{_RESIZED}.\n")
    return "\n".join(told)


def _transreid_ssl(name: str, file: str, meta: Meta, extra: int = 0) -> str:
    rows, columns = meta["grid"]
    return f"""\
    MODEL.PRETRAIN_PATH {shlex.quote(file)}
    MODEL.PRETRAIN_CHOICE 'imagenet'
    MODEL.PRETRAIN_HW_RATIO {max(1, round(rows / columns))}
    MODEL.STEM_CONV False
    MODEL.TRANSFORMER_TYPE {name}
{_sizes(meta)}
{_pixels(meta)}

With PRETRAIN_CHOICE 'self' nothing is loaded, and the log says that it was.
{_success(meta, extra, head=2)}"""


def _cluster_contrast(
    name: str, file: str, meta: Meta, extra: int = 0, head: int = 5
) -> str:
    height, width = _input_size(meta)[0]
    rows, columns = meta["grid"]
    is_half = meta["mean"] == meta["std"] == [0.5] * 3
    note = "" if is_half else _imagenet_only("Without --self-norm it", meta)
    return f"""\
    -a {name} -pp {shlex.quote(file)} --height {height} --width {width} \
--hw-ratio {max(1, round(rows / columns))}{" --self-norm" if is_half else ""}

{_success(meta, extra, head=head)}{note}"""


def _transreid(name: str, file: str, meta: Meta) -> str:
    return f"""\
    MODEL.PRETRAIN_PATH {shlex.quote(file)}
    MODEL.PRETRAIN_CHOICE 'imagenet'
    MODEL.TRANSFORMER_TYPE {name}
{_sizes(meta)}
{_pixels(meta)}

Success: no line `shape do not match`."""


def _transreid_test(name: str, file: str, meta: Meta) -> str:
    cameras = ""
    if meta["uses_cameras"]:  # its own default multiplies them by 3
        scale = meta["camera_scale"]
        cameras = f"    MODEL.SIE_CAMERA True\n    MODEL.SIE_COE {scale}\n"
    return f"""\
    TEST.WEIGHT {shlex.quote(file)}
    TEST.NECK_FEAT '{meta.get("neck_feature", "before")}'
    MODEL.PRETRAIN_CHOICE 'none'
    MODEL.TRANSFORMER_TYPE {name}
{cameras}{_sizes(meta)}
{_pixels(meta)}

`python test.py` then gives this run's scores, but for the interpolation of images."""


def _cluster_contrast_test(name: str, file: str, meta: Meta) -> str:
    size = tuple(_input_size(meta)[0])
    return f"""\
    model = models.create({name!r}, img_size={size},
                          pretrained_path={file!r})
    copy_state_dict(load_checkpoint({file!r})["state_dict"], model, strip="module.")

Success: no line on missing keys. In eval mode it gives features of unit length after
the batch norm. {_normalise(meta)} Its examples/test.py builds ResNets only."""


def _hap(name: str, file: str, meta: Meta) -> str:
    height = meta["image_size"][0]
    size = "" if height == 256 else f" --size {height}"
    return f"""\
    --model {name} --resume {shlex.quote(file)}{size}

{_yaml_grid(meta)}\
Success: the log names no `unexpected_keys`, and as `missing_keys` only the head's.\
{_imagenet_only("HAP", meta)}"""


def _male(_: str, file: str, meta: Meta) -> str:
    return f"""\
    MODEL.CHECKPOINT_PATH {shlex.quote(file)}

{_yaml_grid(meta)}{_imagenet_only("MALE", meta).lstrip()}"""


def _fastreid(name: str, file: str, meta: Meta) -> str:
    size, stride = _input_size(meta)
    mean, std = ([round(255 * x, 4) for x in meta[k]] for k in ("mean", "std"))
    return f"""\
    MODEL.BACKBONE.NAME build_vit_backbone
    MODEL.BACKBONE.DEPTH {name}
    MODEL.BACKBONE.PRETRAIN True
    MODEL.BACKBONE.PRETRAIN_PATH {shlex.quote(file)}
    MODEL.BACKBONE.STRIDE_SIZE "{[stride, stride]}"
    MODEL.PIXEL_MEAN "{mean}"
    MODEL.PIXEL_STD "{std}"
    INPUT.SIZE_TRAIN "{size}"
    INPUT.SIZE_TEST "{size}\""""


def _mae(name: str, file: str, meta: Meta) -> str:
    if meta["grid"] != [14, 14]:
        return _of_224("MAE")
    return f"""\
    --model {name} --finetune {shlex.quote(file)}

Success: only `head` and `fc_norm` are named as missing.{_imagenet_only("MAE", meta)}"""


def _oml(name: str, file: str, meta: Meta) -> str:
    if meta["grid"] != [14, 14]:
        return _of_224("OML")
    return f"""\
    ViTExtractor(weights={file!r}, arch={name!r}, normalise_features=False)

It loads strictly: an error otherwise. {_normalise(meta)}"""


def _timm(_: None, file: str, meta: Meta) -> str:
    names, size = find_names(meta), tuple(meta["image_size"])
    if names is not None:
        build = f"""\
    model = timm.create_model(
        {names.timm!r}, img_size={size}, num_classes=0,
        checkpoint_path={file!r})"""
    else:
        build = f"""\
    model = timm.models.VisionTransformer(
        img_size={size}, patch_size={meta["patch_size"]}, num_classes=0,
        embed_dim={meta["width"]}, depth={meta["depth"]}, \
num_heads={meta["num_heads"]}, mlp_ratio={meta["mlp_ratio"]})
    timm.models.load_checkpoint(model, {file!r})"""
    return f"""{build}

It loads strictly: an error otherwise. {_normalise(meta)}
{_RESIZED} (`model.set_input_size` resizes, too)."""


def _transformers(_: None, file: str, meta: Meta) -> str:
    return f"""\
    model = transformers.ViTModel.from_pretrained({file!r}, add_pooling_layer=False)
    processor = transformers.AutoImageProcessor.from_pretrained({file!r})
    output = model(**processor(images, return_tensors="pt"))
    features = output.last_hidden_state[:, 0]

Success: no weight is named as newly initialised."""


def _success(meta: Meta, extra: int = 0, *, head: int) -> str:
    count = 6 + 12 * meta["depth"] + extra
    return f"Success: `Load {count} / {count + head} layers.`"


def _pixels(meta: Meta) -> str:
    return f"""\
    INPUT.PIXEL_MEAN "{meta["mean"]}"
    INPUT.PIXEL_STD "{meta["std"]}\""""


def _normalise(meta: Meta) -> str:
    return f"Normalise with mean {meta['mean']}, std {meta['std']}."


def _imagenet_only(codebase: str, meta: Meta) -> str:
    """A warning where a codebase has ImageNet's statistics and the run has others."""
    if (meta["mean"], meta["std"]) == _IMAGENET:
        return ""
    return (
        f"\nWARNING: {codebase} normalises by ImageNet's mean and std whatever the run "
        f"used; this run used mean {meta['mean']}, std {meta['std']}: change its code."
    )


def _input_size(meta: Meta) -> tuple[list[int], int]:
    """Height and width in pixels, and stride, of the model that has the file's grid."""
    if (meta["grid"], meta["patch_size"]) == ([21, 10], 16):
        return [256, 128], 12  # (256 - 16) // 12 + 1 rows; TransReID's overlapping ones
    return list(meta["image_size"]), meta["patch_size"]


def _sizes(meta: Meta) -> str:
    size, stride = _input_size(meta)
    return f"""\
    MODEL.STRIDE_SIZE "{[stride, stride]}"
    INPUT.SIZE_TRAIN "{size}"
    INPUT.SIZE_TEST "{size}\""""


def _yaml_grid(meta: Meta) -> str:
    """What HAP's and MALE's YAML file says of a grid other than their own."""
    rows, columns = meta["grid"]
    if (rows, columns) == (16, 8):
        return ""
    return f"""In its YAML file:

    MODEL:
      CHECKPOINT_POS_EMBED_SIZE: [{rows}, {columns}]

"""


def _of_224(codebase: str) -> str:
    return f"{codebase}'s model is of 224 x 224 pixels: export with --grid=14x14."


# Of each layout: codebase -> the field of `Names` that has its model of a size, None
# where any will do, and the recipe.
_RECIPES: dict[str, dict[str, tuple[str | None, Callable[..., str]]]] = {
    "mae": {
        "TransReID-SSL, PersonViT": ("transreid_ssl", _transreid_ssl),
        "cluster-contrast (USL, UDA)": ("cluster_contrast", _cluster_contrast),
        "TransReID (the original)": ("transreid", _transreid),
        "fast-reid": ("fastreid", _fastreid),
        "HAP": ("mae", _hap),  # it has MAE's models, as MALE has
        "MALE": ("mae", _male),
        "MAE": ("mae", _mae),
        "timm": (None, _timm),
    },
    "flat": {"OML": ("oml", _oml)},
    "safetensors": {"timm": (None, _timm)},
    "pass": {  # 3 part tokens, 4 positions
        "PASS": ("transreid_ssl", partial(_transreid_ssl, extra=7)),
        "PASS, cluster-contrast (USL, UDA)": (
            "cluster_contrast",
            partial(_cluster_contrast, extra=7, head=20),
        ),
    },
    "huggingface": {"transformers": (None, _transformers)},
    "transreid": {
        "TransReID": ("transreid", _transreid_test),
        "TransReID-SSL": ("transreid_ssl", _transreid_test),
    },
    "cluster-contrast": {
        "cluster-contrast-reid": ("cluster_contrast", _cluster_contrast_test)
    },
}
