"""Multi-head attention: XLA's, or on TPU one fused kernel that keeps scores on chip.

XLA writes the scores of every head to memory and reads them back, and moves q, k and
v into layouts of its own; for 65 tokens that costs more than all matrix products of a
block (docs/performance.md). The kernel reads what the projections have written,
`(b, t, columns)`, where it lies. A TPU multiplies 128 columns at a time, and a head
has 64: so it takes two heads at once and sets the other head's columns to zero.
The backward pass computes the scores again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from personmae_jax import sharding

_HEAD = 64  # columns of a head that the kernel is written for; timm's ViTs
_PAIR = 2 * _HEAD
_SCALE = _HEAD**-0.5  # of scores; a power of two, so exact in bfloat16
_MEMORY = 4 * 2**20  # bytes of a block of images; a quarter of the chip's default limit

# Where q, k and v begin: (which array, first column over the width).
_SELF = ((0, 0), (0, 1), (0, 2))  # in qkv
_CROSS = ((0, 0), (1, 0), (1, 1))  # in q and kv


def self_attention(
    qkv: Float[Array, "b t qkv"], num_heads: int
) -> Float[Array, "b t d"]:
    """Attends among tokens; the columns of `qkv` are q, k, v, head-major in each."""
    b, t, columns = qkv.shape
    d = columns // 3
    if _is_fused(qkv, d, num_heads):
        return sharding.on_own_rows(partial(_fused, _SELF))(qkv)
    q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, num_heads, d // num_heads), 2, 0)
    return jax.nn.dot_product_attention(q, k, v).reshape(b, t, d)


def cross_attention(
    q: Float[Array, "b n d"], kv: Float[Array, "b m 2*d"], num_heads: int
) -> Float[Array, "b n d"]:
    """Attends from queries to a memory; the columns of `kv` are k, v."""
    (b, n, d), m = q.shape, kv.shape[1]
    if _is_fused(q, d, num_heads):
        return sharding.on_own_rows(partial(_fused, _CROSS))(q, kv)
    heads = (num_heads, d // num_heads)
    k, v = jnp.moveaxis(kv.reshape(b, m, 2, *heads), 2, 0)
    x = jax.nn.dot_product_attention(q.reshape(b, n, *heads), k, v)
    return x.reshape(b, n, d)


def _is_fused(x: Array, d: int, num_heads: int) -> bool:
    fits = d == _HEAD * num_heads and num_heads % 2 == 0
    return fits and x.dtype == jnp.bfloat16 and sharding.is_on_tpu()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(places: tuple[tuple[int, int], ...], *arrays: Array) -> Array:
    """Attention over arrays that hold q, k and v at `places`; (b, n, d)."""
    like = arrays[0]
    width = like.shape[-1] // sum(array == 0 for array, _ in places)
    out = jax.ShapeDtypeStruct((*like.shape[:2], width), like.dtype)
    return _call(_forward, places, arrays, [out])[0]


def _fused_forward(places, *arrays):
    return _fused(places, *arrays), arrays


def _fused_backward(places, arrays, gradient):
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return tuple(_call(_backward, places, (*arrays, gradient), outs))


_fused.defvjp(_fused_forward, _fused_backward)


def _call(
    kernel, places, arrays: Sequence[Array], outs: Sequence[jax.ShapeDtypeStruct]
) -> Sequence[Array]:
    """Runs a kernel over blocks of images, each with all its tokens and columns."""
    shapes = [x.shape[1:] for x in (*arrays, *outs)]
    image = sum(math.prod(shape) for shape in shapes) * arrays[0].dtype.itemsize
    b = arrays[0].shape[0]
    count = math.gcd(b, 8)
    while count > 1 and count * image > _MEMORY:
        count //= 2

    def spec(x) -> pl.BlockSpec:
        return pl.BlockSpec((count, *x.shape[1:]), lambda i: (i, 0, 0))

    # Products of queries, keys and 128 columns, zeros among them, for every head.
    products = 2 if kernel is _forward else 5
    heads = arrays[0].shape[-1] // sum(array == 0 for array, _ in places) // _HEAD
    scores = b * heads * arrays[0].shape[1] * arrays[places[1][0]].shape[1]

    return pl.pallas_call(
        partial(kernel, places, len(arrays)),
        grid=(b // count,),
        in_specs=[spec(x) for x in arrays],
        out_specs=[spec(x) for x in outs],
        out_shape=outs,
        interpret=not sharding.is_on_tpu(),
        name=f"attention{kernel.__name__}",
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * _PAIR,
            transcendentals=scores,
            bytes_accessed=b * image,
        ),
    )(*arrays)


def _forward(places, num_inputs: int, *refs) -> None:
    inputs, (out,) = refs[:num_inputs], refs[num_inputs:]

    def attend(i, pair: int):
        q, k, v = _load(inputs, places, i, pair, out.shape[-1])
        total = jnp.zeros(q.shape, jnp.float32)
        for own in _own_columns(q.dtype):
            weights = _softmax(_dot(q * own, k, 1, 1))
            total += _dot(weights.astype(v.dtype), v * own, 1, 0)
        out[i, :, _columns(pair)] = total.astype(out.dtype)

    _for_each_pair(attend, out)


def _backward(places, num_inputs: int, *refs) -> None:
    (*inputs, gradient), outs = refs[:num_inputs], refs[num_inputs:]
    width = gradient.shape[-1]

    def attend(i, pair: int):
        q, k, v = _load(inputs, places, i, pair, width)
        dy = gradient[i, :, _columns(pair)]
        dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
        for own in _own_columns(q.dtype):
            weights = _softmax(_dot(q * own, k, 1, 1))
            dweights = _dot(dy * own, v, 1, 1)
            mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
            dscores = (weights * (dweights - mean)).astype(q.dtype)
            dq += _dot(dscores, k * own, 1, 0) * _SCALE
            dk += _dot(dscores, q * own, 0, 0)
            dv += _dot(weights.astype(q.dtype), dy * own, 0, 0)
        for (array, part), x in zip(places, (dq, dk, dv), strict=True):
            columns = _columns(pair, part * width)
            outs[array][i, :, columns] = x.astype(outs[array].dtype)

    _for_each_pair(attend, gradient)


def _for_each_pair(attend: Callable[[Array, int], None], block) -> None:
    """Calls attend(image, pair of heads) for all that a block holds."""

    def image(i, _):
        for pair in range(block.shape[-1] // _PAIR):
            attend(i, pair)

    jax.lax.fori_loop(0, block.shape[0], image, None)


def _load(inputs, places, i, pair: int, width: int) -> list[Array]:
    """A pair's q, scaled, k and v of one image, each (tokens, 128)."""
    q, k, v = (
        inputs[array][i, :, _columns(pair, part * width)] for array, part in places
    )
    return [q * _SCALE, k, v]


def _columns(pair: int, start: int = 0):
    return pl.ds(start + pair * _PAIR, _PAIR)


def _own_columns(dtype) -> list[Array]:
    """For both heads of a pair ones in its columns, zeros in the other's."""
    column = jax.lax.broadcasted_iota(jnp.int32, (1, _PAIR), 1)
    return [(column < _HEAD).astype(dtype), (column >= _HEAD).astype(dtype)]


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Products of bfloat16, summed in float32 over one axis of each."""
    return jax.lax.dot_general(
        *(a, b, (((a_axis,), (b_axis,)), ((), ()))),
        precision=jax.lax.Precision.DEFAULT,  # Mosaic takes that of `mesh_context` ill
        preferred_element_type=jnp.float32,
    )


def _softmax(scores: Array) -> Array:
    scores = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return scores / jnp.sum(scores, axis=-1, keepdims=True)
