"""A model card for an export: what it is, how it was verified, how it is loaded."""

from personmae_jax.pytorch.model_names import Meta
from personmae_jax.pytorch.recipes import instructions


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


def _times(sides: list[int]) -> str:
    return f"{sides[0]} x {sides[1]}"
