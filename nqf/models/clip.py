"""CLIP's vision tower with its projection (arXiv 2103.00020): a pre-norm vision transformer.

Letters: B images, T tokens (the class token and the patches), D width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.ops.products import DotGeneral


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """Size of a CLIP vision tower.

    Attributes:
      image_size: Side of the square input, in pixels.
      patch_size: Side of a patch, in pixels.
      hidden_size: Width D.
      num_hidden_layers: Layers.
      num_attention_heads: Attention heads.
      intermediate_size: Width of the feed-forward layer.
      projection_dim: Width of an image vector.
      hidden_act: `quick_gelu` (OpenAI's models) or `gelu`.
      layer_norm_eps: Epsilon of the normalizations.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    projection_dim: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ClipVisionConfig:
        """Reads the `config.json` of a CLIP model, or of its vision tower alone.

        Raises:
          ValueError: Another model or an unknown activation.
        """
        if config.get("model_type") == "clip":
            # The projection's width stands outside; what the nested part leaves out has the default of ViT-B/32.
            config = {**config.get("vision_config", {}), "projection_dim": config.get("projection_dim", 512)}
        elif config.get("model_type") != "clip_vision_model":
            raise ValueError(f"model_type is {config.get('model_type')!r}, expected 'clip' or 'clip_vision_model'")
        defaults = {
            "image_size": 224,
            "patch_size": 32,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "projection_dim": 512,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }
        values = {name: config.get(name, default) for name, default in defaults.items()}
        if values["hidden_act"] not in _ACTIVATIONS:
            raise ValueError(f"hidden_act is {values['hidden_act']!r}, expected one of {', '.join(_ACTIVATIONS)}")
        return cls(**values)


_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class ClipVision(nn.Module):
    """The vision tower and the projection to the space that texts share.

    Attributes:
      config: Size.
      dtype: Compute dtype; normalization and softmax are float32 inside, parameters keep their own type.
      dot_general: The projections' product, where it is not `jax.lax.dot_general`.
    """

    config: ClipVisionConfig
    dtype: jnp.dtype = jnp.float32
    dot_general: DotGeneral = None

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          pixels: Normalized float [B, image_size, image_size, 3].

        Returns:
          float [B, projection_dim], not normalized.
        """
        config, width = self.config, self.config.hidden_size
        patch = (config.patch_size, config.patch_size)
        patches = nn.Conv(
            width, patch, patch, padding="VALID", use_bias=False, name="patch_embedding", dtype=self.dtype
        )
        x_BxTxD = patches(pixels.astype(self.dtype)).reshape(pixels.shape[0], -1, width)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,)).astype(self.dtype)
        first_Bx1xD = jnp.broadcast_to(first[None, None], (pixels.shape[0], 1, width))
        x_BxTxD = jnp.concatenate([first_Bx1xD, x_BxTxD], axis=1)
        positions = nn.Embed(x_BxTxD.shape[1], width, name="position_embedding", dtype=self.dtype)
        x_BxTxD = self._norm("pre_layrnorm", x_BxTxD + positions(jnp.arange(x_BxTxD.shape[1])[None]))
        for layer in range(config.num_hidden_layers):
            x_BxTxD = x_BxTxD + self._attention(f"layer_{layer}", self._norm(f"layer_{layer}_layer_norm1", x_BxTxD))
            hidden = self._norm(f"layer_{layer}_layer_norm2", x_BxTxD)
            hidden = self._dense(f"layer_{layer}_fc1", config.intermediate_size)(hidden)
            hidden = _ACTIVATIONS[config.hidden_act](hidden)
            x_BxTxD = x_BxTxD + self._dense(f"layer_{layer}_fc2", width)(hidden)
        pooled_BxD = self._norm("post_layernorm", x_BxTxD[:, 0])
        return self._dense("visual_projection", config.projection_dim, use_bias=False)(pooled_BxD)

    def _dense(self, name: str, width: int, *, use_bias: bool = True) -> nn.Dense:
        return nn.Dense(width, use_bias=use_bias, name=name, dtype=self.dtype, dot_general=self.dot_general)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(epsilon=self.config.layer_norm_eps, name=name, dtype=self.dtype)(x)

    def _attention(self, layer: str, x_BxTxD: jax.Array) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def project(name: str) -> jax.Array:
            y = self._dense(f"{layer}_{name}", width)(x_BxTxD)
            return y.reshape(*y.shape[:2], heads, -1)

        # Softmax is float32 inside.
        attended_BxTxHxK = jax.nn.dot_product_attention(project("q_proj"), project("k_proj"), project("v_proj"))
        attended_BxTxD = attended_BxTxHxK.reshape(x_BxTxD.shape)
        return self._dense(f"{layer}_out_proj", width)(attended_BxTxD)
