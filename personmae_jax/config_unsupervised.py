"""Every setting of training without labels: its default, and where that comes from.

`configs/usl_*.py` and `uda_*.py` return an `UnsupervisedConfig`. Nothing here imports
jax.

Unsupervised learning (USL) starts from a pretrained encoder, unsupervised domain
adaptation (UDA) from one that was fine-tuned on another data set; the training is the
same. Sources: TransReID-SSL = damo-cv/TransReID-SSL, cluster-contrast-reid (usl.py and
its scripts), of which PASS and CION use the same, but that it erases by the mean where
this erases by noise; CAP = arXiv 2012.10674; "ours" marks a choice of this project.
"""

from dataclasses import dataclass, field

from personmae_jax.config_check import CHOICES, RANGES
from personmae_jax.config_finetune import (
    PEOPLE_CHOICES,
    PEOPLE_RANGES,
    AugmentConfig,
    FinetuneDataConfig,
    FinetuneOptimConfig,
    PeopleConfig,
    check_people,
)
from personmae_jax.config_values import range_problems


@dataclass(slots=True, kw_only=True)
class UnsupervisedDataConfig(FinetuneDataConfig):
    """The target: its training images are clustered, query and gallery score.

    Layout "images" is any folder of images, without queries.
    """

    camera_folders: bool = False  # images: a folder right below `path` is a camera


@dataclass(slots=True, kw_only=True)
class ClusterConfig:
    """DBSCAN on the k-reciprocal Jaccard distance, once a round; TransReID-SSL."""

    k1: int = 30  # nearest images, itself among them, tested for reciprocity
    k2: int = 6  # nearest images, itself among them, to average over; 1: no average
    # Largest distance of neighbours; None: that of 0.3, 0.35 .. 0.7 which makes the
    # most clusters, each round anew (ours, for data without a published value).
    eps: float | None = 0.6
    min_samples: int = 4  # images within eps, itself among them, that make a core
    # Each camera's mean feature is taken off first, so that the clusters of a weak
    # encoder follow people rather than cameras; ours, docs/unsupervised.md.
    centre_cameras: bool = False


@dataclass(slots=True, kw_only=True)
class MemoryConfig:
    """One vector a cluster, contrasted with each image; TransReID-SSL."""

    temperature: float = 0.05  # that cosines are divided by
    momentum: float = 0.2  # what a vector keeps of itself at an update
    # A vector for each camera of a cluster; the cure where clusters follow cameras.
    camera_proxies: bool = False  # CAP
    cross_camera_weight: float = 0.5  # camera_proxies: of that loss; CAP
    num_negatives: int = 50  # camera_proxies: nearest of other clusters; CAP


@dataclass(slots=True, kw_only=True)
class ClusterSamplingConfig:
    """A batch is so many images each of so many clusters; P x K."""

    clusters: int = 32  # P; TransReID-SSL
    images: int = 8  # K; TransReID-SSL
    # One image, the others of other cameras; TransReID-SSL.
    across_cameras: bool = True


@dataclass(slots=True, kw_only=True)
class UnsupervisedHeadConfig:
    """What stands around the encoder."""

    drop_path: float = 0.3  # of the last block, growing from 0; TransReID-SSL
    # Before the batch norm; TransReID-SSL; or "mean" or "stripes", reid/features.py.
    feature: str = "cls"


@dataclass(slots=True, kw_only=True)
class UnsupervisedOptimConfig(FinetuneOptimConfig):
    optimizer: str = "sgd"  # TransReID-SSL; or "adamw"
    base_lr: float = 3.5e-4  # at 256 images a step; TransReID-SSL
    layer_decay: float = 1.0  # TransReID-SSL has none
    warmup: float = 0.0  # of all steps, linear from 0; TransReID-SSL has none
    weight_decay: float = 5e-4  # on matrices alone; TransReID-SSL: on everything
    decay_every: float = 0.4  # of all steps the lr is multiplied by `decay`
    decay: float = 0.1  # TransReID-SSL: after 20 and 40 of 50 rounds


