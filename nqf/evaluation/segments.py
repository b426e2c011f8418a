"""Segments of the evaluated users, and what is recommended to them as a whole."""

from __future__ import annotations

import numpy as np

# Upper ends of the history-length buckets; the last bucket is open.
_LENGTHS = (5, 10, 20, 50)
DECILES = 10


def segment_users(
    *, lengths_N: np.ndarray, targets_N: np.ndarray, cold_I: np.ndarray, counts_I: np.ndarray
) -> dict[str, np.ndarray]:
    """Splits users by what their target is and by how much is known of them.

    Popularity deciles have equal numbers of warm items, decile 1 the least popular; an item in no training event has
    none.

    Args:
      lengths_N: Length of each history.
      targets_N: Row of each target.
      cold_I: bool, True for items in no training event.
      counts_I: Training events per item.

    Returns:
      Segment name to bool [N], empty segments left out: `all`, `warm`, `cold`, `history 1-5` ..., `popularity decile 1`
      ....
    """
    cold_N = cold_I[targets_N]
    segments = {"all": np.ones(len(targets_N), bool), "warm": ~cold_N, "cold": cold_N}
    low = 0
    for high in (*_LENGTHS, None):
        inside_N = lengths_N >= low
        if high is not None:
            inside_N &= lengths_N <= high
        # An empty history can only come from a temporal split; it stands with the shortest.
        segments[f"history {max(low, 1)}-{high}" if high else f"history {low}+"] = inside_N
        low = (high or 0) + 1
    decile_N = _deciles(cold_I, counts_I)[targets_N]
    for decile in range(1, DECILES + 1):
        segments[f"popularity decile {decile}"] = decile_N == decile
    return {name: inside_N for name, inside_N in segments.items() if inside_N.any()}


def describe_recommended(rows_NxK: np.ndarray, counts_I: np.ndarray) -> dict[str, float]:
    """Coverage and popularity of top-k lists.

    Args:
      rows_NxK: Item rows, -1 where a list is short.
      counts_I: Training events per item.

    Returns:
      `coverage@K`, the share of the catalogue that is recommended to anybody, and `popularity@K`, the mean number of
      training events of a recommended item.
    """
    k = rows_NxK.shape[1]
    rows = rows_NxK[rows_NxK >= 0]
    return {
        f"coverage@{k}": len(np.unique(rows)) / len(counts_I),
        f"popularity@{k}": float(counts_I[rows].mean()) if len(rows) else 0.0,
    }


def _deciles(cold_I: np.ndarray, counts_I: np.ndarray) -> np.ndarray:
    """Popularity decile of each item, 1 to 10; 0 for cold items."""
    warm = np.flatnonzero(~cold_I)
    order = warm[np.argsort(counts_I[warm], kind="stable")]
    deciles_I = np.zeros(len(cold_I), np.int64)
    deciles_I[order] = 1 + np.arange(len(order)) * DECILES // max(len(order), 1)
    return deciles_I
