"""What to set in PyTorch codebases to load an export, and what success looks like.

A wrong setting often "loads" there with random weights, so every recipe ends in the
words by which one sees that the file was read.

Sources: the loaders of damo-cv/TransReID-SSL, CASIA-IVA-Lab/PASS-reID,
damo-cv/TransReID, hustvl/PersonViT, junkunyuan/HAP, MALE, facebookresearch/mae, OML,
timm and transformers, as of 2026.
"""

from personmae_jax.pytorch.model_names import Meta, find_names


def model_card(file: str, layout: str, meta: Meta, check: str, sha256: str) -> str:
    """Returns the whole card in Markdown, the recipes included.

    Args:
      file: Path that is put into the recipes.
      layout: A key of `torch_layouts.LAYOUTS`.
      meta: What the file says of itself.
      check: A sentence on the verification.
      sha256: Of the file, in hexadecimal.
    """
    is_finetuned = meta["training"] == "fine-tuning"
    trained = "fine-tuned" if is_finetuned else "pretrained as PersonMAE"
    return f"""# {meta["architecture"]}, {trained} for re-identification

{check}

| what | value |
| --- | --- |
| weights | {meta["weights"]} after step {meta["step"]} |
| layout | {layout}: the encoder's tensors, float32 |
| input | RGB, {_times(meta["image_size"])} pixels, (x / 255 - mean) / std |
| mean, std | {meta["mean"]}, {meta["std"]} |
| positions | {meta["positions"]}, grid {_times(meta["grid"])} \
(trained on {_times(meta["trained_grid"])}) |
| numerics | pre-norm, erf GELU, LayerNorm eps 1e-6, cls token first, no LayerScale |
| trained with | revision {meta["git_revision"]}; {", ".join(meta["versions"])} |
| sha256 | {sha256} |

## Loading it

{instructions(file, layout, meta)}
## Settings of the run

```json
{meta["config"].strip()}
```
"""


def instructions(file: str, layout: str, meta: Meta) -> str:
    """Returns the recipes for one layout in Markdown; arguments as of `model_card`."""
    recipes = {
        "mae": {
            "TransReID-SSL, PersonViT": _transreid_ssl,
            "cluster-contrast (USL, UDA)": _cluster_contrast,
            "TransReID (the original)": _transreid,
            "HAP": _hap,
            "MALE": _male,
            "MAE": _mae,
            "timm": _timm,
        },
        "flat": {"OML": _oml},
        "safetensors": {"timm": _timm},
        "pass": {"PASS": _pass},
        "huggingface": {"transformers": _transformers},
        "transreid": {"TransReID, TransReID-SSL": _transreid_test},
    }[layout]
    texts = {title: recipe(file, meta) for title, recipe in recipes.items()}
    told = [f"### {title}\n\n{text}\n" for title, text in texts.items() if text]
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
    return "\n".join(told)


def _transreid_ssl(file: str, meta: Meta, extra: int = 0) -> str | None:
    names = find_names(meta)
    if names is None or names.transreid_ssl is None:
        return None
    if not _ratio(meta):
        return _no_ratio(meta)
    return f"""\
    MODEL.PRETRAIN_PATH {file}
    MODEL.PRETRAIN_CHOICE 'imagenet'
    MODEL.PRETRAIN_HW_RATIO {_ratio(meta)}
    MODEL.STEM_CONV False
    MODEL.TRANSFORMER_TYPE {names.transreid_ssl}
{_pixels(meta)}

With PRETRAIN_CHOICE 'self' nothing is loaded, and the log says that it was.
{_success(meta, extra, head=2)}"""


def _pass(file: str, meta: Meta) -> str | None:
    return _transreid_ssl(file, meta, extra=7)  # three part tokens, four positions


def _cluster_contrast(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.cluster_contrast is None:
        return None
    if not _ratio(meta):
        return _no_ratio(meta)
    return f"""\
    -a {names.cluster_contrast} -pp {file} --hw-ratio {_ratio(meta)}

{_success(meta, head=5)}"""


def _transreid(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.transreid is None:
        return None
    if not _is_square(meta):
        return _no_square("TransReID")
    return f"""\
    MODEL.PRETRAIN_PATH {file}
    MODEL.PRETRAIN_CHOICE 'imagenet'
    MODEL.TRANSFORMER_TYPE {names.transreid}
{_pixels(meta)}

Success: no line `shape do not match`."""


def _transreid_test(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.transreid_ssl is None:
        return None
    return f"""\
    TEST.WEIGHT {file}
    MODEL.TRANSFORMER_TYPE {names.transreid_ssl}
    INPUT.SIZE_TEST "{meta["image_size"]}"
{_pixels(meta)}

`python test.py` then gives this run's scores, but for the interpolation of images."""


def _hap(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.mae is None:  # HAP has MAE's models
        return None
    size = tuple(meta["grid"])
    also = f"MODEL.CHECKPOINT_POS_EMBED_SIZE: {size}"
    return f"""\
    --model {names.mae} --resume {file}

{"" if size == (16, 8) else f"Set `{also}` in its YAML file. "}\
Success: the log names no `unexpected_keys`, and as `missing_keys` only the head's."""


def _male(file: str, meta: Meta) -> str | None:
    if find_names(meta) is None:
        return None
    return f"""\
    MODEL.CHECKPOINT_PATH {file}
{_pixels(meta)}"""


def _mae(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.mae is None:
        return None
    if not _is_square(meta):
        return _no_square("MAE")
    return f"""\
    --model {names.mae} --finetune {file}

Success: only `head` and `fc_norm` are named as missing."""


def _oml(file: str, meta: Meta) -> str | None:
    names = find_names(meta)
    if names is None or names.oml is None:
        return None
    if meta["grid"] != [14, 14]:
        return _no_square("OML")
    return f"""\
    ViTExtractor(weights={file!r}, arch={names.oml!r}, normalise_features=False)

It loads strictly: an error otherwise. {_normalise(meta)}"""


def _timm(file: str, meta: Meta) -> str:
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

It loads strictly: an error otherwise. `model.set_input_size((384, 128))` then fits
another size. {_normalise(meta)}"""


def _transformers(file: str, meta: Meta) -> str:
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


def _is_square(meta: Meta) -> bool:
    return meta["grid"][0] == meta["grid"][1]


def _no_square(codebase: str) -> str:
    return (
        f"{codebase} takes the positions for those of a square grid: export once more "
        "with --grid=14x14."
    )


def _ratio(meta: Meta) -> int | None:
    """Rows over columns, which their resize wants as a whole number."""
    rows, columns = meta["grid"]
    return rows // columns if rows % columns == 0 else None


def _no_ratio(meta: Meta) -> str:
    return f"It cannot read a {_times(meta['grid'])} grid: export with --grid=16x8."


def _times(sides: list[int]) -> str:
    return f"{sides[0]} x {sides[1]}"
