"""Products in bfloat16: rounded operands, exact sums, float32 results."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nqf.ops.products import bfloat16_dot_general, low_rank_product


def test_operands_are_rounded_and_sums_are_not() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 300), (300, 7)))
    found = jax.jit(lambda a, b: bfloat16_dot_general(a, b, (((1,), (0,)), ((), ()))))(a, b)
    assert found.dtype == jnp.float32
    rounded = [array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (a, b)]
    # A sum in bfloat16 would be off by some hundredths.
    np.testing.assert_allclose(found, rounded[0] @ rounded[1], atol=1e-4)
    assert np.abs(found - a @ b).max() > 1e-3


def test_low_rank_product_has_the_gradients_of_its_products() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x, a, b, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(2, 5, 8), (8, 3), (3, 6), (2, 5, 6)], strict=True)
    )
    out, pull = jax.vjp(low_rank_product, x, a, b)
    expected, plain = jax.vjp(lambda x, a, b: (x @ a) @ b, x, a, b)
    np.testing.assert_array_equal(out, expected)
    for found, wanted in zip(pull(g), plain(g), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
