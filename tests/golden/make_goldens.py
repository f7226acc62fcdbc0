"""Writes the golden npz files beside it: layers, losses and schedules of PyTorch.

    python tests/golden/make_goldens.py

Needs torch (made with 2.13.0+cpu) and numpy, nothing of personmae_jax. Everything is
computed in float64 from float32 weights and inputs, so that a test sees our rounding
alone. The network is that of torch_reference.py.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch_reference import (
    GRID,
    HEADS,
    PATCH,
    WIDTH,
    CrossAttention,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    Mlp,
    PersonMAE,
    SelfAttention,
    normalise,
    pixel_target,
    table,
)

HERE = Path(__file__).parent


def set_random(module, generator):
    """Weights of a size at which every layer matters, exactly float32."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.3
        is_scale = p.ndim == 1 and name.endswith("weight")
        p.data = (noise + 1.0 if is_scale else noise).double()


def arrays_of(module, prefix=""):
    return {prefix + k: v.float().numpy() for k, v in module.state_dict().items()}


def save(name, arrays):
    arrays = {
        k: v.detach().numpy() if isinstance(v, torch.Tensor) else v
        for k, v in arrays.items()
    }
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def make_layers(generator):
    arrays = {
        "x": torch.randn(2, 5, WIDTH, generator=generator),
        "memory": torch.randn(2, 7, WIDTH, generator=generator),
    }
    x, memory = arrays["x"].double(), arrays["memory"].double()
    layers = {
        "self_attention": (SelfAttention(WIDTH, HEADS), (x,)),
        "cross_attention": (CrossAttention(WIDTH, HEADS), (x, memory)),
        "mlp": (Mlp(WIDTH), (x,)),
        "encoder_block": (EncoderBlock(WIDTH, HEADS), (x,)),
        "decoder_block": (DecoderBlock(WIDTH, HEADS), (x, memory)),
    }
    for name, (layer, inputs) in layers.items():
        set_random(layer, generator)
        arrays |= arrays_of(layer, f"{name}/")
        arrays[f"{name}:y"] = layer(*inputs)
    save("layers", arrays)


def make_personmae(generator):
    """The whole network: encoder, both predictors, both losses and all gradients."""
    student, teacher = PersonMAE(), Encoder()
    set_random(student, generator)
    set_random(teacher, generator)
    height, width = GRID[0] * PATCH, GRID[1] * PATCH
    size = (3, height, width, 3)
    region_a, region_b = (
        torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        for _ in range(2)
    )
    visible = torch.tensor([[0, 3, 5, 6], [1, 2, 4, 7], [0, 1, 2, 3]])
    boxes_a = torch.tensor([[3, 1, 80, 40], [0, 0, 64, 32], [5, 9, 70, 31]]).double()
    boxes_b = torch.tensor([[9, 2, 60, 36], [0, 0, 64, 32], [0, 0, 99, 50]]).double()

    outputs, tokens = student.encoder(normalise(region_a), visible)
    pixels = student.pixel_predictor(outputs, tokens, boxes_a, boxes_b)
    features = student.feature_predictor(outputs, tokens, boxes_a, boxes_b)
    pixel_loss = (pixels - pixel_target(normalise(region_b))).square().mean()
    with torch.no_grad():
        target = teacher(normalise(region_b))[0][-1][:, 1:]
        target = F.layer_norm(target, (WIDTH,), eps=1e-6)
    predicted = F.layer_norm(features, (WIDTH,), eps=1e-6)
    feature_loss = (predicted - target).square().mean()
    (pixel_loss + 0.7 * feature_loss).backward()
    # Plain MAE: B is A, and the loss of its pixels alone, over all patches.
    same = student.pixel_predictor(outputs, tokens, boxes_a, boxes_a)
    mae_target = pixel_target(normalise(region_a))
    full_outputs, full_tokens = student.encoder(normalise(region_a))
    save(
        "personmae",
        {
            **arrays_of(student, "student/"),
            **arrays_of(teacher, "teacher/encoder."),
            **{f"grad/{k}": p.grad.float() for k, p in student.named_parameters()},
            "region_a": region_a,
            "region_b": region_b,
            "visible": visible.int(),
            "boxes_a": boxes_a.int(),
            "boxes_b": boxes_b.int(),
            "blocks": torch.stack(outputs),
            "tokens": tokens,
            "full_blocks": torch.stack(full_outputs),
            "full_tokens": full_tokens,
            "pixels": pixels,
            "features": features,
            "feature_target": target,
            "pixel_loss": pixel_loss,
            "feature_loss": feature_loss,
            "mae_target": mae_target,
            "mae_loss": (same - mae_target).square().mean(),
        },
    )


def make_schedules():
    """MAE's learning rate, by its formula, at steps of a run of 300, 40 to warm up."""
    peak = 1.5e-4 * 4096 / 256
    rates = [
        peak * step / 40
        if step < 40
        else peak * 0.5 * (1.0 + math.cos(math.pi * (step - 40) / (300 - 40)))
        for step in range(301)
    ]
    save("schedules", {"learning_rate": np.array(rates)})


def make_adamw(generator):
    """torch.optim.AdamW over five steps; weight decay on the kernel alone."""
    start = {
        "kernel": torch.randn(4, 3, generator=generator),
        "bias": torch.randn(3, generator=generator),
        "scale": torch.randn(3, generator=generator),
        "cls_token": torch.randn(1, 1, 3, generator=generator),
        "mask_token": torch.randn(1, 1, 3, generator=generator),
    }
    arrays = {f"start/{k}": v.clone() for k, v in start.items()}
    params = {k: nn.Parameter(v.double()) for k, v in start.items()}
    groups = [
        {"params": [params["kernel"]], "weight_decay": 0.05},
        {"params": [params[k] for k in params if k != "kernel"], "weight_decay": 0.0},
    ]
    rates = [0.0, 0.1, 0.2, 0.15, 0.05]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in params.items():
            grad = torch.randn(p.shape, generator=generator) * 10.0 ** (-2 * step)
            arrays[f"grad{step}/{name}"] = grad
            p.grad = grad.double()
        optimizer.step()
        arrays |= {f"after{step}/{k}": p.detach().clone() for k, p in params.items()}
    save("adamw", arrays | {"learning_rates": np.array(rates)})


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    save("positions", {"table": table((16, 8), 32).float()})
    make_layers(generator)
    make_personmae(generator)
    make_schedules()
    make_adamw(generator)


if __name__ == "__main__":
    main()
