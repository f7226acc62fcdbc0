"""What codebases call a ViT of one size."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# What a file says of itself, see `model_card.describe_export`.
Meta = Mapping[str, Any]


class Names(NamedTuple):
    """What codebases call a ViT of one size; None where they have none."""

    letter: str
    timm: str
    transreid_ssl: str | None = None  # PersonViT's and PASS's too
    transreid: str | None = None
    cluster_contrast: str | None = None
    oml: str | None = None
    mae: str | None = None
    fastreid: str | None = None


_NAMES = {  # by width, depth, heads; MLP ratio 4, patch 16
    (384, 12, 6): Names(
        letter="S",
        timm="vit_small_patch16_224",
        transreid_ssl="vit_small_patch16_224_TransReID",
        transreid="deit_small_patch16_224_TransReID",
        cluster_contrast="vit_small",
        oml="vits16",
    ),
    (768, 12, 12): Names(
        letter="B",
        timm="vit_base_patch16_224",
        transreid_ssl="vit_base_patch16_224_TransReID",
        transreid="vit_base_patch16_224_TransReID",
        cluster_contrast="vit_base",
        oml="vitb16",
        mae="vit_base_patch16",
        fastreid="base",
    ),
    (1024, 24, 16): Names(
        letter="L", timm="vit_large_patch16_224", mae="vit_large_patch16"
    ),
}


def architecture(meta: Meta) -> str:
    """Returns e.g. "ViT-B/16", or "ViT 128/4/2, patch 16" where no letter is usual."""
    names = find_names(meta)
    if names is not None:
        return f"ViT-{names.letter}/16"
    return (
        f"ViT {meta['width']}/{meta['depth']}/{meta['num_heads']}, "
        f"patch {meta['patch_size']}"
    )


def find_names(meta: Meta) -> Names | None:
    """Returns what a ViT of these sizes is called; None if it has no usual name."""
    if (meta["mlp_ratio"], meta["patch_size"]) != (4, 16):
        return None
    return _NAMES.get((meta["width"], meta["depth"], meta["num_heads"]))
