"""Item Q-Former: mixed fields of an item to query tokens, an item vector and reconstructed fields.

A field is one key-value token: projection of its frozen embedding, plus an embedding of the field's name, plus
one of its modality (the schema triplet h = a + t + v of UniRec, arXiv 2601.19423). Letters: B items, Q query
tokens, D width, W a field's own width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from nqf.config import QFormerConfig
from nqf.models.qformer import QFormer


class ItemOutput(struct.PyTreeNode):
    """Output of the Item Q-Former.

    Attributes:
      tokens: Query tokens, float [B, Q, D].
      vector: Item vector, float [B, D].
      reconstructions: Field name to the reconstructed embedding, float [B, W], in the field's own space.
    """

    tokens: jax.Array
    vector: jax.Array
    reconstructions: dict[str, jax.Array]


class ItemQFormer(nn.Module):
    """Compresses an item's present fields to `config.queries` tokens.

    Attributes:
      fields: (name, modality, width) of every field, in the order of the cache.
      config: Size of the Q-Former.
      fusion: `add`, `concat` or `none`; how a value meets its name and modality.
      dtype: Compute dtype; parameters are float32.
    """

    fields: tuple[tuple[str, str, int], ...]
    config: QFormerConfig
    fusion: str = "add"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, values: dict[str, jax.Array], present: dict[str, jax.Array], *, deterministic: bool = True
    ) -> ItemOutput:
        """Encodes a batch of items.

        Args:
          values: Field name to its frozen embeddings, float [B, W]. Rows of missing values are ignored.
          present: Field name to bool [B]; False where the value is missing or hidden.
          deterministic: Whether dropout is off.

        Returns:
          Tokens, vectors and reconstructions.
        """
        width = self.config.width
        modalities = sorted({modality for _, modality, _ in self.fields})
        names = self.param("field_names", nn.initializers.normal(0.02), (len(self.fields), width))
        kinds = self.param("modalities", nn.initializers.normal(0.02), (len(modalities), width))
        tokens = []
        for index, (name, modality, _) in enumerate(self.fields):
            value_BxD = nn.Dense(width, name=f"project_{name}", dtype=self.dtype)(values[name].astype(self.dtype))
            if self.fusion == "add":
                value_BxD = value_BxD + (names[index] + kinds[modalities.index(modality)]).astype(self.dtype)
            elif self.fusion == "concat":
                schema = jnp.concatenate([names[index], kinds[modalities.index(modality)]]).astype(self.dtype)
                schema_BxE = jnp.broadcast_to(schema, (value_BxD.shape[0], schema.shape[0]))
                value_BxD = nn.Dense(width, name=f"fuse_{name}", dtype=self.dtype)(
                    jnp.concatenate([value_BxD, schema_BxE], axis=-1)
                )
            tokens.append(value_BxD)
        fields_BxFxD = nn.LayerNorm(name="field_norm", dtype=self.dtype)(jnp.stack(tokens, axis=1))
        mask_BxF = jnp.stack([present[name] for name, _, _ in self.fields], axis=1)

        # BLIP-2 draws its queries with standard deviation 0.02; zeros would make all of them the same for ever.
        queries = self.param("queries", nn.initializers.normal(0.02), (1, self.config.queries, width))
        tokens_BxQxD = QFormer(config=self.config, name="qformer", dtype=self.dtype)(
            queries.astype(self.dtype), fields_BxFxD, mask_BxF, deterministic=deterministic
        )
        flat_BxE = tokens_BxQxD.reshape(tokens_BxQxD.shape[0], -1)
        vector_BxD = nn.Dense(width, name="vector", dtype=self.dtype)(flat_BxE)
        hidden_BxE = nn.gelu(nn.Dense(2 * width, name="decoder", dtype=self.dtype)(flat_BxE))
        reconstructions = {
            name: nn.Dense(own_width, name=f"reconstruct_{name}", dtype=self.dtype)(hidden_BxE)
            for name, _, own_width in self.fields
        }
        return ItemOutput(tokens=tokens_BxQxD, vector=vector_BxD, reconstructions=reconstructions)


@functools.partial(jax.jit, static_argnums=0)
def read_fields(
    module: ItemQFormer, params: Any, values: Mapping[str, jax.Array], present: Mapping[str, jax.Array]
) -> ItemOutput:
    """The module's output without dropout, for parameters and arguments as those of its call."""
    return cast(ItemOutput, module.apply({"params": params}, values, present))
