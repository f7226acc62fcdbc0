"""Writes what a reviewer should see change: every config and the parameter names.

    PYTHONPATH=. python tests/golden/make_config_dumps.py

configs/NAME.json holds every setting of configs/NAME.py of the repository;
param_names.txt the parameters of the quickstart's network cut to two blocks and with
the head of the cls loss: name, shape, and "decay" where weight decay applies.
"""

import runpy
from pathlib import Path

import jax

from personmae_jax.config_json import config_to_json
from personmae_jax.engine.trees import named_leaves
from personmae_jax.models import personmae
from personmae_jax.optim import decay_mask

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs"


def load_config(path: Path):
    return runpy.run_path(str(path))["get_config"]()


def param_names() -> str:
    cfg = load_config(CONFIGS / "quickstart.py")
    cfg.encoder.depth = 2
    for predictor in cfg.predictors.values():
        predictor.memory_blocks = (0, -1)
    params = jax.eval_shape(
        lambda: personmae.init_params(
            *(cfg.encoder, cfg.predictors, cfg.grid, jax.random.key(0)),
            has_cls_head=True,
        )
    )
    is_decayed = jax.tree.leaves(decay_mask(params))
    lines = []
    for (name, leaf), decays in zip(
        named_leaves(params).items(), is_decayed, strict=True
    ):
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{name} {shape}{' decay' if decays else ''}\n")
    return "".join(lines)


def dumps() -> dict[str, str]:
    """Path below tests/golden -> text."""
    texts = {
        f"configs/{path.stem}.json": config_to_json(load_config(path))
        for path in sorted(CONFIGS.glob("*.py"))
    }
    return texts | {"param_names.txt": param_names()}


def main():
    (HERE / "configs").mkdir(exist_ok=True)
    for name, text in dumps().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
