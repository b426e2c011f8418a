"""Products in bfloat16 with sums in float32, for layers that otherwise compute in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The type of `dot_general` in Linen's layers; None stands for `jax.lax.dot_general`.
DotGeneral = Callable[..., jax.Array] | None


def bfloat16_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of operands rounded to bfloat16, summed and returned in float32.

    CPUs with bfloat16 units (AVX512-BF16, AMX) compute it at twice the rate of float32 and more, but, as XLA stands,
    only where the result is float32; the others at the same rate. The last two arguments are Linen's and not used.
    """
    return jax.lax.dot_general(
        lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), dimension_numbers, preferred_element_type=jnp.float32
    )