@dataclass(slots=True, kw_only=True)
class UnsupervisedTrainConfig:
    seed: int = 0
    rounds: int = 50  # clusterings, each with the steps on it; TransReID-SSL
    steps_per_round: int = 200  # TransReID-SSL
    matmul_dtype: str = "auto"  # as in pretraining
    remat: str = "none"  # as in pretraining


@dataclass(slots=True, kw_only=True)
class UnsupervisedEvalConfig:
    """Scores steer nothing: the last step is the result."""

    path: str | None = None  # of another data set; None: the target's queries
    layout: str = "market1501"  # of that folder
    # TransReID-SSL; the start and the end, too; 0: query and gallery stay unread.
    every_rounds: int = 10
    batch_size: int = 256  # images at once, over all devices; TransReID-SSL


@dataclass(slots=True, kw_only=True)
class UnsupervisedConfig(PeopleConfig):
    data: UnsupervisedDataConfig = field(default_factory=UnsupervisedDataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sampling: ClusterSamplingConfig = field(default_factory=ClusterSamplingConfig)
    augment: AugmentConfig = field(  # TransReID-SSL erases up to 0.4
        default_factory=lambda: AugmentConfig(erase_max_area=0.4)
    )
    head: UnsupervisedHeadConfig = field(default_factory=UnsupervisedHeadConfig)
    optim: UnsupervisedOptimConfig = field(default_factory=UnsupervisedOptimConfig)
    train: UnsupervisedTrainConfig = field(default_factory=UnsupervisedTrainConfig)
    eval: UnsupervisedEvalConfig = field(default_factory=UnsupervisedEvalConfig)

    @property
    def batch_size(self) -> int:
        """Images a step, over all devices and hosts."""
        return self.sampling.clusters * self.sampling.images

    @property
    def num_steps(self) -> int:
        return self.train.rounds * self.train.steps_per_round


_CHOICES = PEOPLE_CHOICES | {
    "data.layout": (*CHOICES["eval.layout"], "images", "synthetic"),
    "head.feature": ("cls", "mean", "stripes"),
}
_RANGES = PEOPLE_RANGES | {
    "cluster.k1": (2, 1000),
    "cluster.k2": (1, 1000),
    "cluster.eps": (0.05, 0.8),  # the graph of distances ends there
    "cluster.min_samples": (2, 1000),
    "memory.temperature": (0.001, 10),
    "memory.momentum": (0, 0.9999),
    "memory.cross_camera_weight": (0, None),
    "memory.num_negatives": (1, 2**16),
    "sampling.clusters": (2, 2**16),
    "optim.decay_every": (0.01, 1),
    "optim.decay": (0.001, 1),
    "train.rounds": (1, 10**6),
    "train.steps_per_round": (1, 10**6),
    "eval.every_rounds": (0, None),
}


def check_unsupervised(
    cfg: UnsupervisedConfig, device_count: int | None = None
) -> None:
    """Refuses settings that cannot train, as `config_check.check` does."""
    problems = [*range_problems(cfg, CHOICES | _CHOICES, RANGES | _RANGES)]
    if cfg.cluster.k2 > cfg.cluster.k1:
        problems.append("config.cluster.k2 exceeds k1; the field takes 6 of 30")
    if cfg.cluster.min_samples > cfg.cluster.k1 + 1:
        problems.append(
            "config.cluster.min_samples exceeds k1 + 1, more images than any has near"
        )
    if cfg.data.layout != "synthetic" and not cfg.data.path:
        problems.append(
            "no data: give --config.data.path=DIR with --config.data.layout=market1501 "
            "(or msmt17, images, ...), or try --config=configs/usl_quickstart.py"
        )
    if cfg.eval.path and not cfg.eval.every_rounds:
        problems.append(
            "config.eval.path is scored every config.eval.every_rounds, which is 0"
        )
    if cfg.data.camera_folders and cfg.data.layout != "images":
        problems.append(
            f"config.data.camera_folders goes with data.layout=images; names tell the "
            f"cameras of {cfg.data.layout}"
        )
    check_people(cfg, problems, "clusters", device_count)
