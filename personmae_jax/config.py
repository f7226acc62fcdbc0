"""Every setting of a run: its default, its unit and where the default comes from.

`configs/*.py` return a `Config`; the command line overrides single fields
(`--config.optim.base_lr=2e-4`). Nothing here imports jax, so that a wrong setting
is said before any device work. Older runs are read with a new field's default, unless
`config_json.py` says what was done before it.

Sources: MAE = arXiv 2111.06377, BEiT = 2106.08254, BootMAE = 2207.07116,
SiameseIM = 2206.01204, HAP = 2310.20695, TransReID = 2102.04378,
TransReID-SSL = 2111.12084, data2vec = 2202.03555, data2vec 2.0 = 2212.07525,
CropMAE = 2403.17823, CAPI = 2502.08769. "ours" marks a choice of this project.
"""

import dataclasses
from dataclasses import dataclass

from personmae_jax.config_run import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    ProfileConfig,
)


@dataclass(slots=True, kw_only=True)
class EncoderConfig:
    """Plain pre-norm ViT: cls token, sine-cosine positions, erf GELU."""

    width: int = 768  # ViT-B
    depth: int = 12  # blocks
    num_heads: int = 12
    mlp_ratio: int = 4  # hidden width of the MLP over `width`; ViT
    patch_size: int = 16  # pixels; TransReID, HAP
    # Positions are parameters that start as the sine-cosine ones, or as the table of
    # config.init.torch_weights; for files whose table is another (DeiT, timm).
    learned_positions: bool = False
    # Rows and columns of the grid of the fixed position embeddings; None:
    # the input's own. Fine-tuning on another size keeps those of pretraining.
    pos_embed_grid: tuple[int, int] | None = None


@dataclass(slots=True, kw_only=True)
class PredictorConfig:
    """A Transformer decoder from RegionA's tokens to RegionB's patches."""

    width: int | None = None  # None: the encoder's
    depth: int = 2  # blocks; BootMAE
    num_heads: int | None = None  # None: the encoder's
    # Encoder blocks whose tokens form the memory; 0 is the first, -1 the last.
    memory_blocks: tuple[int, ...] = (-1,)
    use_self_attention: bool = True  # among the queries; CrossMAE does without


@dataclass(slots=True, kw_only=True)
class RegionsConfig:
    """How RegionA and RegionB are cut from one image."""

    min_area: float = 0.8  # of the image; HAP
    max_area: float = 1.0
    min_aspect: float = 3 / 4  # width/height over the input's own; Inception crops
    max_aspect: float = 4 / 3
    flip_probability: float = 0.5  # one horizontal flip shared by both regions; ours
    same: bool = False  # RegionB = RegionA: plain MAE's setting, for the ablation
    nested: float = 1.0  # share of images whose RegionB lies in RegionA; CropMAE
    min_nested_area: float = 0.4  # of RegionA; ours
    max_nested_area: float = 0.8


@dataclass(slots=True, kw_only=True)
class MasksConfig:
    """Which patches of RegionA are hidden: exactly round(ratio * patches)."""

    kind: str = "block"  # "block" mimics occlusion (the paper); "random" is MAE's
    ratio: float = 0.5  # HAP
    block_share: float = 1.0  # of the hidden ones; the others at random; BootMAE 0.8
    min_block: float = 0.09  # of all patches: 12 of 128; BEiT's 16 of 196
    min_aspect: float = 0.3  # height/width of a block, in patches; BEiT
    max_aspect: float = 3.3


@dataclass(slots=True, kw_only=True)
class LossConfig:
    """What is predicted about RegionB, and how the two losses are weighed."""

    pixel_target: str = "normalised"  # per patch (MAE's norm_pix_loss), or "raw"
    pixel_weight: float = 1.0  # BootMAE
    visible_pixel_weight: float = 1.0  # of what is visible in RegionA; MAE 0
    feature_weight: float = 1.0  # BootMAE; 0 leaves the feature predictor out
    feature_ramp: float = 0.25  # of all steps, linear from 0; ours
    # Upper ones, or all where there are fewer, whose mean is the target; data2vec.
    feature_blocks: int = 6
    feature_instance_norm: bool = True  # of each, over patches; data2vec 2.0
    # cls predicts their mean token; data2vec 2.0: 0.01. In our runs of 600 steps, 0 is
    # better after fine-tuning (docs/results.md); no long run has compared them here.
    cls_weight: float = 0.02


