"""SASRec: the trained baseline (Kang and McAuley 2018, arXiv 1808.09781).

Pre-norm causal blocks over left-padded histories, item vectors tied to the input. Scores are cosines over a learned
temperature: they learn about twice as fast as plain inner products. It is called as `RankModel` is, so that trainer,
validation and ranking are the same. Letters: B sequences, N slots, P positions, D width, R items.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import SASRecConfig
from nqf.models.rank_model import PromptIds
from nqf.ops.losses import unit
from nqf.pipelines.batches import Array, History, ItemTables


class SASRec(nn.Module):
    """The network.

    Attributes:
      config: Sizes.
      items: Size of the catalogue.
    """

    config: SASRecConfig
    items: int

    def setup(self) -> None:
        width = self.config.width
        self.item_embedding = self.param("item_embedding", nn.initializers.normal(width**-0.5), (self.items, width))
        self.log_scale = self.param("log_scale", nn.initializers.constant(-np.log(self.config.temperature)), ())
        self.position_embedding = self.param(
            "position_embedding", nn.initializers.normal(0.02), (self.config.max_history, width)
        )
        self.dropout = nn.Dropout(self.config.dropout)
        self.blocks = [_Block(self.config) for _ in range(self.config.layers)]
        self.norm = nn.LayerNorm()

    def __call__(
        self,
        tables: ItemTables,
        rows: Array,
        history: History,
        prompt: PromptIds | None = None,
        *,
        positions: int,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array, None]:
        """Encodes histories and items; only the items' rows count, nothing else of them is read.

        Args:
          tables: Not read.
          rows: int32 [R], the items' rows in the catalogue.
          history: Slots, oldest first; `history.items` index `rows`.
          prompt: Not read.
          positions: P, newest slots to return.
          deterministic: Whether dropout is off.

        Returns:
          User vectors, unit rows times the scale, float32 [B, P, D], unit item vectors float32 [R, D], and None.
        """
        items_BxN = jnp.asarray(history.items)
        slots, present_BxN = items_BxN.shape[1], items_BxN >= 0
        table_RxD = self.item_embedding[jnp.maximum(rows, 0)]
        # Places are counted from the newest slot, so that the padding of a batch does not move them.
        x_BxNxD = table_RxD[items_BxN] * self.config.width**0.5 + self.position_embedding[-slots:]
        x_BxNxD = self.dropout(x_BxNxD, deterministic=deterministic)
        # A slot of padding sees itself, which keeps its softmax defined; nobody sees it.
        mask = nn.make_causal_mask(items_BxN) * (present_BxN[:, None, None, :] | jnp.eye(slots, dtype=bool)[None, None])
        for block in self.blocks:
            x_BxNxD = block(x_BxNxD, mask, deterministic)
        users = unit(self.norm(x_BxNxD[:, -positions:])) * jnp.exp(self.log_scale)
        return users, unit(table_RxD), None

    def item_vectors(self, tables: ItemTables, rows: Array, prompt: PromptIds | None = None) -> jax.Array:
        """Unit item vectors, float32 [R, D]."""
        return unit(self.item_embedding[jnp.maximum(rows, 0)])


class _Block(nn.Module):
    config: SASRecConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.heads, dropout_rate=config.dropout, broadcast_dropout=False
        )
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        x_BxLxD += dropout(attention(nn.LayerNorm()(x_BxLxD), mask=mask, deterministic=deterministic))
        hidden = nn.gelu(nn.Dense(4 * config.width)(nn.LayerNorm()(x_BxLxD)))
        return x_BxLxD + dropout(nn.Dense(config.width)(hidden))
