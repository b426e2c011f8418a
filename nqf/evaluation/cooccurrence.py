"""Which items occur near each other in sequences: a baseline, and a memory beside the vectors of trained models.

A factorized model recalls a pair of items that one user chose in a row about as often as its width allows; a table of
pairs recalls all of them. Letters: B histories, H newest items, I items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import scipy.sparse

from nqf.data.interactions import Interactions
from nqf.data.splits import Cases

WINDOW = 10
"""Newest items of a history that count, and places over which a pair counts."""
# The share and the powers were chosen on the validation cases of amazon-beauty, ml-1m, ml-100k and goodbooks together.
_BACKWARD = 0.25
_DAMP_HISTORY = 0.5
_DAMP_CANDIDATE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cooccurrence:
    """Damped counts of pairs.

    Attributes:
      pairs: float32 [I, I], sparse; row: an item of the history, column: a candidate.
    """

    pairs: scipy.sparse.csr_matrix

    def scores(self, newest_BxH: np.ndarray) -> scipy.sparse.csr_matrix:
        """Sums over the newest history items, each weighed by 1 / its distance to the next: float32 [B, I], sparse.

        Args:
          newest_BxH: int, the newest item first, -1 for none; H is at most `WINDOW`.
        """
        row, column = np.nonzero(newest_BxH >= 0)
        weights = (1 / (1 + column)).astype(np.float32)
        # What is inferred of scipy, which has no annotations, may be None.
        items, _ = cast(tuple[int, int], self.pairs.shape)
        shape = len(newest_BxH), items
        return scipy.sparse.csr_matrix((weights, (row, newest_BxH[row, column])), shape=shape) @ self.pairs


def count_pairs(interactions: Interactions, counted: np.ndarray, items: int) -> Cooccurrence:
    """Counts pairs in every user's sequence.

    An item counts 1 / distance for each of the `WINDOW` before it, and a share of that backward. The counts are divided
    by powers of both items' popularity.

    Args:
      interactions: All interactions.
      counted: bool [events], which of them count; the others are as if they had never been.
      items: I.
    """
    events = np.flatnonzero(counted)
    user_of, item_of = interactions.users[events], interactions.items[events]
    followed = scipy.sparse.csr_matrix((items, items), dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        same = user_of[distance:] == user_of[:-distance]
        pairs = item_of[:-distance][same], item_of[distance:][same]
        weights = np.full(len(pairs[0]), 1 / distance, np.float32)
        followed += scipy.sparse.csr_matrix((weights, pairs), shape=(items, items))
    counts = followed + _BACKWARD * followed.T
    counts.setdiag(0)
    popularity = np.maximum(np.bincount(item_of, minlength=items), 1).astype(np.float32)
    damped = scipy.sparse.diags(popularity**-_DAMP_HISTORY) @ counts @ scipy.sparse.diags(popularity**-_DAMP_CANDIDATE)
    return Cooccurrence(pairs=damped.tocsr().astype(np.float32))


def newest_of_cases(interactions: Interactions, cases: Cases, rows: np.ndarray) -> np.ndarray:
    """The newest items before each target, int [B, WINDOW], the newest first, -1 for none."""
    at_BxH = cases.cuts[rows, None] - np.arange(1, WINDOW + 1)
    inside_BxH = at_BxH >= interactions.offsets[cases.users[rows], None]
    return np.where(inside_BxH, interactions.items[np.maximum(at_BxH, 0)], -1)


def add_cooccurrence(
    users_NxD: np.ndarray,
    items_IxD: np.ndarray,
    weight: float,
    memory: Cooccurrence,
    interactions: Interactions,
    cases: Cases,
) -> Callable[[np.ndarray], np.ndarray]:
    """Inner products plus `weight` times the co-occurrence: a function from case rows int [B] to scores [B, I]."""

    def score(rows: np.ndarray) -> np.ndarray:
        pairs_BxI = memory.scores(newest_of_cases(interactions, cases, rows)).toarray()
        return users_NxD[rows] @ items_IxD.T + weight * pairs_BxI

    return score
