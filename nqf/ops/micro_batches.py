"""Encoding in parts whose activations are not kept, under a loss that sees the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_micro_batches(encode: Callable[[jax.Array, Any], Any], key: jax.Array, examples: Any, size: int) -> Any:
    """`encode(key, examples)`, at most `size` examples at a time (GradCache, Gao et al. 2021, arXiv 2101.06983).

    Only the results are kept for the gradient, which encodes one part after the other again. Up to rounding, results
    and gradients are those of the whole batch, dropout aside: each part draws it from a key of its own, the same one
    both times.

    Args:
      encode: Whatever it returns has one row per example, and follows from the example and the key alone.
      key: Random key.
      examples: Arrays with one row per example.
      size: Examples at a time; 0 for all. It need not divide their number.
    """
    count = jax.tree.leaves(examples)[0].shape[0]
    if not 0 < size < count:
        return encode(key, examples)
    parts = -(-count // size)

    def split(x: jax.Array) -> jax.Array:
        # Each part takes rows from all over the batch: if that is split over devices, so is each part.
        x = jnp.concatenate([x, jnp.repeat(x[-1:], parts * size - count, axis=0)])
        return x.reshape(size, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(parts * size, *x.shape[2:])[:count]

    # Inside a loop the barrier against common subexpressions is not needed.
    step = jax.checkpoint(lambda part: encode(*part), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(step, (jax.random.split(key, parts), jax.tree.map(split, examples))))
