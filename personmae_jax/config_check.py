"""Refuses settings that cannot train, each with one sentence, before any work."""

import math
from collections.abc import Iterator

from personmae_jax.config import (
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    predictor_size,
)
from personmae_jax.config_values import range_problems
from personmae_jax.errors import ConfigError

PREPARE_DATA = "python launch/prepare_data.py --source PATH --out DIR"


def check(cfg: Config, device_count: int | None = None) -> None:
    """Refuses settings that cannot train.

    `device_count` is that of all hosts, None before the devices are known.

    Raises:
      ConfigError: One line for every setting that is wrong.
    """
    # The later rules divide by what the first ones have found in range.
    problems = [*range_problems(cfg, CHOICES, RANGES)]
    problems = problems or [*_model_problems(cfg)]
    if not problems and device_count is not None:
        problems = [*_device_problems(cfg, device_count)]
    if problems:
        raise ConfigError("\n".join(problems))


CHOICES = {
    "masks.kind": ("block", "random"),
    "loss.pixel_target": ("normalised", "raw"),
    "train.matmul_dtype": ("auto", "float32", "bfloat16"),
    "train.remat": ("none", "block"),
    "data.source": ("tfds", "folder", "synthetic"),
    "export.weights": ("student", "teacher"),
    "eval.layout": ("market1501", "msmt17", "id_folders", "occluded_whole"),
    "eval.feature": ("cls", "mean", "stripes", "cls+mean", "patches"),
}
# Closed intervals of numbers, also of those in a tuple; None stands for 2**31 - 1.
# Sizes end far above what anybody trains: a slip there would take minutes to show.
RANGES = {
    "encoder.width": (4, 2**16),
    "encoder.depth": (1, 256),
    "encoder.num_heads": (1, 2**12),
    "encoder.mlp_ratio": (1, 64),
    "encoder.patch_size": (1, 2**10),
    "encoder.pos_embed_grid": (1, 2**10),
    "init.grid": (1, 2**10),
    "pixel_predictor.width": (4, 2**16),
    "pixel_predictor.depth": (1, 256),
    "pixel_predictor.num_heads": (1, 2**12),
    "feature_predictor.width": (4, 2**16),
    "feature_predictor.depth": (1, 256),
    "feature_predictor.num_heads": (1, 2**12),
    "regions.min_area": (0.01, 1),
    "regions.max_area": (0.01, 1),
    "regions.min_aspect": (0.1, 10),
    "regions.max_aspect": (0.1, 10),
    "regions.flip_probability": (0, 1),
    "regions.nested": (0, 1),
    "regions.min_nested_area": (0.01, 1),
    "regions.max_nested_area": (0.01, 1),
    "masks.ratio": (0, 1),
    "masks.block_share": (0, 1),
    "masks.min_block": (0, 1),
    "masks.min_aspect": (0.01, 100),
    "masks.max_aspect": (0.01, 100),
    "loss.pixel_weight": (0, None),
    "loss.visible_pixel_weight": (0, 1),
    "loss.feature_weight": (0, None),
    "loss.feature_ramp": (0, 1),
    "loss.feature_blocks": (1, 256),
    "loss.cls_weight": (0, None),
    "teacher.start_fraction": (0, 1),
    "teacher.end_fraction": (0, 1),
    "teacher.ramp": (0, 1),
    "teacher.max_decay": (0, 0.99999),
    "optim.base_lr": (0, None),
    "optim.lr": (0, None),
    "optim.warmup": (0, 1),
    "optim.beta1": (0, 0.9999),
    "optim.beta2": (0, 0.99999),
    "optim.weight_decay": (0, None),
    "optim.clip_norm": (1e-12, None),
    "train.seed": (0, 2**31 - 1),
    "train.batch_size": (1, 2**20),
    "train.epochs": (1e-9, None),
    "train.steps": (1, 2**31 - 1),
    "train.accumulate": (1, 2**20),
    "mesh.data": (-1, None),
    "mesh.fsdp": (1, None),
    "data.height": (1, 2**14),
    "data.width": (1, 2**14),
    "data.mean": (0, 1),
    "data.std": (0.001, 1),  # 1/255 is that of pixels in 0..255
    "data.num_threads": (1, 2**10),
    "data.num_workers": (0, 2**10),
    "data.max_pixels": (1, None),
    "data.min_side": (1, None),
    "data.max_bad_fraction": (0, 1),
    "data.synthetic.identities": (1, 10**9),
    "data.synthetic.cameras": (1, 1000),
    "data.synthetic.shots": (1, 1000),
    "data.synthetic.first_identity": (0, 10**9),
    "data.synthetic.seed": (0, 2**31 - 1),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep": (1, None),
    "log.every_steps": (1, None),
    "log.pictures_every_steps": (1, None),
    "log.num_pictures": (1, 2**10),
    "eval.every_steps": (0, None),
    "eval.identities": (2, 125_000),  # 8 images each, of a million in all
    "profile.start_step": (1, None),
    "profile.num_steps": (1, 1000),
}


MAX_PATCHES = 2**15  # their attention weights alone take 4 GiB a head
_MAX_WEIGHTS = 1e11  # ViT-22B has 2.2e10


