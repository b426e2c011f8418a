"""Dot-product attention, and the one place where its kernel is chosen."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

_LOG = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "cudnn"]


def dot_product_attention(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attention with logits scaled by 1 / sqrt(K) and the softmax in float32.

    Args:
      q_BxTxHxK: Queries.
      k_BxSxGxK: Keys; G divides H, and H / G successive query heads share a key-value head.
      v_BxSxGxK: Values.
      mask: bool [B or 1, 1 or H, T, S], True where a query may read. Every query must read something: kernels
        differ in what they return for one that may not.
      bias: float [B or 1, 1 or H, T, S], added to the logits.
      is_causal: Whether a query may only read keys at its own place and before it.
      implementation: `xla`, `cudnn`, or `auto`: cuDNN where it is available.

    Returns:
      float [B, T, H, K] of the queries' type.

    Raises:
      ValueError: cuDNN was asked for and cannot compute this; says why.
    """
    chosen = choose_implementation(
        implementation,
        dtype=q_BxTxHxK.dtype,
        head_dim=q_BxTxHxK.shape[-1],
        with_bias=bias is not None,
        with_mask=mask is not None,
    )
    if mask is not None and chosen == "cudnn":
        # cuDNN refuses masks that broadcast over queries (jax issue 28974).
        batch, target, source = q_BxTxHxK.shape[0], q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
        mask = jnp.broadcast_to(mask, (batch, mask.shape[1], target, source))
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, bias=bias, mask=mask, is_causal=is_causal, implementation=chosen
    )


def choose_implementation(
    implementation: Implementation, *, dtype: jnp.dtype, head_dim: int, with_bias: bool, with_mask: bool = False
) -> Literal["xla", "cudnn"]:
    """Chooses the kernel and logs each choice once.

    Args:
      implementation: What the configuration asks for.
      dtype: Type of the queries.
      head_dim: K.
      with_bias: Whether there is an additive bias; cuDNN has its gradient for batches of one only (jax issue 30593).
      with_mask: Whether there is a boolean mask. jax makes a bias of it, whose gradient cuDNN then computes too (jax
        issue 34685) and which it refuses for odd lengths, so that `auto` leaves masks to XLA.

    Raises:
      ValueError: cuDNN was asked for and cannot compute this; says why.
    """
    return _choose(implementation, jax.default_backend(), jnp.dtype(dtype).name, head_dim, with_bias, with_mask)


@functools.cache
def _choose(
    implementation: Implementation, backend: str, dtype: str, head_dim: int, with_bias: bool, with_mask: bool
) -> Literal["xla", "cudnn"]:
    obstacle = ""
    if backend not in ("gpu", "cuda"):
        obstacle = f"the backend is {backend}, not a GPU"
    elif dtype not in ("bfloat16", "float16"):
        obstacle = f"{dtype} is not a 16-bit type"
    elif head_dim > 128 or head_dim % 8:
        obstacle = f"the head width {head_dim} is above 128 or not a multiple of 8"
    elif with_bias:
        obstacle = "there is an additive bias"
    elif with_mask and implementation == "auto":
        obstacle = "there is a mask"
    if implementation == "cudnn" and obstacle:
        raise ValueError(f"cuDNN attention cannot be used: {obstacle}; choose 'xla' or 'auto'")
    chosen = "xla" if implementation == "xla" or obstacle else "cudnn"
    _announce(f"attention kernel: {chosen} (asked for {implementation})" + (f": {obstacle}" if obstacle else ""))
    return chosen


@functools.cache
def _announce(message: str) -> None:
    # Once, not with each program that is compiled.
    _LOG.info(message)
