"""Dot-product attention, and the one place where its kernel is chosen."""

from __future__ import annotations

import functools
import logging
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from nqf.ops.pins import on_examples_and_heads

_LOG = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "cudnn"]
Kernel = Literal["xla", "cudnn", "splash"]

_LANES = 128
"""Width of a TPU's vector registers: splash attention works on pieces of whole multiples."""


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
      is_causal: Whether a query may only read keys at its own place and before it. The last of T queries stands at the
        last of S keys, as where others' keys stand before a sequence.
      implementation: `xla`, `cudnn`, or `auto`: where it can compute this, the platform's fused kernel, cuDNN's on GPUs
        and splash attention on TPUs.

    Returns:
      float [B, T, H, K] of the queries' type.

    Raises:
      ValueError: cuDNN was asked for and cannot compute this; says why. Causal order with fewer keys than queries.
    """
    before = k_BxSxGxK.shape[1] - q_BxTxHxK.shape[1]
    if is_causal and before < 0:
        raise ValueError(f"causal order of {q_BxTxHxK.shape[1]} queries and {k_BxSxGxK.shape[1]} keys")
    chosen = choose_implementation(
        implementation,
        dtype=q_BxTxHxK.dtype,
        head_dim=q_BxTxHxK.shape[-1],
        with_bias=bias is not None,
        with_mask=mask is not None,
        is_causal=is_causal,
    )
    if chosen == "splash":
        return on_examples_and_heads(_splash, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
    if is_causal and before and (chosen == "xla" or mask is not None):
        order = jnp.tril(jnp.ones((q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]), bool), before)[None, None]
        mask, is_causal = order if mask is None else order & mask, False
    if mask is not None and chosen == "cudnn":
        # cuDNN refuses masks that broadcast over queries (jax issue 28974).
        batch, target, source = q_BxTxHxK.shape[0], q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
        mask = jnp.broadcast_to(mask, (batch, mask.shape[1], target, source))
    # jax counts places from the first query and the first key.
    filled = before if is_causal else 0
    read_BxTxHxK = jax.nn.dot_product_attention(
        jnp.pad(q_BxTxHxK, ((0, 0), (filled, 0), (0, 0), (0, 0))), k_BxSxGxK, v_BxSxGxK, bias=bias, mask=mask,
        is_causal=is_causal, implementation=chosen,
    )  # fmt: skip
    return read_BxTxHxK[:, filled:]


def _splash(q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, interpret: bool = False) -> jax.Array:
    """Causal attention by jax's kernel for TPUs, which has no logits in memory and skips what nobody reads."""
    # Imported where it is used: Pallas takes a third of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, targets, heads, width), sources = q_BxTxHxK.shape, k_BxSxGxK.shape[1]
    # Filled up at the end, where no query but those that are cut off again reads.
    filled = [-(-length // _LANES) * _LANES for length in (targets, sources)]
    q_block, kv_block = (max(size for size in (512, 384, 256, 128) if length % size == 0) for length in filled)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((filled[0], filled[1]), offset=sources - targets)] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=q_block, block_kv=kv_block, block_q_dkv=q_block, block_kv_dkv=kv_block, block_q_dq=q_block,
            block_kv_dq=kv_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip

    def lay(x_BxLxHxK: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x_BxLxHxK, ((0, 0), (0, length - x_BxLxHxK.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled = (q_BxTxHxK.astype(jnp.float32) * width**-0.5).astype(q_BxTxHxK.dtype)
    laid = (lay(scaled, filled[0]), lay(k_BxSxGxK, filled[1]), lay(v_BxSxGxK, filled[1]))
    # Without residuals it returns what is read alone.
    read_BxHxTxK = cast(jax.Array, jax.vmap(attend)(*laid))
    return read_BxHxTxK.swapaxes(1, 2)[:, :targets]


def choose_implementation(
    implementation: Implementation,
    *,
    dtype: jnp.dtype,
    head_dim: int,
    with_bias: bool,
    with_mask: bool = False,
    is_causal: bool = False,
) -> Kernel:
    """Chooses the kernel and logs each choice once.

    Args:
      implementation: What the configuration asks for.
      dtype: Type of the queries.
      head_dim: K.
      with_bias: Whether there is an additive bias; cuDNN has its gradient for batches of one only (jax issue 30593).
      with_mask: Whether there is a boolean mask. jax makes a bias of it, whose gradient cuDNN then computes too (jax
        issue 34685) and which it refuses for odd lengths, so that `auto` leaves masks to XLA.
      is_causal: Whether queries read in causal order, all that splash attention is used for.

    Raises:
      ValueError: cuDNN was asked for and cannot compute this; says why.
    """
    # A program that is compiled for devices that are not here has them in its mesh.
    device = get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return _choose(implementation, platform, jnp.dtype(dtype).name, head_dim, with_bias, with_mask, is_causal)


@functools.cache
def _choose(
    implementation: Implementation,
    platform: str,
    dtype: str,
    head_dim: int,
    with_bias: bool,
    with_mask: bool,
    is_causal: bool,
) -> Kernel:
    fused: Kernel = "cudnn"
    obstacle = ""
    if platform == "tpu" and implementation == "auto":
        fused = "splash"
        if with_bias or with_mask or not is_causal:
            obstacle = "queries do not read in plain causal order"
        elif head_dim % _LANES:
            obstacle = f"the head width {head_dim} is not a multiple of {_LANES}"
    elif platform not in ("gpu", "cuda"):
        obstacle = f"the backend is {platform}, not a GPU"
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
    chosen: Kernel = "xla" if implementation == "xla" or obstacle else fused
    _announce(f"attention kernel: {chosen} (asked for {implementation})" + (f": {obstacle}" if obstacle else ""))
    return chosen


@functools.cache
def _announce(message: str) -> None:
    # Once, not with each program that is compiled.
    _LOG.info(message)
