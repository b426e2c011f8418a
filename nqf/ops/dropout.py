"""Dropout whose mask is a hash of each element's place: no loop and no array of random bits in the program.

`jax.random.bernoulli` compiles to a loop per mask on the CPU and takes a tenth of a small step there. A mask needs no
cryptographic generator; the hash is a 32-bit finalizer of full avalanche (lowbias32 of C. Wellons' hash-prospector).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, seed_2: jax.Array | None, salt: int) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      x: Any float array.
      rate: From 0 to below 1.
      seed_2: uint32 [2], random numbers of the step; None leaves `x` as it is.
      salt: Which of the masks under one seed.

    Returns:
      The array, of the same type.
    """
    if seed_2 is None or rate == 0:
        return x
    # A Weyl sequence keeps salts apart; its step is 2^32 over the golden ratio.
    places = jax.lax.iota(jnp.uint32, math.prod(x.shape)).reshape(x.shape)
    bits = places ^ (seed_2[0] + jnp.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits = (bits ^ (bits >> 16)) + seed_2[1]
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), 0)
