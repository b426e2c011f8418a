"""Rotation and pooling against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from nqf.ops.pooling import last_token_pool, mean_pool
from nqf.ops.rope import apply_rope, rope_tables


def test_rotation_is_a_complex_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 5, 1000]])
    found = apply_rope(x, *rope_tables(jnp.asarray(positions), 8, 10_000.0))
    pairs = x[..., :4].astype(np.float64) + 1j * x[..., 4:]
    angles = positions[0][:, None] * 10_000.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)[None, :, None, :]
    # 1,000 times the rounding of a float32 frequency near 1.
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(found[:, 0], x[:, 0])  # Position 0 is left as it is.


def test_products_depend_on_distance_alone() -> None:
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(at_q: int, at_k: int) -> float:
        rotated = [apply_rope(x, *rope_tables(jnp.array([[at]]), 16, 1e6)) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert product(3, 1) == pytest.approx(product(42, 40), abs=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-2


def test_tables_stay_float32_and_the_type_is_kept() -> None:
    cos, sin = rope_tables(jnp.array([[300, 301]]), 8, 1e6)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (1, 2, 4)
    assert float(cos[0, 0, 0]) != float(cos[0, 1, 0])  # Bfloat16 would round 301 to 300 or 302.
    assert apply_rope(jnp.ones((1, 2, 1, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


HIDDEN = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize("kind", [bool, np.int32])
def test_last_token_on_any_side(kind: type) -> None:
    found = last_token_pool(jnp.asarray(HIDDEN), jnp.asarray(MASK.astype(kind)))
    np.testing.assert_array_equal(found, [HIDDEN[0, 3], HIDDEN[1, 3], HIDDEN[2, 1]])


@pytest.mark.parametrize("kind", [bool, np.int32])
def test_mean_of_valid_tokens(kind: type) -> None:
    dirty = np.where(MASK[..., None] == 1, HIDDEN, np.nan)
    found = mean_pool(jnp.asarray(dirty), jnp.asarray(MASK.astype(kind)))
    np.testing.assert_array_equal(found, [HIDDEN[0].mean(0), HIDDEN[1, 2:].mean(0), HIDDEN[2, :2].mean(0)])


def test_mean_of_nothing_is_zero_and_sums_are_float32() -> None:
    np.testing.assert_array_equal(mean_pool(jnp.asarray(HIDDEN[:1]), jnp.zeros((1, 4), bool)), [[0, 0]])
    # In bfloat16 a running sum of ones stops at 256.
    ones = mean_pool(jnp.ones((1, 1000, 1), jnp.bfloat16), jnp.ones((1, 1000), bool))
    assert ones.dtype == jnp.bfloat16 and float(ones[0, 0]) == 1.0
