"""BERT (arXiv 1810.04805) as an encoder: the text encoders MiniLM, BGE and E5 are of this shape.

Its layers are the Q-Former's blocks without cross-attention. Letters: B texts, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.config import QFormerConfig
from nqf.models.qformer import LAYER_NORM_EPS, Attention, FeedForward
from nqf.ops.products import DotGeneral


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Size of a BERT.

    Attributes:
      vocab_size: Rows of the word embedding.
      max_position_embeddings: Longest text, in tokens.
      type_vocab_size: Rows of the segment embedding; single texts use the first.
      hidden_size: Width D.
      num_hidden_layers: Layers.
      num_attention_heads: Attention heads.
      intermediate_size: Width of the feed-forward layer.
    """

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """Reads the `config.json` of a Hugging Face folder.

        Raises:
          ValueError: Another model, or a BERT with parts that the MiniLM, BGE and E5 families do not have; all
            differences are named.
        """
        wanted = {
            "model_type": "bert",
            "hidden_act": "gelu",
            "layer_norm_eps": LAYER_NORM_EPS,
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        }
        # What config.json leaves out has transformers' default, which is the wanted value.
        errors = [
            f"{key} is {config.get(key)!r}, not {value!r}"
            for key, value in wanted.items()
            if config.get(key, None if key == "model_type" else value) != value
        ]
        errors += [f"{field.name} is missing" for field in dataclasses.fields(cls) if field.name not in config]
        if errors:
            raise ValueError("not a BERT that can be loaded: " + "; ".join(errors))
        return cls(**{field.name: int(config[field.name]) for field in dataclasses.fields(cls)})


class Bert(nn.Module):
    """BERT without pooler and heads.

    Attributes:
      config: Size.
      dtype: Compute dtype; normalization and softmax are float32 inside, parameters keep their own type.
      dot_general: The projections' product, for those that are not `jax.lax.dot_general`.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    dot_general: DotGeneral = None

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Encodes texts.

        Args:
          input_ids: int32 [B, T], padded on the right.
          attention_mask: bool or 0/1 [B, T]; 0 at padding.

        Returns:
          float [B, T, D], the last layer's hidden states.
        """
        config = self.config
        width = config.hidden_size

        def embedding(name: str, rows: int) -> nn.Embed:
            # 0.02 is BERT's `initializer_range`.
            initializer = nn.initializers.normal(0.02)
            return nn.Embed(rows, width, name=name, dtype=self.dtype, embedding_init=initializer)

        positions = jnp.arange(input_ids.shape[1])[None]
        x_BxTxD = (
            embedding("word_embeddings", config.vocab_size)(input_ids)
            + embedding("position_embeddings", config.max_position_embeddings)(positions)
            + embedding("token_type_embeddings", config.type_vocab_size)(jnp.zeros_like(positions))
        )
        x_BxTxD = nn.LayerNorm(epsilon=LAYER_NORM_EPS, name="embedding_norm", dtype=self.dtype)(x_BxTxD)
        block = QFormerConfig(
            width=width, heads=config.num_attention_heads, mlp_width=config.intermediate_size, dropout=0.0
        )
        mask = attention_mask.astype(bool)[:, None, None, :]
        options = {"config": block, "dtype": self.dtype, "dot_general": self.dot_general}
        for layer in range(config.num_hidden_layers):
            attention = Attention(name=f"layer_{layer}_attention", **options)
            x_BxTxD = attention(x_BxTxD, x_BxTxD, mask, None, None, 0)
            x_BxTxD = FeedForward(name=f"layer_{layer}_output", **options)(x_BxTxD, None, 0)
        return x_BxTxD
