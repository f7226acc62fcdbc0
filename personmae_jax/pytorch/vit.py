"""The ViT that PyTorch ReID code builds, in plain PyTorch: the exports' examiner.

Written from the description of such files (pre-norm, qkv as one matrix in the order
q, k, v and head-major inside each, erf GELU, LayerNorm eps 1e-6, cls first, no
LayerScale), not from our JAX code, so that the two can contradict each other. This
is the only file that imports torch as it loads; others import it where they need it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import nn
from torch.nn import functional

from personmae_jax.config import EncoderConfig


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[torch.Tensor, "b t d"]) -> Float[torch.Tensor, "b t d"]:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[torch.Tensor, "b t d"]) -> Float[torch.Tensor, "b t d"]:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x: Float[torch.Tensor, "b t d"]) -> Float[torch.Tensor, "b t d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, images: Float[torch.Tensor, "b 3 height width"]
    ) -> Float[torch.Tensor, "b n d"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """From normalised images to all tokens after the final norm, cls first."""

    def __init__(self, encoder: EncoderConfig, num_patches: int):
        super().__init__()
        width = encoder.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.patch_embed = PatchEmbed(width, encoder.patch_size)
        self.blocks = nn.Sequential(
            *[
                Block(width, encoder.num_heads, encoder.mlp_ratio)
                for _ in range(encoder.depth)
            ]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, images: Float[torch.Tensor, "b 3 height width"]
    ) -> Float[torch.Tensor, "b t d"]:
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def encode(
    encoder: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    images: Float32[np.ndarray, "b height width 3"],
) -> Float32[np.ndarray, "b t d"]:
    """Returns what PyTorch makes of normalised images with the tensors of a file.

    Raises:
      RuntimeError: Of `load_state_dict`: a tensor is missing, too many or misshapen.
    """
    with torch.device("meta"):  # parameters come from the file alone
        model = VisionTransformer(encoder, tensors["pos_embed"].shape[1] - 1)
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def batch_norm(
    tensors: Mapping[str, np.ndarray], features: Float32[np.ndarray, "b d"]
) -> Float32[np.ndarray, "b d"]:
    """Returns features after a file's batch norm, of unit length; names of BatchNorm1d.

    Raises as `encode`.
    """
    neck = nn.BatchNorm1d(features.shape[1])
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    neck.load_state_dict(state, strict=True)
    with torch.inference_mode():
        return functional.normalize(neck.eval()(torch.from_numpy(features))).numpy()
