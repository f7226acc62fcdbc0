"""A model card for an export: what it is, how it was verified, how it is loaded."""

from typing import Any, TypeGuard

from personmae_jax.config import Config
from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.config_json import Settings, config_to_json, neck_feature
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine import revision
from personmae_jax.pytorch.layouts import LAYOUTS
from personmae_jax.pytorch.model_names import Meta, architecture
from personmae_jax.pytorch.positions import say
from personmae_jax.pytorch.recipes import instructions

_TRAININGS = {
    Config: ("PersonMAE", "pretrained as PersonMAE"),
    FinetuneConfig: ("fine-tuning", "fine-tuned"),
    UnsupervisedConfig: ("training without labels", "trained without labels"),
}


def describe_export(
    cfg: Settings,
    grid: tuple[int, int],
    weights: str,
    step: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Returns what a file says of itself: str, int, float and lists of them only.

    `about` is what the checkpoint says of itself.
    """
    encoder = cfg.encoder
    meta = {
        "width": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.num_heads,
        "mlp_ratio": encoder.mlp_ratio,
        "patch_size": encoder.patch_size,
        "activation": "gelu (erf)",
        "layer_norm_eps": 1e-6,
        "grid": list(grid),
        "trained_grid": list(cfg.pos_embed_grid),
        "image_size": [side * encoder.patch_size for side in grid],
        "positions": "learned" if encoder.learned_positions else "sine-cosine",
        "mean": list(cfg.data.mean),
        "std": list(cfg.data.std),
        "weights": weights,
        "step": step,
        "config": config_to_json(cfg),
        "training": _TRAININGS[type(cfg)][0],
        "uses_cameras": int(_uses_cameras(cfg)),
        "camera_scale": cfg.head.camera_scale if _uses_cameras(cfg) else 0.0,
        "neck_feature": neck_feature(cfg),
        "git_revision": about["git_revision"] or "unknown",
        "versions": [f"{k} {v}" for k, v in sorted(about["versions"].items())],
        "exported_with": revision.git_revision() or "unknown",
    }
    return {"architecture": architecture(meta)} | meta


def _uses_cameras(cfg: Settings) -> TypeGuard[FinetuneConfig]:
    return isinstance(cfg, FinetuneConfig) and cfg.head.use_cameras


def model_card(file: str, layout: str, meta: Meta, check: str, sha256: str) -> str:
    """Returns the whole card in Markdown, the recipes for `file` included."""
    trained = dict(_TRAININGS.values())[meta["training"]]
    held = " and the batch norm's after it" if LAYOUTS[layout].has_neck else ""
    return f"""# {meta["architecture"]}, {trained} for re-identification

{check}

| what | value |
| --- | --- |
| weights | {meta["weights"]} after step {meta["step"]} |
| layout | {layout}: the encoder's tensors{held}, float32 |
| input | RGB, {say(meta["image_size"])} pixels, (x / 255 - mean) / std |
| mean, std | {meta["mean"]}, {meta["std"]} |
| positions | {meta["positions"]}, grid {say(meta["grid"])} \
(trained on {say(meta["trained_grid"])}) |
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
