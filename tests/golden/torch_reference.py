"""Our layers, network and pixel target once more in PyTorch, to check against.

Written from the published descriptions: the ViT and MAE papers for blocks, positions
and pixel target, the project's method for what no paper has. Names are timm's.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, GRID = 8, 2, 2, 2, (4, 2)
MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, memory):
        (b, n, d), m, head = x.shape, memory.shape[1], x.shape[2] // self.heads
        q = self.q(x).reshape(b, n, self.heads, head).transpose(1, 2)
        kv = self.kv(memory).reshape(b, m, 2, self.heads, head)
        k, v = kv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / math.sqrt(head)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DecoderBlock(EncoderBlock):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads)

    def forward(self, x, memory):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), memory)
        return x + self.mlp(self.norm2(x))


def codes(positions, width):
    """One-dimensional codes: sines, then cosines, of position / 10000^(2i/width)."""
    omega = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angles = positions[..., None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def codes_2d(y, x, width):
    """MAE's codes: the first half of the width for x, the second for y."""
    return torch.cat([codes(x, width // 2), codes(y, width // 2)], dim=-1)


def table(grid, width):
    """MAE's table for a grid in raster order, after a row of zeros for cls."""
    y, x = np.indices(grid).reshape(2, -1).astype(np.float64)
    patches = codes_2d(torch.from_numpy(y), torch.from_numpy(x), width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(EncoderBlock(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images, visible=None):
        """NCHW images -> (output of every block, normed tokens)."""
        positions = table(GRID, WIDTH)
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + positions[1:]
        if visible is not None:
            x = torch.stack([row[keep] for row, keep in zip(x, visible, strict=True)])
        cls = (self.cls_token + positions[0]).expand(len(x), -1, -1)
        x, outputs = torch.cat([cls, x], dim=1), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs, self.norm(x)


class Predictor(nn.Module):
    def __init__(self, outputs, memory_blocks):
        super().__init__()
        self.memory_blocks = memory_blocks
        for i in memory_blocks:
            if i != DEPTH - 1:
                setattr(self, f"memory_norm_{i}", nn.LayerNorm(WIDTH, eps=1e-6))
            setattr(self, f"memory_proj_{i}", nn.Linear(WIDTH, WIDTH))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.size_embed = nn.Linear(2, WIDTH, bias=False)
        self.blocks = nn.ModuleList([DecoderBlock(WIDTH, HEADS)])
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, outputs, tokens, boxes_a, boxes_b):
        """Boxes are (y, x, height, width) in pixels of the image."""
        memory = []
        for i in self.memory_blocks:
            part = tokens
            if i != DEPTH - 1:
                part = getattr(self, f"memory_norm_{i}")(outputs[i])
            memory.append(getattr(self, f"memory_proj_{i}")(part))
        memory = torch.cat(memory, dim=1)
        queries = [
            query_codes(a, b) + self.size_embed((b[2:] / a[2:]).log())
            for a, b in zip(boxes_a, boxes_b, strict=True)
        ]
        x = torch.stack(queries) + self.mask_token
        for block in self.blocks:
            x = block(x, memory)
        return self.head(self.norm(x))


def query_codes(box_a, box_b):
    """Codes of B's patch centres: to pixels of the image, then to A's patch grid."""
    y, x = np.indices(GRID).reshape(2, -1)
    places = []
    for axis, index in enumerate((y, x)):
        index = torch.from_numpy(index).double()
        pixels = box_b[axis] + (index + 0.5) * box_b[2 + axis] / GRID[axis]
        places.append((pixels - box_a[axis]) / (box_a[2 + axis] / GRID[axis]) - 0.5)
    return codes_2d(*places, WIDTH)


class PersonMAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.pixel_predictor = Predictor(3 * PATCH**2, (0, 1))
        self.feature_predictor = Predictor(WIDTH, (1,))


def patchify(images):
    """MAE's order: NCHW -> (b, n, row * column * channel)."""
    b, (rows, columns) = len(images), GRID
    x = images.reshape(b, 3, rows, PATCH, columns, PATCH)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(b, rows * columns, -1)


def pixel_target(images):
    """MAE's norm_pix_loss target."""
    patches = patchify(images)
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1.0e-6) ** 0.5


def normalise(images):
    """uint8 NHWC -> NCHW, ImageNet statistics."""
    return ((images.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
