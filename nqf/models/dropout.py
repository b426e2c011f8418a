"""Dropout as a Linen module, in place of `nn.Dropout`: the mask is a hash, which costs next to nothing on a CPU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.ops.dropout import dropout


class Dropout(nn.Module):
    """Zeroes elements at random in training; draws from the stream `dropout`, once per call and module.

    Attributes:
      rate: Probability that an element is zeroed.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Any float array, of the same shape and type."""
        if deterministic or self.rate == 0:
            return x
        return dropout(x, self.rate, jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32), 0)
