"""Transformer layers that encoder and predictors share.

Every layer computes matrix products in `dtype` and keeps float32 parameters. Flax
computes the statistics of a norm in float32 whatever its `dtype` is, and
`jax.nn.dot_product_attention` its softmax.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _dot_general(x: Array, kernel: Array, dimension_numbers, **options) -> Array:
    """What nn.Dense asks for: the last axis of `x` against the first of `kernel`.

    In float32, which is what CPUs compute in, all tokens form one matrix: XLA's CPU
    backend multiplies that faster than a batch of matrices. On TPU, which computes in
    bfloat16, the reshape would cost more than it gives (docs/performance.md).
    """
    if x.dtype != jnp.float32:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


Dense = partial(
    nn.Dense,
    # MAE, initialize_weights: Xavier uniform on matrices (qkv as one), zero biases.
    kernel_init=nn.initializers.xavier_uniform(),
    dot_general=_dot_general,
)
LayerNorm = partial(nn.LayerNorm, epsilon=1e-6)  # timm's ViT
token_init = nn.initializers.normal(0.02)  # cls and mask tokens; MAE


class SelfAttention(nn.Module):
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        qkv = Dense(3 * d, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads)
        x = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return Dense(d, dtype=self.dtype, name="proj")(x.reshape(b, n, d))


class CrossAttention(nn.Module):
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m d"]
    ) -> Float[Array, "b n d"]:
        (b, n, d), m = x.shape, memory.shape[1]
        head = d // self.num_heads
        q = Dense(d, dtype=self.dtype, name="q")(x)
        kv = Dense(2 * d, dtype=self.dtype, name="kv")(memory)
        kv = kv.reshape(b, m, 2, self.num_heads, head)
        x = jax.nn.dot_product_attention(
            q.reshape(b, n, self.num_heads, head), kv[:, :, 0], kv[:, :, 1]
        )
        return Dense(d, dtype=self.dtype, name="proj")(x.reshape(b, n, d))


class Mlp(nn.Module):
    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        x = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        x = gelu(x)
        return Dense(width, dtype=self.dtype, name="fc2")(x)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP; names as in timm's ViT."""

    num_heads: int
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        norm = partial(LayerNorm, dtype=self.dtype)
        x = x + SelfAttention(self.num_heads, self.dtype, name="attn")(
            norm(name="norm1")(x)
        )
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        return x + mlp(norm(name="norm2")(x))


class DecoderBlock(nn.Module):
    """Pre-norm self-attention among queries, cross-attention to the memory, MLP."""

    num_heads: int
    use_self_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m d"]
    ) -> Float[Array, "b n d"]:
        norm = partial(LayerNorm, dtype=self.dtype)
        if self.use_self_attention:
            attn = SelfAttention(self.num_heads, self.dtype, name="attn")
            x = x + attn(norm(name="norm1")(x))
        cross = CrossAttention(self.num_heads, self.dtype, name="cross_attn")
        x = x + cross(norm(name="norm_cross")(x), memory)
        mlp = Mlp(4 * x.shape[-1], self.dtype, name="mlp")  # ratio 4: MAE's decoder
        return x + mlp(norm(name="norm2")(x))


def gelu(x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """The exact GELU as PyTorch computes it, x / 2 * (1 + erf(x / sqrt(2))).

    `jax.nn.gelu(approximate=False)` goes through erfc, which is slower.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def layer_norm(x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """Zero mean and unit variance over the last axis, no parameters, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6)
