"""Metrics against ir-measures and by hand; the bootstrap against its theory."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nqf.evaluation import metrics
from nqf.evaluation.ranking import ranks_from_scores

KS = (1, 5, 10)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), items=st.integers(2, 30), users=st.integers(1, 6))
def test_metrics_equal_ir_measures(seed: int, items: int, users: int) -> None:
    rng = np.random.default_rng(seed)
    # ir-measures breaks ties by document name, so this comparison is without ties; ties are checked by hand below.
    scores = rng.permuted(np.tile(np.arange(items, dtype=np.float64), (users, 1)), axis=1)
    targets = rng.integers(0, items, users)
    relevance = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets)]
    run = [
        ir_measures.ScoredDoc(str(user), str(item), float(scores[user, item]))
        for user in range(users)
        for item in range(items)
    ]
    names = {f"hr@{k}": ir_measures.Success @ k for k in KS} | {f"ndcg@{k}": ir_measures.nDCG @ k for k in KS}
    names["mrr"] = ir_measures.RR
    expected = ir_measures.calc_aggregate(list(names.values()), relevance, run)
    found = metrics.summarize(ranks_from_scores(scores, targets), KS, bootstrap=0)
    assert set(found) == set(names)
    for name, measure in names.items():
        assert found[name][0] == pytest.approx(expected[measure], abs=1e-12), name


def test_metrics_by_hand_with_half_ranks() -> None:
    ranks = np.array([1.0, 2.5, 5.5, 10.0])
    found = metrics.summarize(ranks, (5,), bootstrap=0)
    assert found["hr@5"] == [0.5] * 3
    assert found["ndcg@5"][0] == pytest.approx((1 + 1 / np.log2(3.5)) / 4)
    assert found["mrr"][0] == pytest.approx((1 + 1 / 2.5 + 1 / 5.5 + 0.1) / 4)


def test_interval_agrees_with_the_normal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(2_000) < 0.3
    ranks = np.where(values, 1.0, 100.0)
    mean, low, high = metrics.summarize(ranks, (10,), bootstrap=2_000, seed=3)["hr@10"]
    half = 1.96 * np.sqrt(mean * (1 - mean) / len(ranks))
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    # Cutting the resamples into blocks changes nothing.
    monkeypatch.setattr(metrics, "_BLOCK", 7_000)
    assert metrics.summarize(ranks, (10,), bootstrap=2_000, seed=3)["hr@10"] == [mean, low, high]


def test_paired_interval_is_narrower_than_the_difference_of_intervals() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 60, 1_500).astype(float)
    better = np.where(rng.random(1_500) < 0.1, np.maximum(1, ranks - 20), ranks)
    gain, low, high = metrics.paired_difference(better, ranks, (10,), seed=1)["hr@10"]
    one, other = (metrics.summarize(r, (10,), seed=1)["hr@10"] for r in (better, ranks))
    assert gain == pytest.approx(one[0] - other[0])
    assert 0 < low < gain < high
    assert high - low < 0.6 * (one[2] - one[1] + other[2] - other[1])


def test_no_users_and_unequal_users_are_refused() -> None:
    with pytest.raises(ValueError, match="no users"):
        metrics.summarize(np.array([]), (10,))
    with pytest.raises(ValueError, match="same users"):
        metrics.paired_difference(np.ones(2), np.ones(3), (10,))
