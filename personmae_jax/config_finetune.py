"""Every setting of supervised fine-tuning: its default, and where that comes from.

`configs/finetune_*.py` return a `FinetuneConfig`. Nothing here imports jax.

Sources: TransReID = arXiv 2102.04378, configs/Market/vit_base.yml and vit_sie.yml;
TransReID-SSL = 2111.12084, transreid_pytorch/configs/market; HAP = 2310.20695,
downstream_tasks/person_reid/config_reid.py; BoT = Bag of Tricks, 1903.07071. "ours"
marks a choice of this project. The optimizer is HAP's as a whole, because it was made
for a ViT that masked images of people have pretrained (HAP weighs both losses by 0.5
and has no BNNeck); TransReID's, made for ImageNet weights, is `optimizer="sgd"` with
base_lr 8e-3, weight_decay 1e-4, layer_decay 1, and biases at twice that rate, which is
not here.
"""

from dataclasses import dataclass, field
from typing import Any

from personmae_jax.config import (
    CheckpointConfig,
    ImageConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    ProfileConfig,
)
from personmae_jax.config_check import CHOICES, RANGES, encoder_problems, mesh_problems
from personmae_jax.config_values import range_problems
from personmae_jax.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class FinetuneInitConfig(InitConfig):
    """What the encoder starts from; random where neither a run nor a file is named.

    Run and file bring their architecture, mean and std with them. Of a file no tensor
    tells heads, mean and std; None: what is found beside it, else a guess.
    """

    workdir: str | None = None  # of a run, pretrained or fine-tuned
    step: int | None = None  # of its checkpoint; None: the latest
    weights: str = "student"  # or "teacher"
    num_heads: int | None = None
    mean: tuple[float, float, float] | None = None  # RGB in 0..1
    std: tuple[float, float, float] | None = None


@dataclass(slots=True, kw_only=True)
class FinetuneDataConfig(ImageConfig):
    """Here an image that is too large or too small is refused."""

    layout: str = "market1501"  # or "msmt17", "id_folders", ...
    path: str | None = None  # the data set's folder
    query_camera: int | None = None  # id_folders: of the queries; None: the first
    synthetic_train: int = 1000  # of its identities; the others are the test


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """A batch is so many images each of so many identities; P x K."""

    identities: int = 16  # P; TransReID (HAP 8)
    images: int = 4  # K; TransReID (HAP 8)


@dataclass(slots=True, kw_only=True)
class AugmentConfig:
    """What is done to a training image after it is resized; TransReID, HAP."""

    flip_probability: float = 0.5
    padding: int = 10  # pixels of black on every side, of which a crop is taken
    erase_probability: float = 0.5  # of one rectangle of noise
    erase_min_area: float = 0.02  # of the image; timm's RandomErasing
    erase_max_area: float = 1 / 3
    erase_min_aspect: float = 0.3  # of height to width, up to 1 over it


@dataclass(slots=True, kw_only=True)
class HeadConfig:
    """What stands around the encoder."""

    drop_path: float = 0.1  # of the last block, growing from 0; TransReID, HAP
    use_cameras: bool = False  # SIE: an embedding for each camera; TransReID
    camera_scale: float = 3.0  # of that embedding; TransReID, SIE_COE
    feature: str = "before"  # the batch norm, or "after": what retrieval ranks by


@dataclass(slots=True, kw_only=True)
class FinetuneLossConfig:
    identity_weight: float = 1.0  # TransReID
    triplet_weight: float = 1.0  # TransReID
    label_smoothing: float = 0.1  # BoT; off in TransReID's and HAP's settings


@dataclass(slots=True, kw_only=True)
class FinetuneOptimConfig:
    optimizer: str = "adamw"  # HAP; or "sgd", TransReID
    base_lr: float = 8e-3  # at 64 images a step, in proportion for others; HAP
    layer_decay: float = (
        0.4  # of the learning rate from one block down to the next; HAP
    )
    warmup: float = 0.05  # of all steps, linear from 0; then a cosine to 0; HAP
    weight_decay: float = 0.05  # on matrices alone; HAP
    beta1: float = 0.9  # HAP
    beta2: float = 0.999  # HAP
    momentum: float = 0.9  # of "sgd"; TransReID
    clip_norm: float | None = None  # global gradient norm; None: off


@dataclass(slots=True, kw_only=True)
class FinetuneTrainConfig:
    seed: int = 0
    epochs: float = 100.0  # of as many images as there are to train on; HAP
    steps: int | None = None  # None: epochs * images / batch
    matmul_dtype: str = "auto"  # as in pretraining
    remat: str = "none"  # as in pretraining