@dataclass(slots=True, kw_only=True)
class TeacherConfig:
    """Decay of the moving average of the encoder that makes the feature target.

    The average remembers a fraction of the run, so that one default holds for any
    length (ours; BootMAE's 0.999 to 0.9999 are made for 800 epochs).
    """

    start_fraction: float = 0.002  # of all steps
    end_fraction: float = 0.02
    ramp: float = 0.5  # of all steps, linear from start to end, then constant
    max_decay: float = 0.9999  # at 0.99999 float32 loses the update


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero; MAE, HAP."""

    base_lr: float = 1.5e-4  # learning rate = base_lr * batch_size / 256
    lr: float | None = None  # at any batch size, in the place of base_lr; MAE
    warmup: float = 40 / 300  # of all steps
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05  # none on biases, norms, cls and mask tokens
    clip_norm: float | None = None  # global gradient norm; None: off


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    seed: int = 0
    batch_size: int = 4096  # images, over all devices and hosts; MAE
    epochs: float = 300.0  # HAP on LUPerson
    steps: int | None = None  # None: epochs * records / batch_size
    # Micro-batches whose gradients are averaged in one step. Where
    # `loss.visible_pixel_weight` is not 1, each has weights of its own sum.
    accumulate: int = 1
    # Of matrix products and activations; parameters, the inside of norms and softmax,
    # and losses are always float32.
    # "auto": bfloat16 on TPU and GPU, float32 on CPU.
    matmul_dtype: str = "auto"
    # What the backward pass computes again rather than keeps: "none", or "block", all
    # inside a Transformer block, for a third more work and much less memory.
    remat: str = "none"


@dataclass(slots=True, kw_only=True)
class SyntheticConfig:
    """Synthetic pedestrians: identities x cameras x shots records."""

    identities: int = 2000
    cameras: int = 6
    shots: int = 4
    first_identity: int = 0  # identities from here on; held-out sets start higher
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class ImageConfig:
    """Images as the network sees them, and how they are read."""

    height: int = 256  # pixels; TransReID, HAP; 384 is their other size
    width: int = 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in 0..1; ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_threads: int = 16  # that share the rows of a batch, at most one a core; grain
    num_workers: int = 0  # worker processes, each with num_threads; 0: this process
    max_pixels: int = 50_000_000  # of one image; a larger one counts as bad; ours
    min_side: int = 8  # pixels; a smaller one counts as bad; ours
    synthetic: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)


@dataclass(slots=True, kw_only=True)
class DataConfig(ImageConfig):
    source: str = "tfds"  # "tfds" (ArrayRecord), "folder" of images, or "synthetic"
    path: str | None = None  # of the tfds data set or of the folder
    split: str = "train"  # tfds only
    # Distinct bad images over all records above which the run stops; ours.
    max_bad_fraction: float = 0.01


@dataclass(slots=True, kw_only=True)
class InitConfig:
    """What the encoder, and with it the teacher, starts from."""

    # A local .pth, .pt or .safetensors file of a ViT; None: from scratch.
    torch_weights: str | None = None
    # What the names of the ViT in it begin with, keys of dicts included, as
    # "model.backbone"; None: its only ViT, or the average (teacher, model_ema) of one.
    prefix: str | None = None
    # Rows and columns of patches that its learned positions are for; None: what the
    # file tells, else a guess by their number.
    grid: tuple[int, int] | None = None
    # The file was trained on pixels in -1..1 (mean 0.5, std 0.5 of 0..1; timm's
    # AugReg, BEiT): its patch embedding is changed to answer the same to pixels
    # normalised with config.data.mean and std.
    fold_normalisation: bool = False


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    # "student" or "teacher": what launch/export_torch.py writes unless told.
    weights: str = "student"


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """Retrieval of people that the run does not see, before, during and after it."""

    every_steps: int | None = None  # None or 0: never
    path: str | None = None  # of a folder of known people; None: synthetic ones
    layout: str = "market1501"  # of that folder; see reid/dataset_layouts.py
    identities: int = 100  # synthetic, 4 times in each of 2 cameras
    # Or "mean", "stripes", "cls+mean", "patches"; see reid/features.py.
    feature: str = "cls"
    # Take each camera's mean feature off first; ours. Published scores do not.
    centre_cameras: bool = False


def grid_of(encoder: EncoderConfig, data: ImageConfig) -> tuple[int, int]:
    """Rows and columns of patches of an image, or of either region of one."""
    return data.height // encoder.patch_size, data.width // encoder.patch_size


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """An encoder, what it starts from and its images: what every kind of run has."""

    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: ImageConfig = dataclasses.field(default_factory=ImageConfig)

    @property
    def grid(self) -> tuple[int, int]:
        return grid_of(self.encoder, self.data)

    @property
    def pos_embed_grid(self) -> tuple[int, int]:
        """Grid in whose coordinates the fixed position embeddings are taken."""
        return self.encoder.pos_embed_grid or self.grid

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns


@dataclass(slots=True, kw_only=True)
class Config(ModelConfig):
    pixel_predictor: PredictorConfig = dataclasses.field(
        # Shallow tokens relieve the encoder of carrying pixels; BootMAE.
        default_factory=lambda: PredictorConfig(
            width=512, num_heads=8, memory_blocks=(0, -1), use_self_attention=False
        )
    )
    feature_predictor: PredictorConfig = dataclasses.field(
        # Tokens of several depths, and no self-attention; CAPI, CrossMAE.
        default_factory=lambda: PredictorConfig(
            memory_blocks=(3, 7, -1), use_self_attention=False
        )
    )
    regions: RegionsConfig = dataclasses.field(default_factory=RegionsConfig)
    masks: MasksConfig = dataclasses.field(default_factory=MasksConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    export: ExportConfig = dataclasses.field(default_factory=ExportConfig)

    @property
    def predictors(self) -> dict[str, PredictorConfig]:
        """The predictors that are trained, by the names of their parameters."""
        predictors = {"pixel_predictor": self.pixel_predictor}
        if self.loss.feature_weight:
            predictors["feature_predictor"] = self.feature_predictor
        return predictors

    @property
    def num_hidden(self) -> int:
        """Patches of RegionA that the encoder does not see; the same in every image."""
        return round(self.masks.ratio * self.num_patches)


def predictor_size(
    encoder: EncoderConfig, predictor: PredictorConfig
) -> tuple[int, int]:
    """Returns (width, heads) of a predictor, the encoder's where it sets none."""
    return (
        encoder.width if predictor.width is None else predictor.width,
        encoder.num_heads if predictor.num_heads is None else predictor.num_heads,
    )
