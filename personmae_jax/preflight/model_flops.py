"""FLOPs that the method needs for one image, whatever the program makes of them."""

from personmae_jax.config import Config, ModelConfig, PredictorConfig, predictor_size

_TRAINED = 3  # the forward pass once, the backward pass twice


def model_flops_per_image(cfg: ModelConfig) -> int:
    """Returns the FLOPs of one image in one training step.

    Counted are matrix products alone, each multiply-add as two: the student's encoder
    on the visible patches and all predictors, forward once and backward twice, and
    the teacher's encoder on all patches, forward once. Where people are trained on, it
    is the encoder alone, on all patches. What a program computes again, pads or masks
    away does not count.
    """
    if not isinstance(cfg, Config):
        return _TRAINED * _encoder(cfg, cfg.num_patches)
    visible = cfg.num_patches - cfg.num_hidden
    flops = _TRAINED * _encoder(cfg, visible)
    outputs = 3 * cfg.encoder.patch_size**2
    flops += _TRAINED * _predictor(cfg, cfg.pixel_predictor, visible, outputs)
    if cfg.loss.feature_weight:
        outputs = cfg.encoder.width
        flops += _TRAINED * _predictor(cfg, cfg.feature_predictor, visible, outputs)
    if cfg.loss.cls_weight:
        flops += _TRAINED * _dense(1, cfg.encoder.width, cfg.encoder.width)
    if cfg.loss.feature_weight or cfg.loss.cls_weight:
        flops += _encoder(cfg, cfg.num_patches)
    return flops


def _encoder(cfg: ModelConfig, num_patches: int) -> int:
    width, tokens = cfg.encoder.width, 1 + num_patches
    mlp = 2 * _dense(tokens, width, cfg.encoder.mlp_ratio * width)
    block = _self_attention(tokens, width) + mlp
    patch_embed = _dense(num_patches, 3 * cfg.encoder.patch_size**2, width)
    return patch_embed + cfg.encoder.depth * block


def _predictor(
    cfg: Config, predictor: PredictorConfig, num_visible: int, outputs: int
) -> int:
    width, _ = predictor_size(cfg.encoder, predictor)
    queries, part = cfg.num_patches, 1 + num_visible
    memory = part * len(predictor.memory_blocks)
    block = (
        _dense(queries, width, width)  # q
        + _dense(memory, width, 2 * width)  # k and v
        + _attention(queries, memory, width)
        + _dense(queries, width, width)
        + 2 * _dense(queries, width, 4 * width)
    )
    if predictor.use_self_attention:
        block += _self_attention(queries, width)
    return (
        _dense(1, 2, width)  # of the size ratio
        + _dense(memory, cfg.encoder.width, width)
        + predictor.depth * block
        + _dense(queries, width, outputs)
    )


def _dense(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def _self_attention(tokens: int, width: int) -> int:
    return (
        _dense(tokens, width, 3 * width)
        + _attention(tokens, tokens, width)
        + _dense(tokens, width, width)
    )


def _attention(queries: int, keys: int, width: int) -> int:
    """Scores, and the values they weigh."""
    return 2 * (2 * queries * keys * width)
