"""The train step of PersonMAE in plain PyTorch, for `train_step.py` to race against.

The same network, losses, optimizer and batch, as a PyTorch user would write them for
speed: fused attention, gathered patches, `torch.no_grad` for the teacher, fused AdamW.
Only what `configs/` use is here: normalised pixels, mean squared feature loss.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from personmae_jax.config import Config, PredictorConfig, predictor_size
from personmae_jax.models import personmae


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, is_cross: bool):
        super().__init__()
        self.heads, self.is_cross = heads, is_cross
        self.q = nn.Linear(width, width) if is_cross else None
        self.kv = nn.Linear(width, (2 if is_cross else 3) * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, memory=None):
        if self.is_cross:
            parts = (self.q(x), *self.kv(memory).chunk(2, -1))
        else:
            parts = self.kv(x).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """An encoder's block, or with `is_cross` a decoder's."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, is_cross: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, False)
        if is_cross:
            self.norm_cross = nn.LayerNorm(width, eps=1e-6)
            self.cross_attn = Attention(width, heads, True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(),
            nn.Linear(mlp_ratio * width, width),
        )

    def forward(self, x, memory=None):
        x = x + self.attn(self.norm1(x))
        if memory is not None:
            x = x + self.cross_attn(self.norm_cross(x), memory)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.encoder.width
        self.patch_embed = nn.Linear(3 * cfg.encoder.patch_size**2, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        table = personmae.position_table(cfg.grid, width)
        self.register_buffer("table", torch.from_numpy(np.array(table)))
        self.blocks = nn.ModuleList(
            Block(width, cfg.encoder.num_heads, cfg.encoder.mlp_ratio)
            for _ in range(cfg.encoder.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, patches, visible=None):
        x = self.patch_embed(patches)
        x = x + (self.table if visible is None else self.table[visible])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs, self.norm(x)


class Predictor(nn.Module):
    def __init__(self, cfg: Config, settings: PredictorConfig, outputs: int):
        super().__init__()
        width, heads = predictor_size(cfg.encoder, settings)
        encoder, self.grid = cfg.encoder.width, cfg.grid
        self.memory_blocks = [i % cfg.encoder.depth for i in settings.memory_blocks]
        self.memory = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(encoder, eps=1e-6), nn.Linear(encoder, width))
            if i < cfg.encoder.depth - 1
            else nn.Linear(encoder, width)
            for i in self.memory_blocks
        )
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.size_embed = nn.Linear(2, width, bias=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4, is_cross=True) for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def forward(self, blocks, tokens, geometry):
        last = len(blocks) - 1
        memory = torch.cat(
            [
                project(tokens if i == last else blocks[i])
                for i, project in zip(self.memory_blocks, self.memory, strict=True)
            ],
            dim=1,
        )
        size = self.size_embed(geometry[:, 2:].log())
        x = self._codes(geometry) + self.mask_token + size[:, None]
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))

    def _codes(self, geometry):
        """Sine-cosine codes of RegionB's patch centres in RegionA's coordinates."""
        rows, columns = self.grid
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack([y, x], dim=-1).flatten(0, 1) + 0.5
        places = places * geometry[:, None, 2:] + geometry[:, None, :2] - 0.5
        quarter = self.mask_token.shape[-1] // 4
        omega = 1e4 ** (-torch.arange(quarter) / quarter)
        angles = places.flip(-1)[..., None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)


def make_step(cfg: Config) -> Callable[[dict[str, np.ndarray]], float]:
    """Returns a function that makes one step on a numpy batch and gives the loss."""
    torch.manual_seed(0)
    patch, width = cfg.encoder.patch_size, cfg.encoder.width
    encoder = Encoder(cfg)
    pixel_predictor = Predictor(cfg, cfg.pixel_predictor, 3 * patch**2)
    feature_predictor = Predictor(cfg, cfg.feature_predictor, width)
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    parameters = [
        p
        for module in (encoder, pixel_predictor, feature_predictor)
        for p in module.parameters()
    ]
    optim = cfg.optim
    optimizer = torch.optim.AdamW(
        parameters,
        lr=optim.base_lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    mean, std = torch.tensor(cfg.data.mean), torch.tensor(cfg.data.std)

    def patchify(images):
        rows, columns = cfg.grid
        x = images.view(-1, rows, patch, columns, patch, 3).transpose(2, 3)
        return x.reshape(len(images), rows * columns, patch, patch, 3)

    def normalise(patches):
        return ((patches / 255 - mean) / std).flatten(2)

    def step(batch: dict[str, np.ndarray]) -> float:
        region_a, region_b, visible, geometry = (
            torch.from_numpy(batch[name])
            for name in ("region_a", "region_b", "visible", "geometry")
        )
        rows = torch.arange(len(region_a))[:, None]
        patches_b = normalise(patchify(region_b))
        blocks, tokens = encoder(
            normalise(patchify(region_a)[rows, visible.long()]), visible.long()
        )
        pixels = pixel_predictor(blocks, tokens, geometry)
        features = feature_predictor(blocks, tokens, geometry)
        with torch.no_grad():
            seen = teacher(patches_b)[0][-1][:, 1:]
            feature_target = functional.layer_norm(seen, (width,), eps=1e-6)
            centred = patches_b - patches_b.mean(-1, keepdim=True)
            variance = patches_b.var(-1, keepdim=True)
            pixel_target = centred / (variance + 1e-6).sqrt()
        predicted = functional.layer_norm(features, (width,), eps=1e-6)
        loss = functional.mse_loss(pixels, pixel_target)
        loss = loss + functional.mse_loss(predicted, feature_target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(
            [*teacher.parameters()], [p.detach() for p in encoder.parameters()], 0.01
        )
        return loss.item()

    return step
