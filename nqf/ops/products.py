"""Matrix products of layers: in bfloat16 with sums in float32, and of low rank with cheap gradients."""

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


@jax.custom_vjp
def low_rank_product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x a b of float [..., in], [in, r] and [r, out], with gradients that transpose narrow matrices only.

    As jax writes the gradients of a and b, XLA's CPU compiler transposes the input and the output's gradient, which
    takes longer than the products of a low rank.
    """
    return (x @ a) @ b


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    narrow = x @ a
    return narrow @ b, (x, a, b, narrow)


def _over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., i] and [..., j] to [i, j], summed over everything else."""
    rows = (a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
    return jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))


def _low_rank_backward(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b, narrow = residuals
    to_narrow = g @ b.T
    return to_narrow @ a.T, _over_rows(to_narrow, x).T, _over_rows(narrow, g)


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)
