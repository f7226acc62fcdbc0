"""Writes the encoder of a run as a file for PyTorch, verified against JAX.

Example: python launch/export_torch.py --workdir=runs/vitb --out=personmae_vitb.pth

Ends by saying what to set in TransReID-SSL, PASS, HAP, MAE, timm, transformers and
others; that is also in a model card beside the file. Exit codes: 0 written, 1 failed
or PyTorch disagrees with JAX, 2 wrong arguments, 75 interrupted; only 0 leaves a file.
"""

import command_line
from absl import flags

from personmae_jax.engine import signals
from personmae_jax.errors import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run, a folder or gs://...")
_OUT = flags.DEFINE_string(
    "out", None, "A .pth, .pt or .safetensors file, or the folder for huggingface."
)
_LAYOUT = flags.DEFINE_string(
    "layout",
    "mae",
    "mae, flat (OML), safetensors, pass, huggingface, or, with the batch norm of "
    "a run that was fine-tuned or adapted, transreid or cluster-contrast.",
)
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the latest if absent.")
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "student or teacher; the run's config.export.weights if absent."
)
_GRID = command_line.define_numbers(
    "grid",
    int,
    2,
    "ROWSxCOLUMNS of patches of the model that loads it; the run's if absent: "
    "16x8 at 256x128, 24x8 at 384x128, 21x10 at stride 12; 14x14 for MAE, OML.",
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "FILE.npz for example images and JAX's tokens of them."
)


def main() -> int:
    if _WORKDIR.value is None or _OUT.value is None:
        raise ConfigError("name run and file: --workdir=runs/vitb --out=vitb.pth")
    signals.leave_in_order("interrupted; nothing was written")

    import jax

    # The run itself may hold the accelerator, and float32 is exact on a CPU.
    jax.config.update("jax_platforms", "cpu")
    from personmae_jax.pytorch.export import export

    markdown = export(
        _WORKDIR.value,
        _OUT.value,
        step=_STEP.value,
        weights=_WEIGHTS.value,
        grid=_GRID.value,
        layout=_LAYOUT.value,
        reference=_REFERENCE.value,
    )
    print(markdown)
    return 0


if __name__ == "__main__":
    command_line.run(main)
