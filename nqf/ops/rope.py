"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the two-halves form of Llama and Qwen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rope_tables(positions_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      positions_BxT: int [B, T], positions in tokens.
      head_dim: K, even.
      theta: Base of the wavelengths, which are 2 pi theta^(2i / K) tokens.

    Returns:
      Cosines and sines, float32 [B, T, K / 2] each.
    """
    # Float32 throughout, as the original: bfloat16 cannot tell positions above 256 apart.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1.0 / np.power(np.float32(theta), exponents)
    angles_BxTxK = positions_BxT.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles_BxTxK), jnp.sin(angles_BxTxK)


def apply_rope(x_BxTxHxK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + K / 2) of every head by its token's angle; computed in float32.

    Args:
      x_BxTxHxK: Queries or keys.
      cos: float32 [B or 1, T, K / 2], of `rope_tables`.
      sin: float32 [B or 1, T, K / 2].

    Returns:
      float [B, T, H, K] of the input's type.
    """
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)
