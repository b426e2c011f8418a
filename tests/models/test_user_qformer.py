"""User Q-Former: what a position may see, and that padding and cuts change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.config import QFormerConfig
from nqf.models.user_qformer import GAP_BUCKETS, UserQFormer, gap_bucket, recency_bucket
from nqf.pipelines.batches import History

SLOTS, PER_ITEM, WIDTH = 6, 2, 8


def random_history(seed: int, slots: int = SLOTS, padding: int = 1) -> History:
    rng = np.random.default_rng(seed)
    valid = np.arange(slots)[None] >= padding
    age = np.sort(rng.integers(0, 10**6, (1, slots)))[:, ::-1] - 0
    age = age - age[:, -1:]
    return History(
        items=np.where(valid, rng.integers(0, 9, (1, slots)), -1).astype(np.int32),
        calendar=np.where(valid[..., None], rng.integers(0, 6, (1, slots, 3)), -1).astype(np.int32),
        age=np.where(valid, age, -1).astype(np.int32),
        ratings=np.where(valid, rng.integers(0, 12, (1, slots)), -1).astype(np.int32),
        reviews=rng.normal(size=(1, slots, 3)).astype(np.float32),
        has_review=valid & (rng.random((1, slots)) < 0.5),
    )


@pytest.fixture(scope="module")
def model():
    module = UserQFormer(config=QFormerConfig(width=WIDTH, heads=2, mlp_width=16, queries=2, layers=2))
    inputs = np.random.default_rng(0).normal(size=(1, SLOTS, PER_ITEM, 5)).astype(np.float32)
    init = jax.jit(module.init, static_argnames="positions")
    params = init(jax.random.key(0), inputs, random_history(0), positions=SLOTS)
    # The biases start at zero; random ones make sure that the tests see them.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    return jax.jit(module.apply, static_argnames="positions"), params, inputs


def test_positions_do_not_see_later_slots(model) -> None:
    apply, params, inputs = model
    history = random_history(1)

    def tokens(inputs, reviews):
        return apply(params, inputs, history.replace(reviews=reviews), positions=SLOTS)[0]

    by_input, by_review = jax.jacobian(lambda *x: jnp.sum(tokens(*x), axis=(-2, -1)), argnums=(0, 1))(
        jnp.asarray(inputs), jnp.asarray(history.reviews)
    )
    seen = np.abs(by_input[:, 0]).sum(axis=(-2, -1)) + np.abs(by_review[:, 0]).sum(axis=-1)
    later = np.triu(np.ones((SLOTS, SLOTS), bool), 1)
    assert np.all(seen[later] == 0), "a position sees a later slot"
    valid = history.items[0] >= 0
    assert np.all(seen[~later & valid[None] & valid[:, None]] > 0), "a position does not see its past"
    assert np.all(seen[:, ~valid] == 0), "padding is seen"


def test_position_equals_history_cut_there(model) -> None:
    apply, params, inputs = model
    history = random_history(2)
    all_at_once = apply(params, inputs, history, positions=SLOTS)
    for position in range(1, SLOTS):
        cut = slice(0, position + 1)
        part = jax.tree.map(lambda x, cut=cut: x[:, cut], history)
        part = part.replace(age=np.where(part.age >= 0, part.age - part.age[:, -1:], -1))
        alone = apply(params, inputs[:, cut], part, positions=1)
        np.testing.assert_allclose(alone[0, -1], all_at_once[0, position], atol=1e-5)


def test_longer_padding_changes_nothing(model) -> None:
    apply, params, inputs = model
    history = random_history(3)
    wider = jax.tree.map(lambda x: np.concatenate([np.full_like(x[:, :1], -1), x], axis=1), history)
    wider = wider.replace(has_review=np.concatenate([[[False]], history.has_review], axis=1))
    noise = np.full_like(inputs[:, :1], 99.0)
    np.testing.assert_allclose(
        apply(params, np.concatenate([noise, inputs], axis=1), wider, positions=2),
        apply(params, inputs, history, positions=2),
        atol=1e-5,
    )


@pytest.mark.parametrize("feature", ["calendar", "age", "ratings", "reviews", "has_review"])
def test_every_feature_reaches_the_tokens(model, feature: str) -> None:
    apply, params, inputs = model
    history = random_history(4)
    value = getattr(history, feature)
    # Neighboring buckets for the integer features, another vector for reviews; padding stays padding.
    changed = value + 1 if feature == "reviews" else np.where(value >= 0, value ^ 1, value)
    # A year's shift of everything but the newest slot changes gaps, not only their offset.
    if feature == "age":
        changed = np.where(value > 0, value + 31_536_000, value).astype(np.int32)
    if feature == "has_review":
        changed = history.items >= 0
        history = history.replace(has_review=np.zeros_like(changed))
    before = apply(params, inputs, history, positions=1)
    after = apply(params, inputs, history.replace(**{feature: changed}), positions=1)
    assert np.abs(before - after).max() > 1e-4


def test_empty_history_is_finite(model) -> None:
    apply, params, inputs = model
    history = random_history(5, padding=SLOTS)
    assert np.all(np.isfinite(apply(params, inputs, history, positions=SLOTS)))


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=200, deadline=None)
def test_gap_bucket_is_the_bit_length(seconds: int) -> None:
    assert int(gap_bucket(jnp.int32(seconds))) == seconds.bit_length() < GAP_BUCKETS - 1


def test_unknown_gap_has_its_own_bucket() -> None:
    assert int(gap_bucket(jnp.int32(-1))) == GAP_BUCKETS - 1


def test_recency_buckets_rise_from_exact_to_coarse() -> None:
    buckets = np.asarray(recency_bucket(jnp.arange(2_000)))
    assert list(buckets[:16]) == list(range(16)) and np.all(np.diff(buckets) >= 0) and buckets.max() == 31
