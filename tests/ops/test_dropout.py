"""Dropout by hash: the rate, the scale, and masks that have nothing to do with each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.ops.dropout import dropout

SHAPE = (128, 7, 128)


def mask(step: int, salt: int, rate: float = 0.3) -> np.ndarray:
    seed = jax.random.bits(jax.random.fold_in(jax.random.key(0), step), (2,), jnp.uint32)
    return np.asarray(dropout(jnp.ones(SHAPE), rate, seed, salt)) > 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_kept_elements_are_scaled_so_that_the_mean_stays(rate):
    seed = jnp.array([1, 2], jnp.uint32)
    x = jax.random.normal(jax.random.key(0), SHAPE).astype(jnp.bfloat16)
    out = dropout(x, rate, seed, 0)
    kept = np.asarray(out != 0)
    assert out.dtype == x.dtype
    # Five standard deviations.
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    np.testing.assert_array_equal(np.asarray(out)[kept], np.asarray(x / (1 - rate))[kept])


def test_without_a_seed_or_rate_nothing_happens():
    x = jnp.ones(3)
    assert dropout(x, 0.5, None, 0) is x and dropout(x, 0.0, jnp.zeros(2, jnp.uint32), 0) is x


def test_masks_of_steps_salts_and_neighbors_are_independent():
    masks = {(step, salt): mask(step, salt) for step in range(4) for salt in range(4)}
    size = np.prod(SHAPE)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]))

    for a, b in itertools.combinations(masks.values(), 2):
        assert correlation(a, b) < 5 / np.sqrt(size)
    flat = masks[0, 0].ravel()
    for lag in (1, 2, 7, 64, 128, 7 * 128):
        assert correlation(flat[:-lag], flat[lag:]) < 5 / np.sqrt(size)
    for axis in range(3):
        # No row or column is favored: its share of kept elements is binomial.
        shares = masks[0, 0].mean(axis=axis)
        assert abs(shares.std() / np.sqrt(0.21 / SHAPE[axis]) - 1) < 0.1


def test_the_gradient_passes_where_the_value_does():
    seed, x = jnp.array([3, 4], jnp.uint32), jnp.ones(SHAPE)
    np.testing.assert_array_equal(jax.grad(lambda x: dropout(x, 0.3, seed, 0).sum())(x), dropout(x, 0.3, seed, 0))
