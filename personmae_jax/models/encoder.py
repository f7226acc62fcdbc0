"""The ViT that is trained, exported and fine-tuned."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from personmae_jax.models import layers, posembed


class Encoded(NamedTuple):
    """Tokens, cls first, before and after the final norm.

    Attributes:
      blocks: Output of every block, each `b 1+v d`.
      tokens: The last one after the encoder's final norm: what users get.
    """

    blocks: tuple[Float[Array, "b t d"], ...]
    tokens: Float[Array, "b t d"]


class Encoder(nn.Module):
    """Plain pre-norm ViT with sine-cosine positions on the visible patches.

    They are fixed, or with `learned_positions` the start of a parameter `pos_embed`
    (1, 1 + n, width) whose first row is that of cls. With `pos_embed_grid` the fixed
    ones are taken in the coordinates of that grid, over the same image.
    """

    width: int
    depth: int
    num_heads: int
    mlp_ratio: int
    grid: tuple[int, int]
    learned_positions: bool = False
    pos_embed_grid: tuple[int, int] | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b v p"],
        visible: Int[Array, "b v"] | None = None,
        side_info: Float[Array, "b d"] | None = None,
        drop_path_mask: Float[Array, "depth 2 b"] | None = None,
    ) -> Encoded:
        """Encodes patches of normalised pixels.

        Args:
          patches: Only those that may be seen; the others never enter.
          visible: Raster index of each; None where all patches are given in order.
          side_info: To all tokens of an image before the first block.
          drop_path_mask: Factors of each block's attention and MLP, for every image;
            see `layers.sample_drop_path_mask`.
        """
        x = layers.Dense(self.width, dtype=self.dtype, name="patch_embed")(patches)
        coded = self.pos_embed_grid or self.grid
        table = posembed.position_table(coded, self.width, at=self.grid)
        cls = self.param("cls_token", layers.token_init, (1, 1, self.width))
        if self.learned_positions:
            # The code of cls is zeros.
            codes = jnp.pad(table, ((1, 0), (0, 0)))[None]
            positions = self.param("pos_embed", lambda _: codes)
            cls, table = cls + positions[:, :1], positions[0, 1:]
        table = jnp.asarray(table, self.dtype)
        x = x + (table[None] if visible is None else table[visible])
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
        if side_info is not None:
            x = x + side_info.astype(self.dtype)[:, None]
        blocks = []
        make_block = layers.rematerialised(layers.EncoderBlock, self.remat)
        for i in range(self.depth):
            block = make_block(
                self.num_heads, self.mlp_ratio, self.dtype, name=f"blocks_{i}"
            )
            x = block(x, None if drop_path_mask is None else drop_path_mask[i])
            blocks.append(x)
        return Encoded(
            tuple(blocks), layers.LayerNorm(dtype=self.dtype, name="norm")(x)
        )
