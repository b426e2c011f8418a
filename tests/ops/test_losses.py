"""Losses against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqf.ops.losses import full_softmax, info_nce, triplet_margin, unit


def test_info_nce_equals_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(5, 7)).astype(np.float32), np.array([0, 6, 3, 3, 1])
    weights = np.array([1.0, 0.0, 2.0, 1.0, 1.0], np.float32)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    expected = -(weights * log_p[np.arange(5), labels]).sum() / weights.sum()
    assert info_nce(jnp.asarray(scores), jnp.asarray(labels), weights_M=jnp.asarray(weights)) == pytest.approx(
        expected, rel=1e-5
    )


def test_info_nce_masks_and_corrects() -> None:
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(4, 6)).astype(np.float32), np.array([0, 1, 2, 3])
    log_q = np.log(rng.uniform(0.1, 1, 6)).astype(np.float32)
    allowed = rng.random((4, 6)) < 0.5
    corrected = scores - log_q
    kept = allowed | (np.arange(6)[None] == labels[:, None])
    expected = np.mean(
        [np.log(np.exp(corrected[row][kept[row]]).sum()) - corrected[row, labels[row]] for row in range(4)]
    )
    loss = info_nce(
        jnp.asarray(scores), jnp.asarray(labels), log_q_C=jnp.asarray(log_q), allowed_MxC=jnp.asarray(allowed)
    )
    assert loss == pytest.approx(expected, rel=1e-5)


def test_info_nce_without_examples_is_zero_with_zero_gradient() -> None:
    def loss(scores):
        return info_nce(scores, jnp.zeros(3, jnp.int32), weights_M=jnp.zeros(3))

    value, gradient = jax.value_and_grad(loss)(jnp.ones((3, 4)))
    assert value == 0 and not np.any(gradient)


@pytest.mark.slow
def test_triplet_equals_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is installed for Python 3.11 only")
    rng = np.random.default_rng(2)
    a, p, n = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(3))
    expected = torch.nn.functional.triplet_margin_loss(*map(torch.from_numpy, (a, p, n)), margin=0.5)
    assert triplet_margin(jnp.asarray(a), jnp.asarray(p), jnp.asarray(n), margin=0.5) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_unit_of_zero_is_zero_with_finite_gradient() -> None:
    gradient = jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(gradient)) and not np.any(unit(jnp.zeros((2, 3))))


def test_full_softmax_is_info_nce_over_everything() -> None:
    keys = jax.random.split(jax.random.key(3), 5)
    users, learned = jax.random.normal(keys[0], (29, 9)), jax.random.normal(keys[1], (71, 6))
    frozen, targets = jax.random.normal(keys[2], (71, 3)), jax.random.randint(keys[3], (29,), 0, 40)
    weights = (jax.random.uniform(keys[4], (29,)) > 0.3).astype(jnp.float32)
    allowed = jnp.arange(71) < 50

    def written_out(users: jax.Array, learned: jax.Array, frozen: jax.Array) -> jax.Array:
        return full_softmax(users, learned, frozen, targets, weights_M=weights, allowed=allowed)

    def plain(users: jax.Array, learned: jax.Array, frozen: jax.Array) -> jax.Array:
        scores = users @ jnp.concatenate([learned, jax.lax.stop_gradient(frozen)], axis=1).T
        return info_nce(scores, targets, weights_M=weights, allowed_MxC=allowed[None, :])

    found = jax.value_and_grad(written_out, (0, 1, 2))(users, learned, frozen)
    expected = jax.value_and_grad(plain, (0, 1, 2))(users, learned, frozen)
    assert float(jnp.abs(expected[1][1]).max()) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
