"""Training-free baselines by hand, and against counting in plain loops."""

import numpy as np
from hand_made import last_two_out, make_interactions, random_interactions

from nqf.evaluation import baselines
from nqf.evaluation.cooccurrence import Counting
from nqf.evaluation.ranking import Scorer

DAY = 86_400


def scores_of(scorer: Scorer, cases: int) -> np.ndarray:
    return scorer(np.arange(cases)) if callable(scorer) else scorer[0] @ scorer[1].T


def test_what_may_be_counted() -> None:
    interactions = make_interactions([[0, 1, 2, 3], [1, 0, 4, 1]])
    split = last_two_out(interactions, 6)
    valid = baselines.known_events(interactions, split, split.valid)
    np.testing.assert_array_equal(valid, [1, 1, 0, 0, 1, 1, 0, 0])
    # Both validation targets (2 and 4) are in no training event, so they stay out of the test case's counts.
    np.testing.assert_array_equal(baselines.known_events(interactions, split, split.test), valid)
    warm = make_interactions([[0, 1, 1, 3], [1, 0, 4, 1]])
    test = baselines.known_events(warm, last_two_out(warm, 6), last_two_out(warm, 6).test)
    np.testing.assert_array_equal(test, [1, 1, 1, 0, 1, 1, 0, 0])


def test_popularity_counts_known_events() -> None:
    interactions = make_interactions([[0, 1, 1, 3], [1, 0, 1, 2]])
    split = last_two_out(interactions, 4)
    np.testing.assert_array_equal(scores_of(baselines.popular(interactions, split, split.valid), 2), [[2, 2, 0, 0]] * 2)
    np.testing.assert_array_equal(scores_of(baselines.popular(interactions, split, split.test), 2), [[2, 4, 0, 0]] * 2)


def test_recent_popularity_by_time() -> None:
    times = [[0, 40 * DAY, 70 * DAY, 99 * DAY], [5 * DAY, 45 * DAY, 50 * DAY, 90 * DAY]]
    interactions = make_interactions([[0, 1, 2, 3], [2, 0, 3, 1]], times)
    split = last_two_out(interactions, 4)
    recent = baselines.recent_popular(interactions, split, split.valid, days=10)
    np.testing.assert_array_equal(scores_of(recent, 2)[0], [1, 1, 0, 0])
    # For the test cases item 2's event on day 70 is known, too, and is the last; 3 is cold.
    recent = baselines.recent_popular(interactions, split, split.test, days=25)
    np.testing.assert_array_equal(scores_of(recent, 2)[0], [1, 0, 1, 0])


def test_recent_popularity_by_order_takes_the_end_of_each_history() -> None:
    interactions = make_interactions([[0] * 18 + [1, 2, 3, 3], [4, 0, 3, 3]])
    split = last_two_out(interactions, 5)
    recent = baselines.recent_popular(interactions, split, split.valid, days=1)
    np.testing.assert_array_equal(scores_of(recent, 2)[0], [1, 1, 1, 0, 0])


def test_last_item_cosine_uses_the_newest_item_with_a_vector() -> None:
    vectors = np.array([[2.0, 0], [0, 3], [1, 1], [9, 9], [0, 0]])
    present = np.array([True, True, True, False, True])
    interactions = make_interactions([[0, 3, 1, 2], [3, 4, 2, 0]])
    split = last_two_out(interactions, 5)
    scores = scores_of(baselines.last_item_cosine(interactions, split.valid, vectors, present), 2)
    # The first user's newest item 3 has none, so item 0 stands; the second has nothing at all.
    np.testing.assert_allclose(scores[0], [1, 0, np.sqrt(0.5), -2, -2], atol=1e-6)
    np.testing.assert_array_equal(scores[1], [0, 0, 0, -2, -2])


def test_cooccurrence_equals_plain_loops() -> None:
    interactions, split = random_interactions(3)
    cases, items = split.test, len(split.cold)
    known = baselines.known_events(interactions, split, cases)
    popularity = np.maximum(np.bincount(interactions.items[known], minlength=items), 1)
    counts = np.zeros((items, items))
    for user in range(len(interactions.user_ids)):
        span = slice(interactions.offsets[user], interactions.offsets[user + 1])
        sequence = interactions.items[span][known[span]]
        for late in range(len(sequence)):
            for early in range(max(0, late - 10), late):
                counts[sequence[early], sequence[late]] += 1 / (late - early)
                counts[sequence[late], sequence[early]] += 0.25 / (late - early)
    np.fill_diagonal(counts, 0)
    counts = counts / popularity[:, None] ** 0.5 / popularity[None, :] ** 0.25
    expected = np.zeros((len(cases.users), items))
    for row, (user, cut) in enumerate(zip(cases.users, cases.cuts, strict=True)):
        history = interactions.items[interactions.offsets[user] : cut][::-1][:10]
        for distance, item in enumerate(history, start=1):
            expected[row] += counts[item] / distance
    np.testing.assert_allclose(
        scores_of(baselines.cooccurrence(interactions, split, cases, Counting()), 60), expected, rtol=1e-4
    )


def test_targets_of_the_evaluated_cases_change_no_baseline() -> None:
    interactions, split = random_interactions(5)
    changed = interactions.items.copy()
    changed[split.test.cuts] = (changed[split.test.cuts] + 1) % len(split.cold)
    other = type(interactions)(**{**vars(interactions), "items": changed})
    makers = (
        baselines.popular,
        lambda *given: baselines.recent_popular(*given, days=30),
        lambda *of: baselines.cooccurrence(*of, Counting()),
    )
    for make in makers:
        first, second = (scores_of(make(data, split, split.test), 60) for data in (interactions, other))
        np.testing.assert_array_equal(first, second)


def test_a_sample_of_the_validation_cases_counts_no_validation_target() -> None:
    interactions, split = random_interactions(7)
    few = type(split.valid)(users=split.valid.users[:3], cuts=split.valid.cuts[:3])
    np.testing.assert_array_equal(baselines.known_events(interactions, split, few), split.train)
