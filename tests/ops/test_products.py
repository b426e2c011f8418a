"""Products in bfloat16: rounded operands, exact sums, float32 results."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nqf.ops.products import bfloat16_dot_general


def test_operands_are_rounded_and_sums_are_not() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 300), (300, 7)))
    found = jax.jit(lambda a, b: bfloat16_dot_general(a, b, (((1,), (0,)), ((), ()))))(a, b)
    assert found.dtype == jnp.float32
    rounded = [array.astype(ml_dtypes.bfloat16).astype(np.float64) for array in (a, b)]
    # A sum in bfloat16 would be off by some hundredths.
    np.testing.assert_allclose(found, rounded[0] @ rounded[1], atol=1e-4)
    assert np.abs(found - a @ b).max() > 1e-3
