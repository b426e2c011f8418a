"""Ranks and top-k lists against sorting by brute force, with ties, masks and every way of cutting the work up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.evaluation.ranking import rank_vectors, ranks_from_scores, top_k, top_k_from_scores

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 3))


def brute_force_rank(scores: np.ndarray, target: int, seen: list[int]) -> float:
    """Mean place of the target over both extreme orders of its ties."""
    others = [score for item, score in enumerate(scores) if item != target and item not in set(seen)]
    first = 1 + sum(score > scores[target] for score in others)
    last = len(others) + 1 - sum(score < scores[target] for score in others)
    return (first + last) / 2


def draw_case(shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    users, items, width = shape
    rng = np.random.default_rng(seed)
    # Small whole numbers: many ties, and inner products without rounding.
    user_vectors = rng.integers(-2, 3, (users, width)).astype(np.float32)
    item_vectors = rng.integers(-2, 3, (items, width)).astype(np.float32)
    seen = [rng.integers(0, items, rng.integers(0, items)).tolist() for _ in range(users)]
    return user_vectors, item_vectors, rng.integers(0, items, users), seen


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_ranks_from_scores_equal_brute_force(shape: tuple[int, int, int], seed: int) -> None:
    users, items, targets, seen = draw_case(shape, seed)
    scores = users @ items.T
    expected = [brute_force_rank(scores[row], targets[row], seen[row]) for row in range(len(users))]
    np.testing.assert_array_equal(ranks_from_scores(scores, targets, seen), expected)
    unmasked = [brute_force_rank(scores[row], targets[row], []) for row in range(len(users))]
    np.testing.assert_array_equal(ranks_from_scores(scores, targets), unmasked)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), batch=st.sampled_from([2, 16]), chunk=st.sampled_from([3, 8, 64]))
def test_rank_vectors_equals_ranks_from_scores(shape: tuple[int, int, int], seed: int, batch: int, chunk: int) -> None:
    users, items, targets, seen = draw_case(shape, seed)
    expected = ranks_from_scores(users @ items.T, targets, seen)
    np.testing.assert_array_equal(rank_vectors(users, items, targets, seen, batch=batch, chunk=chunk), expected)
    np.testing.assert_array_equal(
        rank_vectors(users, items, targets, batch=batch, chunk=chunk), ranks_from_scores(users @ items.T, targets)
    )


@pytest.mark.parametrize("chunk", [256, 65_536])
@pytest.mark.parametrize("width", [7, 64, 200])
def test_equal_vectors_tie_wherever_they_stand(width: int, chunk: int) -> None:
    rng = np.random.default_rng(width)
    items = rng.normal(size=(1_001, width)).astype(np.float32)
    # The last row of the catalogue, one in the middle and the first are the same item vector.
    items[500] = items[1_000] = items[0]
    users = rng.normal(size=(40, width)).astype(np.float32)
    ranks = [rank_vectors(users, items, np.full(40, target), chunk=chunk) for target in (0, 500, 1_000)]
    np.testing.assert_array_equal(ranks[0], ranks[1])
    np.testing.assert_array_equal(ranks[0], ranks[2])
    # Two ties add one place to the best rank: the number above the target is whole.
    assert (ranks[0] == np.round(ranks[0])).all() and ranks[0].min() >= 2


def test_a_seen_target_is_never_masked() -> None:
    scores = np.array([[3.0, 2.0, 1.0]])
    assert ranks_from_scores(scores, np.array([1]), [[1]]) == 2
    assert ranks_from_scores(scores, np.array([1]), [[0, 1]]) == 1


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 400), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 3, 50]),
    # From 48 columns on, one is looked for in groups; from 112 on, three.
    chunk=st.sampled_from([3, 64, 256]),
)
def test_top_k_equals_a_stable_sort(shape: tuple[int, int, int], seed: int, k: int, chunk: int) -> None:
    users, items, _, seen = draw_case(shape, seed)
    scores = (users @ items.T).astype(np.float32)
    for row, masked in enumerate(seen):
        scores[row, masked] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    expected = np.where(best > -np.inf, order, -1)
    for found_scores, found in (
        top_k(users, items, k, seen, batch=4, chunk=chunk),
        top_k_from_scores(users @ items.T, k, seen),
    ):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_scores, best)


def test_what_has_no_rank_is_refused() -> None:
    good, bad = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="item 2 is not finite"):
        rank_vectors(good, bad, np.array([0, 1]))
    with pytest.raises(ValueError, match="not numbers"):
        ranks_from_scores(bad, np.zeros(4, int))
    with pytest.raises(ValueError, match="target 4 of user 1"):
        rank_vectors(good, np.ones((4, 3), np.float32), np.array([0, 4]))
    with pytest.raises(ValueError, match="same width"):
        top_k(good, np.ones((4, 2), np.float32), 1)
