"""Counted pairs as short vectors, so that an index of dense vectors alone ranks nearly as the pairs do.

Letters: B histories, H newest items, N items, F rank.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import scipy.sparse.linalg

from nqf.evaluation.cooccurrence import Cooccurrence, Counting

RANK = 256
"""Most values of an item. Alone, ranks of 64, 128, 256 and 512 keep 63, 79, 87 and 94 % of the NDCG@10 of the pairs on
validation cases of amazon-beauty (12,101 items), and 98, 97, 96 and 96 % on those of ml-100k (1,682); beside learned
vectors they differ less (docs/dense-vectors.md). All validation cases of amazon-beauty had .0775 with 128, .0779 so."""
# Values of one table at most: 256 MiB; while it is computed, ARPACK has twice as many at hand.
_VALUES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PairFactors:
    """Two vectors of every item, whose inner product is near what the first adds to the score of the second.

    Attributes:
      history: float32 [N, F], of an item in a history.
      candidate: float32 [N, F], of an item to be scored.
      how: How the pairs were counted.
    """

    history: np.ndarray
    candidate: np.ndarray
    how: Counting

    def users(self, newest_BxH: np.ndarray) -> np.ndarray:
        """Sums over the newest history items, older ones weighing less: float32 [B, F].

        Args:
          newest_BxH: int, the newest item first, -1 for none; H is at most `how.newest`.
        """
        total = np.zeros((len(newest_BxH), self.history.shape[1]), np.float32)
        for weight, items in zip(self.how.weights, newest_BxH.T, strict=False):
            total += weight * np.where(items[:, None] >= 0, self.history[np.maximum(items, 0)], 0)
        return total

    def scores(self, newest_BxH: np.ndarray) -> np.ndarray:
        """What `Cooccurrence.scores` gives, nearly: float32 [B, N]."""
        return self.users(newest_BxH) @ self.candidate.T


def factorize(memory: Cooccurrence, rank: int = RANK) -> PairFactors:
    """The truncated singular value decomposition of counted pairs, half of each singular value on either side.

    Levy and Goldberg (2014) make word vectors so. What stands in for items without a count does so in the vectors, too.

    Args:
      memory: The pairs.
      rank: F at most; less where there are fewer items or so many that a table would have more than 2^26 values.
    """
    items, _ = cast(tuple[int, int], memory.pairs.shape)
    rank = min(rank, items - 1, _VALUES // max(1, items))
    if rank < 1 or not memory.pairs.nnz:
        count, _ = cast(tuple[int, int], (memory.pairs if memory.counts_as is None else memory.counts_as).shape)
        nothing = np.zeros((count, 0), np.float32)
        return PairFactors(history=nothing, candidate=nothing, how=memory.how)
    if 2 * rank < items:
        # A start that is given makes the same factors each time.
        found = scipy.sparse.linalg.svds(memory.pairs, rank, v0=np.ones(items, np.float32))
        # What is inferred of scipy, which has no annotations, may be None.
        left, values, right = cast(tuple[np.ndarray, np.ndarray, np.ndarray], found)
    else:
        # Of nearly all values, the dense decomposition is both sooner and safer.
        left, values, right = np.linalg.svd(memory.pairs.toarray(), full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    half = np.sqrt(np.maximum(values, 0))
    history, candidate = left * half, right.T * half
    if memory.counts_as is not None:
        history, candidate = memory.counts_as @ history, memory.counts_as @ candidate
    return PairFactors(
        history=np.asarray(history, np.float32), candidate=np.asarray(candidate, np.float32), how=memory.how
    )