def encoder_problems(cfg: ModelConfig) -> Iterator[str]:
    """Yields a line for every setting with which no encoder can be built."""
    patch = cfg.encoder.patch_size
    for path, size in (("height", cfg.data.height), ("width", cfg.data.width)):
        if size % patch:
            yield (
                f"config.data.{path}={size} is not a multiple of "
                f"config.encoder.patch_size={patch}; "
                f"use e.g. {max(patch, size - size % patch)}"
            )
    if cfg.num_patches > MAX_PATCHES:
        yield (
            f"config.data.height={cfg.data.height} and width={cfg.data.width} make "
            f"{cfg.num_patches} patches of {patch} pixels; attention takes "
            f"{MAX_PATCHES}"
        )
    weights = 12 * cfg.encoder.depth * cfg.encoder.width**2
    if weights > _MAX_WEIGHTS:
        yield (
            f"config.encoder.width={cfg.encoder.width} and depth={cfg.encoder.depth} "
            f"make {weights:.0e} weights; {_MAX_WEIGHTS:.0e} are allowed"
        )
    yield from _width_problems("encoder", cfg.encoder.width, cfg.encoder.num_heads)
    is_named = cfg.init.torch_weights or getattr(cfg.init, "workdir", None)
    if cfg.init != type(cfg.init)() and not is_named:
        yield (
            "config.init has settings of a file that is not named; name one with "
            "--config.init.torch_weights=FILE"
        )


def _width_problems(name: str, width: int, num_heads: int) -> Iterator[str]:
    if width % num_heads or width % 4:
        step = math.lcm(num_heads, 4)
        yield (
            f"config.{name}.width={width} is not a multiple of num_heads={num_heads} "
            f"and of 4 (sine-cosine); use e.g. {max(step, width - width % step)}"
        )


def _model_problems(cfg: Config) -> Iterator[str]:
    yield from encoder_problems(cfg)
    used, depth = cfg.predictors, cfg.encoder.depth
    for name, predictor in used.items():
        size = predictor_size(cfg.encoder, predictor)
        if size != (cfg.encoder.width, cfg.encoder.num_heads):
            yield from _width_problems(name, *size)
        blocks = predictor.memory_blocks
        is_outside = any(not -depth <= i < depth for i in blocks)
        if is_outside or not blocks or len({i % depth for i in blocks}) < len(blocks):
            yield (
                f"config.{name}.memory_blocks={blocks} must name one or more blocks of "
                f"the encoder, {-depth} .. {depth - 1}, none twice; use e.g. (-1,)"
            )
    trained = [*used.values()] if cfg.loss.pixel_weight else [cfg.feature_predictor]
    if not any({-1, depth - 1} & set(p.memory_blocks) for p in trained):
        yield (
            "no predictor reads the encoder's last block, so its final norm would "
            "never be trained; put -1 into config.pixel_predictor.memory_blocks"
        )
    if cfg.loss.pixel_weight == 0 and cfg.loss.feature_weight == 0:
        yield (
            "config.loss.pixel_weight and feature_weight are both 0: no patch of "
            "RegionB is predicted"
        )
    for path in (
        *("regions.area", "regions.aspect", "regions.nested_area"),
        "masks.aspect",
    ):
        section, leaf = path.split(".")
        low, high = (
            getattr(getattr(cfg, section), f"{end}_{leaf}") for end in ("min", "max")
        )
        if low > high:
            yield f"config.{section}.min_{leaf}={low} exceeds max_{leaf}={high}"
    if cfg.num_patches and not 0 < cfg.num_hidden < cfg.num_patches:
        yield (
            f"config.masks.ratio={cfg.masks.ratio} hides {cfg.num_hidden} of "
            f"{cfg.num_patches} patches; at least one must be hidden and one visible"
        )
    if cfg.data.source == "synthetic" and cfg.data.path:
        yield (
            f"config.data.path={cfg.data.path} is not read with data.source=synthetic; "
            "add --config.data.source=folder, or tfds for a prepared set"
        )
    if not cfg.eval.path and cfg.eval.layout != EvalConfig().layout:
        yield (
            f"config.eval.layout={cfg.eval.layout} is of the folder config.eval.path, "
            "which is missing; without both synthetic people are scored"
        )
    if cfg.eval.path and not cfg.eval.every_steps:
        yield "config.eval.path is scored every config.eval.every_steps, which is 0"
    if cfg.optim.lr is not None and cfg.optim.base_lr != OptimConfig().base_lr:
        yield "config.optim.base_lr has no effect where config.optim.lr is set"
    if cfg.data.source in ("tfds", "folder") and not cfg.data.path:
        yield (
            f"no data: give --config.data.path=DIR (made by `{PREPARE_DATA}`), or a "
            "folder of images with --config.data.source=folder, or try "
            "--config=configs/quickstart.py"
        )


def mesh_problems(mesh: MeshConfig, device_count: int) -> Iterator[str]:
    """Yields a line if the mesh does not use all devices of all hosts, each once."""
    data, fsdp = mesh.data, mesh.fsdp
    if device_count % fsdp or data not in (-1, device_count // fsdp):
        fitting = math.gcd(fsdp, device_count)
        yield (
            f"config.mesh: data={data} x fsdp={fsdp} do not make the {device_count} "
            f"devices that are here; use e.g. --config.mesh.data=-1 "
            f"--config.mesh.fsdp={fitting}"
        )


def _device_problems(cfg: Config, device_count: int) -> Iterator[str]:
    yield from mesh_problems(cfg.mesh, device_count)
    batch, parts = cfg.train.batch_size, device_count * cfg.train.accumulate
    nearest = max(parts, batch - batch % parts)
    if batch % parts:
        yield (
            f"config.train.batch_size={batch} does not split over {device_count} "
            f"devices x config.train.accumulate={cfg.train.accumulate}; use a multiple "
            f"of {parts}, e.g. --config.train.batch_size={nearest}"
        )
