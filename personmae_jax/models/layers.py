"""Transformer layers that encoder and predictors share.

Every layer computes matrix products in `dtype` and keeps float32 parameters. Flax
computes the statistics of a norm in float32 whatever its `dtype` is, and
`attention.py` its softmax.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from personmae_jax import sharding
from personmae_jax.models import attention


def _matmul(x: Float[Array, "*lead d"], kernel: Float[Array, "d f"]):
    """Multiplies tokens and a matrix.

    In float32, which is what CPUs compute in, all tokens form one matrix: XLA's CPU
    backend multiplies that faster than a batch of matrices. On TPU, which computes in
    bfloat16, the reshape would cost more than it gives (docs/performance.md).
    """
    if x.dtype != jnp.float32:
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def _add_bias(x: Float[Array, "*lead f"], bias: Float[Array, " f"]):
    return x + jnp.expand_dims(bias, range(x.ndim - 1)).astype(x.dtype)


@jax.custom_vjp
def _add_bias_fast(x: Float[Array, "*lead f"], bias: Float[Array, " f"]):
    """Adds a bias whose gradient is a matrix product, summed in float32.

    A TPU's matrix unit sums rows faster than its vector unit (docs/performance.md).
    """
    return _add_bias(x, bias)


def _bias_gradient(_, gradient: Float[Array, "*lead f"]):
    axes = tuple(range(gradient.ndim - 1))
    # Eight equal rows, a tile: XLA turns one row's product back into a sum.
    ones = jnp.ones((*gradient.shape[:-1], 8), gradient.dtype)
    totals = jax.lax.dot_general(
        ones, gradient, ((axes, axes), ((), ())), preferred_element_type=jnp.float32
    )
    return gradient, totals[0]


_add_bias_fast.defvjp(lambda x, bias: (_add_bias(x, bias), None), _bias_gradient)


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis, in `dtype`; parameters in float32."""

    features: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    # MAE, initialize_weights: Xavier uniform on matrices (qkv as one), zero biases.
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x = _matmul(x.astype(self.dtype), jnp.asarray(kernel, self.dtype))
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, shape[1:])
        add = _add_bias_fast if x.dtype == jnp.bfloat16 else _add_bias
        return add(x, jnp.asarray(bias))


LayerNorm = partial(nn.LayerNorm, epsilon=1e-6)  # timm's ViT
token_init = nn.initializers.normal(0.02)  # cls and mask tokens; MAE


class SelfAttention(nn.Module):
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        qkv = Dense(3 * d, dtype=self.dtype, name="qkv")(x)
        x = attention.self_attention(qkv, self.num_heads)
        return Dense(d, dtype=self.dtype, name="proj")(x)


class CrossAttention(nn.Module):
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], memory: Float[Array, "b m d"]
    ) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        q = Dense(d, dtype=self.dtype, name="q")(x)
        kv = Dense(2 * d, dtype=self.dtype, name="kv")(memory)
        x = attention.cross_attention(q, kv, self.num_heads)
        return Dense(d, dtype=self.dtype, name="proj")(x)


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
    def __call__(
        self,
        x: Float[Array, "b n d"],
        drop_path_mask: Float[Array, "2 b"] | None = None,
    ) -> Float[Array, "b n d"]:
        def scaled(branch: Array, i: int) -> Array:
            if drop_path_mask is None:
                return branch
            return branch * drop_path_mask[i, :, None, None].astype(self.dtype)

        norm = partial(LayerNorm, dtype=self.dtype)
        attn = SelfAttention(self.num_heads, self.dtype, name="attn")
        x = x + scaled(attn(norm(name="norm1")(x)), 0)
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.dtype, name="mlp")
        return x + scaled(mlp(norm(name="norm2")(x)), 1)


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


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """Returns `block`; where `remat` is "block", one that keeps its input alone.

    Its backward pass computes the inside again. The names of parameters stay.
    """
    return nn.remat(block) if remat == "block" else block


def sample_drop_path_mask(
    key: Array, depth: int, rate: float, batch_size: int, mesh: Mesh
) -> Float[Array, "depth 2 b"] | None:
    """Draws which branches of a block an image skips: 0, or 1 / (1 - rate of block).

    The rate grows linearly from 0 in the first block to `rate` in the last; attention
    and MLP are drawn apart. None where `rate` is 0. The images are those of a batch
    that `sharding.to_devices` has laid over the mesh.

    Source: `DropPath` and its linspace in timm's vision_transformer.py.
    """
    if not rate:
        return None
    rates = rate * np.arange(depth) / max(depth - 1, 1)
    kept = (1.0 - rates.astype(np.float32)).reshape(-1, 1, 1)
    is_kept = jax.random.bernoulli(key, kept, (depth, 2, batch_size))
    return sharding.stream_to_device_order(is_kept / kept, mesh)


def gelu(x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
    """The exact GELU as PyTorch computes it, x / 2 * (1 + erf(x / sqrt(2))).

    `jax.nn.gelu(approximate=False)` goes through erfc, which is slower.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def layer_norm(x: Float[Array, "*shape"], axis: int = -1) -> Float[Array, "*shape"]:
    """Zero mean and unit variance over one axis, no parameters, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=axis, keepdims=True)
    var = jnp.var(x, axis=axis, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6)
