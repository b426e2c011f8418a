"""Micro-batches give the gradients of the whole batch, hold less memory, and draw their dropout twice alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.ops.losses import info_nce
from nqf.ops.micro_batches import in_micro_batches

COUNT, WIDTH = 13, 24
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"a": jax.random.normal(KEYS[0], (WIDTH, 64)) / 5, "b": jax.random.normal(KEYS[1], (64, WIDTH)) / 8}
EXAMPLES = {"x": jax.random.normal(KEYS[2], (COUNT, 3, WIDTH)), "at": jnp.arange(COUNT)}
ITEMS = jax.random.normal(KEYS[3], (COUNT, WIDTH))


def encode(params: dict, rate: float, key: jax.Array, examples: dict) -> jax.Array:
    hidden = jnp.tanh(examples["x"] @ params["a"])
    kept = jax.random.bernoulli(key, 1 - rate, hidden.shape)
    return jnp.mean(jnp.where(kept, hidden, 0) @ params["b"], axis=1)


def loss(params: dict, items: jax.Array, size: int, rate: float = 0.0) -> jax.Array:
    def part(key: jax.Array, examples: dict) -> jax.Array:
        return encode(params, rate, key, examples) + 0.1 * items[examples["at"]]

    users = in_micro_batches(part, jax.random.key(1), EXAMPLES, size)
    return info_nce(3 * users @ items.T, jnp.arange(COUNT))


@pytest.mark.parametrize("size", [1, 2, 5, 12, 13, 99])
def test_gradients_are_those_of_the_whole_batch(size: int) -> None:
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))(PARAMS, ITEMS, 0, 0.0)
    found = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))(PARAMS, ITEMS, size, 0.0)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1])) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_dropout_of_a_part_is_the_same_in_both_passes() -> None:
    size, parts = 4, 4
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[-1:], x[-1:], x[-1:]]), EXAMPLES)
    keys = jax.random.split(jax.random.key(1), parts)

    def written_out(params: dict, items: jax.Array) -> jax.Array:
        encoded = [None] * (size * parts)
        for index in range(parts):
            members = jax.tree.map(lambda x, i=index: x[i::parts], padded)
            encoded[index::parts] = encode(params, 0.4, keys[index], members)
        users = jnp.stack(encoded[:COUNT]) + 0.1 * items
        return info_nce(3 * users @ items.T, jnp.arange(COUNT))

    expected = jax.jit(jax.value_and_grad(written_out, (0, 1)))(PARAMS, ITEMS)
    found = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))(PARAMS, ITEMS, size, 0.4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_activations_of_one_part_stand_at_a_time() -> None:
    examples = jnp.ones((256, 8, WIDTH))

    def deep(params: dict, size: int) -> jax.Array:
        def part(key: jax.Array, x: jax.Array) -> jax.Array:
            for _ in range(8):
                x = jnp.tanh(x @ params["a"]) @ params["b"]
            return jnp.mean(x, axis=1)

        users = in_micro_batches(part, jax.random.key(0), examples, size)
        return info_nce(users @ users.T, jnp.arange(len(users)))

    def temporaries(size: int) -> int:
        lowered = jax.jit(jax.grad(deep), static_argnums=1).lower(PARAMS, size)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(0) / 3