@dataclass(slots=True, kw_only=True)
class FinetuneEvalConfig:
    """Whom the run is scored by; the checkpoint of the highest mAP is kept."""

    path: str | None = None  # of another data set; None: the training data's queries
    layout: str = "market1501"  # of that folder; Occluded-REID's is occluded_whole
    every_epochs: float = 10.0  # HAP; the end is always evaluated
    batch_size: int = 256  # images at once, over all devices; TransReID, HAP


@dataclass(slots=True, kw_only=True)
class PeopleConfig(ModelConfig):
    """What every training on people has; `encoder` counts from scratch only."""

    init: FinetuneInitConfig = field(default_factory=FinetuneInitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    # The last one, beside the start and that of the best mAP if that is chosen.
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(keep=1)
    )
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(slots=True, kw_only=True)
class FinetuneConfig(PeopleConfig):
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: FinetuneLossConfig = field(default_factory=FinetuneLossConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    eval: FinetuneEvalConfig = field(default_factory=FinetuneEvalConfig)

    @property
    def batch_size(self) -> int:
        """Images a step, over all devices and hosts."""
        return self.sampling.identities * self.sampling.images


# Of every training on people, beside what pretraining has under the same names.
PEOPLE_CHOICES = {
    "init.weights": ("student", "teacher"),
    "optim.optimizer": ("adamw", "sgd"),
}
PEOPLE_RANGES = {
    "init.step": (0, None),
    "init.num_heads": (1, 2**12),
    "init.mean": (0, 1),
    "init.std": (0.001, 1),
    "data.synthetic_train": (1, None),
    "sampling.images": (2, 2**10),
    "augment.flip_probability": (0, 1),
    "augment.padding": (0, 1000),
    "augment.erase_probability": (0, 1),
    "augment.erase_min_area": (0.001, 1),
    "augment.erase_max_area": (0.001, 1),
    "augment.erase_min_aspect": (0.01, 1),
    "head.drop_path": (0, 0.99),
    "optim.layer_decay": (0.01, 1),
    "optim.momentum": (0, 0.9999),
    "eval.batch_size": (1, 2**16),
}
_CHOICES = PEOPLE_CHOICES | {
    "data.layout": (*CHOICES["eval.layout"], "synthetic"),
    "head.feature": ("before", "after"),
}
_RANGES = PEOPLE_RANGES | {
    "sampling.identities": (2, 2**16),
    "head.camera_scale": (0, None),
    "loss.identity_weight": (0, None),
    "loss.triplet_weight": (0, None),
    "loss.label_smoothing": (0, 0.99),
    "eval.every_epochs": (1e-9, None),
}


def check_finetuning(cfg: FinetuneConfig, device_count: int | None = None) -> None:
    """Refuses settings that cannot train, as `config_check.check` does."""
    problems = [*range_problems(cfg, CHOICES | _CHOICES, RANGES | _RANGES)]
    if not (cfg.loss.identity_weight or cfg.loss.triplet_weight):
        problems.append("config.loss.identity_weight and triplet_weight are both 0")
    if cfg.data.layout != "synthetic" and not cfg.data.path:
        problems.append(
            "no data: give --config.data.path=DIR with --config.data.layout=market1501 "
            "(or msmt17, id_folders), or try --config=configs/finetune_quickstart.py"
        )
    if cfg.eval.path is not None and cfg.head.use_cameras:
        problems.append(
            "config.head.use_cameras: the cameras of config.eval.path are not those "
            "that embeddings are trained for; leave it off"
        )
    check_people(cfg, problems, "identities", device_count)


def check_people(
    cfg: Any, problems: list[str], groups: str, device_count: int | None
) -> None:
    """Adds the rules of every training on people to those found broken; raises.

    `groups` is what `cfg.sampling` counts images of, e.g. "identities"; the others as
    of `config_check.check`.
    """
    if cfg.data.layout == "synthetic" and cfg.data.path:
        problems.append(
            f"config.data.path={cfg.data.path} is not read with data.layout=synthetic; "
            "add --config.data.layout=market1501 (or msmt17, id_folders, ...)"
        )
    if cfg.augment.erase_min_area > cfg.augment.erase_max_area:
        problems.append("config.augment.erase_min_area exceeds erase_max_area")
    if cfg.eval.path is None and cfg.eval.layout != FinetuneEvalConfig().layout:
        problems.append(
            "config.eval.layout is of the folder config.eval.path, which is missing; "
            "without both the run is scored by the queries of config.data"
        )
    # The later rules divide by what the first ones have found in range.
    problems = problems or [*encoder_problems(cfg)]
    if not problems and device_count is not None:
        problems = [*mesh_problems(cfg.mesh, device_count)]
        if cfg.batch_size % device_count:
            problems.append(
                f"config.sampling: {getattr(cfg.sampling, groups)} {groups} x "
                f"{cfg.sampling.images} images do not split over {device_count} "
                f"devices; use a multiple, e.g. --config.sampling.{groups}="
                f"{device_count}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
