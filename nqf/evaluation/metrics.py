"""HR, NDCG and MRR of single-target rankings, and bootstrap intervals over users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Resampled values held at a time; bounds the memory of the bootstrap whatever the number of users.
_BLOCK = 4_000_000
LEVEL = 0.95


def hit_rate(ranks_N: np.ndarray, k: int) -> np.ndarray:
    """Whether each target stands among the first `k`, float64 [N]; with one target this is recall, too."""
    return (np.asarray(ranks_N) <= k).astype(np.float64)


def ndcg(ranks_N: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(1 + rank) where the rank is at most `k`, else 0; float64 [N].

    With one relevant item the ideal gain is 1 (Jarvelin and Kekalainen 2002). Half ranks, which ties give, use the same
    formula.
    """
    ranks_N = np.asarray(ranks_N, np.float64)
    return np.where(ranks_N <= k, 1.0 / np.log2(1.0 + ranks_N), 0.0)


def mrr(ranks_N: np.ndarray) -> np.ndarray:
    """1 / rank, float64 [N], without a cut-off."""
    return 1.0 / np.asarray(ranks_N, np.float64)


def per_user(ranks_N: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every user: `hr@K`, `ndcg@K` and `mrr`, each float64 [N]."""
    metrics = {f"hr@{k}": hit_rate(ranks_N, k) for k in ks}
    metrics |= {f"ndcg@{k}": ndcg(ranks_N, k) for k in ks}
    return metrics | {"mrr": mrr(ranks_N)}


def summarize(
    ranks_N: np.ndarray, ks: Sequence[int], *, bootstrap: int = 1_000, seed: int = 0
) -> dict[str, list[float]]:
    """Means over users with their 95 % intervals.

    Args:
      ranks_N: Expected ranks, float [N].
      ks: Cut-offs.
      bootstrap: Resamples; 0 gives intervals of zero width.
      seed: Seed of the resampling.

    Returns:
      Metric name to [mean, low, high].

    Raises:
      ValueError: There are no users.
    """
    return mean_intervals(per_user(ranks_N, ks), bootstrap=bootstrap, seed=seed)


def paired_difference(
    ranks_a_N: np.ndarray, ranks_b_N: np.ndarray, ks: Sequence[int], *, bootstrap: int = 1_000, seed: int = 0
) -> dict[str, list[float]]:
    """Mean of a - b per metric with the 95 % interval of the paired bootstrap: the same users are drawn for both.

    Args:
      ranks_a_N: Ranks of the first model.
      ranks_b_N: Ranks of the second model for the same users in the same order.
      ks: Cut-offs.
      bootstrap: Resamples.
      seed: Seed of the resampling.

    Returns:
      Metric name to [difference, low, high].

    Raises:
      ValueError: The numbers of users differ, or there are none.
    """
    if np.shape(ranks_a_N) != np.shape(ranks_b_N):
        raise ValueError(f"{len(ranks_a_N)} and {len(ranks_b_N)} users; a paired difference needs the same users")
    first, second = per_user(ranks_a_N, ks), per_user(ranks_b_N, ks)
    return mean_intervals({name: first[name] - second[name] for name in first}, bootstrap=bootstrap, seed=seed)


def mean_intervals(values: Mapping[str, np.ndarray], *, bootstrap: int, seed: int) -> dict[str, list[float]]:
    """Means with percentile bootstrap intervals (Efron and Tibshirani 1993, ch. 13), users resampled.

    Args:
      values: Name to float64 [N], the same users in all.
      bootstrap: Resamples.
      seed: Seed of the resampling.

    Returns:
      Name to [mean, low, high].

    Raises:
      ValueError: There are no users.
    """
    values_NxM = np.stack(list(values.values()), axis=1)
    users = len(values_NxM)
    if users == 0:
        raise ValueError("no users to average over; the split or the segment is empty")
    means_M = values_NxM.mean(axis=0)
    if bootstrap == 0:
        return {name: [float(mean)] * 3 for name, mean in zip(values, means_M, strict=True)}
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // users)
    resampled = []
    for start in range(0, bootstrap, block):
        count = min(block, bootstrap - start)
        drawn = generator.integers(0, users, size=(count, users), dtype=np.int64)
        drawn += np.arange(count)[:, None] * users
        weights_RxN = np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users)
        resampled.append(weights_RxN.astype(np.float64) @ values_NxM / users)
    tail = (1 - LEVEL) / 2
    low_M, high_M = np.quantile(np.concatenate(resampled), [tail, 1 - tail], axis=0)
    return {
        name: [float(mean), float(low), float(high)]
        for name, mean, low, high in zip(values, means_M, low_M, high_M, strict=True)
    }
