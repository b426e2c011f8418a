"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in a variable collection of their own.

A base model has `{"params": ...}` only, equal to the Hugging Face model. With a rank, the projections that carry an
adapter add `{"lora": {..., "q_proj": {"lora_a": [in, r], "lora_b": [r, out]}}}`, so that what is trained and what is
frozen are two trees and nothing has to be filtered.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from nqf.models.dropout import Dropout
from nqf.models.trees import flatten
from nqf.ops.products import DotGeneral, low_rank_product


class LoRADense(nn.Module):
    """A projection without bias: x W, plus (alpha / rank) dropout(x) A B where it carries an adapter.

    With B = 0, as it starts, the result equals the base's bit for bit. (What follows does too, with one exception
    seen: XLA's CPU compiler unrolls the QK-norm of heads of 8 and fewer and, fused with this sum, rounds it elsewhere.)

    Attributes:
      features: Output width.
      rank: Rank of the adapter; 0 for none.
      scale: alpha / rank.
      dropout: Dropout rate on the adapter's input.
      dtype: Compute dtype of both.
      param_dtype: Type of W. Adapters are always float32: their updates are lost in bfloat16.
      init_std: Standard deviation of W at the start.
      dot_general: The product with W, where it is not `jax.lax.dot_general`.
    """

    features: int
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    init_std: float = 0.02
    dot_general: DotGeneral = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Projects float [..., in] to float [..., features]."""
        kernel = self.param(
            "kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features), self.param_dtype
        )
        x = x.astype(self.dtype)
        product = self.dot_general or jax.lax.dot_general
        y = product(x, kernel.astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        if not self.rank:
            return y

        def init_a() -> jax.Array:
            # As peft: Kaiming-uniform with a = sqrt(5), which is uniform within 1 / sqrt(in).
            bound = 1.0 / math.sqrt(x.shape[-1])
            shape = (x.shape[-1], self.rank)
            return jax.random.uniform(self.make_rng("params"), shape, jnp.float32, -bound, bound)

        lora_a = self.variable("lora", "lora_a", init_a).value
        lora_b = self.variable("lora", "lora_b", jnp.zeros, (self.rank, self.features), jnp.float32).value
        x = Dropout(self.dropout)(x, deterministic)
        update = low_rank_product(x, lora_a.astype(self.dtype), lora_b.astype(self.dtype))
        return y + update * jnp.asarray(self.scale, self.dtype)


def merge_lora(params: Any, lora: Any, *, scale: float) -> Any:
    """Adds adapters to the kernels they belong to: W + scale A B, computed in float32.

    Args:
      params: Parameter tree of the base.
      lora: The `lora` collection; leaves [..., in, r] and [..., r, out] beside kernels [..., in, out].
      scale: alpha / rank.

    Returns:
      The parameter tree with float32 leaves where an adapter was merged; the others are the same arrays.

    Raises:
      ValueError: An adapter without a kernel.
    """
    flat, adapters = flatten(params), flatten(lora)
    for path in adapters:
        if path[-1] != "lora_a":
            continue
        target = (*path[:-1], "kernel")
        if target not in flat:
            raise ValueError(f"there is an adapter for {'/'.join(path[:-1])}, but the model has no such projection")
        a, b = adapters[path].astype(jnp.float32), adapters[(*path[:-1], "lora_b")].astype(jnp.float32)
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        flat[target] = flat[target].astype(jnp.float32) + scale * update
    return traverse_util.unflatten_dict(flat)
