"""A sequence's vector from its tokens' vectors, whatever side the padding is on."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def last_token_pool(hidden_BxTxD: jax.Array, attention_mask_BxT: jax.Array) -> jax.Array:
    """The vector of the last valid token, as Qwen3-Embedding pools.

    Args:
      hidden_BxTxD: Token vectors.
      attention_mask_BxT: bool or int [B, T], non-zero at valid tokens; padding may be left, right or absent.

    Returns:
      float [B, D]; for a row without valid tokens, the vector at the last place.
    """
    length = hidden_BxTxD.shape[1]
    last_B = length - 1 - jnp.argmax(attention_mask_BxT[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]


def mean_pool(hidden_BxTxD: jax.Array, attention_mask_BxT: jax.Array) -> jax.Array:
    """The mean over valid tokens, summed in float32.

    Args:
      hidden_BxTxD: Token vectors.
      attention_mask_BxT: bool or int [B, T], non-zero at valid tokens.

    Returns:
      float [B, D] of the input's type; zero for a row without valid tokens.
    """
    valid_BxTx1 = (attention_mask_BxT != 0)[..., None]
    # `where`, not a product: a NaN in padding must not reach the mean.
    total_BxD = jnp.sum(jnp.where(valid_BxTx1, hidden_BxTxD.astype(jnp.float32), 0.0), axis=1)
    return (total_BxD / jnp.maximum(jnp.sum(valid_BxTx1, axis=1), 1)).astype(hidden_BxTxD.dtype)
