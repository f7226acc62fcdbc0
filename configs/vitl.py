"""PersonMAE ViT-L on LUPerson: 300 epochs, batch 4096, 256 x 128 pixels.

Source: arXiv 2311.04496; the size is our choice, after MAE;
`personmae_jax/config.py` says where each setting comes from.

Command: python launch/pretrain.py --config=configs/vitl.py
  --config.data.path=DIR --workdir=WORKDIR
Data: LUPerson, 4.18 M crops without labels: 306,000 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config import Config, EncoderConfig, PredictorConfig


def get_config() -> Config:
    cfg = Config()  # what is not named here has its default of config.py
    cfg.encoder = EncoderConfig(width=1024, depth=24, num_heads=16, patch_size=16)
    cfg.data.height, cfg.data.width = 256, 128
    # RegionB, which is predicted, lies inside RegionA; blocks of A are hidden.
    cfg.regions.min_area, cfg.regions.nested = 0.8, 1.0
    # 63 patches stay, 64 tokens with cls: a TPU pads them to a multiple of 8.
    cfg.masks.kind, cfg.masks.ratio = "block", 65 / 128
    # Two small decoders predict the whole of B: its pixels, and the teacher's features.
    cfg.pixel_predictor = PredictorConfig(
        width=512,
        depth=2,
        num_heads=8,
        use_self_attention=False,
        memory_blocks=(0, -1),
    )
    cfg.feature_predictor = PredictorConfig(
        depth=2, use_self_attention=False, memory_blocks=(7, 15, -1)
    )
    # The features are the mean of the teacher's upper blocks; cls predicts theirs.
    cfg.loss.feature_blocks, cfg.loss.feature_instance_norm = 12, True
    cfg.loss.pixel_weight, cfg.loss.feature_weight = 1.0, 1.0
    cfg.loss.cls_weight = 0.02
    cfg.teacher.start_fraction, cfg.teacher.end_fraction = 0.002, 0.02  # of the run
    cfg.train.batch_size, cfg.train.epochs = 4096, 300.0
    cfg.optim.base_lr, cfg.optim.weight_decay = 1.5e-4, 0.05
    cfg.optim.warmup = 40 / 300
    return cfg
