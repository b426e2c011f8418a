"""What is chosen beside an item, as a field of the item: the fields of the items that occur near it in histories.

A table of pairs recalls what a factorized model of the same events does not, and a mean of content carries over to
items that look alike. Letters: I items, K neighbors, F width, T width of texts.
"""

from __future__ import annotations

import numpy as np

from nqf.data.interactions import Interactions
from nqf.evaluation.cooccurrence import Counting, count_pairs, nearest_by_text

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


def neighbor_features(
    features_IxF: np.ndarray, neighbors_IxK: np.ndarray, weights_IxK: np.ndarray, text_IxT: np.ndarray
) -> np.ndarray:
    """Means of the neighbors' features, float16 [I, F]; an item without neighbors has those of items of like texts.

    Args:
      features_IxF: What is averaged, any float dtype.
      neighbors_IxK: From `find_neighbors`.
      weights_IxK: Likewise.
      text_IxT: Text vectors, unit rows, zero where there is none.
    """
    means = np.zeros(features_IxF.shape, np.float32)
    for neighbors, weights in zip(neighbors_IxK.T, weights_IxK.T, strict=True):
        means += weights[:, None] * features_IxF[np.maximum(neighbors, 0)].astype(np.float32)
    means = means.astype(np.float16)
    own = neighbors_IxK[:, 0] >= 0
    means[~own] = features_by_text(text_IxT[~own], means, own, text_IxT)
    return means


def features_by_text(
    text_nxT: np.ndarray, means_IxF: np.ndarray, own_I: np.ndarray, text_IxT: np.ndarray
) -> np.ndarray:
    """Neighbor features of items that have no neighbors, float16 [n, F]; zero where there is no text to go by.

    Args:
      text_nxT: Their texts, unit rows, zero where there is none.
      means_IxF: Neighbor features of known items.
      own_I: bool, which of these have neighbors.
      text_IxT: Their texts.
    """
    found = np.zeros((len(text_nxT), means_IxF.shape[1]), np.float16)
    known, there = np.flatnonzero(own_I & np.any(text_IxT != 0, axis=1)), np.any(text_nxT != 0, axis=1)
    if len(known) and there.any():
        weights, rows = nearest_by_text(text_nxT[there], text_IxT[known], COUNT)
        means = means_IxF[known[rows]].astype(np.float32)
        found[there] = np.einsum("nk,nkf->nf", weights, means).astype(np.float16)
    return found
