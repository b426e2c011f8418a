"""Segments partition the users; what is recommended is counted."""

import numpy as np

from nqf.evaluation.segments import describe_recommended, segment_users


def test_segments_partition_the_users() -> None:
    rng = np.random.default_rng(0)
    counts = np.concatenate([np.zeros(7, int), rng.integers(1, 90, 43)])
    lengths = rng.integers(0, 80, 400)
    targets = rng.integers(0, 50, 400)
    segments = segment_users(lengths_N=lengths, targets_N=targets, cold_I=counts == 0, counts_I=counts)
    for prefix, users in (("history", 400), ("popularity decile", int((counts[targets] > 0).sum()))):
        parts = [inside for name, inside in segments.items() if name.startswith(prefix)]
        assert np.sum(parts, axis=0).max() == 1 and np.sum(parts) == users
    assert (segments["warm"] ^ segments["cold"]).all() and segments["all"].all()
    np.testing.assert_array_equal(segments["cold"], counts[targets] == 0)
    np.testing.assert_array_equal(segments["history 6-10"], (lengths >= 6) & (lengths <= 10))
    np.testing.assert_array_equal(segments["history 51+"], lengths > 50)


def test_deciles_have_equal_numbers_of_warm_items_in_order_of_popularity() -> None:
    counts = np.array([0, *range(30, 0, -1)])
    segments = segment_users(lengths_N=np.full(31, 3), targets_N=np.arange(31), cold_I=counts == 0, counts_I=counts)
    for decile in range(1, 11):
        expected = (counts > 3 * (decile - 1)) & (counts <= 3 * decile)
        np.testing.assert_array_equal(segments[f"popularity decile {decile}"], expected)
    assert "history 6-10" not in segments


def test_recommended() -> None:
    about = describe_recommended(np.array([[0, 1], [0, -1]]), np.array([10, 4, 7, 0]))
    assert about == {"coverage@2": 0.5, "popularity@2": 8.0}
