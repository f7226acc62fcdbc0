"""Predicts the whole of RegionB from RegionA's visible tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from personmae_jax.models import layers, posembed
from personmae_jax.models.encoder import Encoded


class Predictor(nn.Module):
    """A Transformer decoder whose queries are RegionB's patches, and only these.

    Every query is the mask token plus the sine-cosine code of its patch centre in
    RegionA's coordinates plus a linear map of the log size ratio (no bias: where
    RegionB is RegionA the code is MAE's table and nothing else). So a prediction
    knows RegionA's visible patches and where RegionB lies, never its pixels.

    Sources: decoder and memory BootMAE; relative positions SiameseIM.

    Attributes:
      outputs: Values predicted for a patch.
      memory_blocks: Encoder blocks that form the memory, each in 0 .. depth - 1.
    """

    width: int
    depth: int
    num_heads: int
    memory_blocks: tuple[int, ...]
    use_self_attention: bool
    outputs: int
    grid: tuple[int, int]
    head_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, encoded: Encoded, geometry: Float[Array, "b 4"]
    ) -> Float[Array, "b n o"]:
        """Returns float32 predictions for all patches of RegionB in raster order."""
        memory = self._memory(encoded)
        coordinates = posembed.region_b_coordinates(geometry, self.grid)
        mask_token = self.param("mask_token", layers.token_init, (1, 1, self.width))
        size = layers.Dense(self.width, use_bias=False, name="size_embed")(
            jnp.log(geometry[:, 2:])
        )
        x = posembed.sine_cosine(coordinates, self.width) + mask_token + size[:, None]
        x = x.astype(self.dtype)
        make_block = layers.rematerialised(layers.DecoderBlock, self.remat)
        for i in range(self.depth):
            block = make_block(
                self.num_heads, self.use_self_attention, self.dtype, name=f"blocks_{i}"
            )
            x = block(x, memory)
        x = layers.LayerNorm(dtype=self.dtype, name="norm")(x)
        head = layers.Dense(
            self.outputs, dtype=self.dtype, kernel_init=self.head_init, name="head"
        )
        return head(x).astype(jnp.float32)

    def _memory(self, encoded: Encoded) -> Float[Array, "b m d"]:
        """All tokens of the chosen blocks, normalised, projected, laid end to end."""
        parts, last = [], len(encoded.blocks) - 1
        for i in self.memory_blocks:
            if i == last:  # trains the norm that every user of the encoder applies
                tokens = encoded.tokens
            else:
                norm = layers.LayerNorm(dtype=self.dtype, name=f"memory_norm_{i}")
                tokens = norm(encoded.blocks[i])
            project = layers.Dense(
                self.width, dtype=self.dtype, name=f"memory_proj_{i}"
            )
            parts.append(project(tokens))
        return jnp.concatenate(parts, axis=1)
