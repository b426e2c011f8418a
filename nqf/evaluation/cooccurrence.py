"""Which items occur near each other in sequences: a baseline, and a memory beside the vectors of trained models.

A factorized model recalls a pair of items that one user chose in a row about as often as its width allows; a table of
pairs recalls all of them. How pairs count best differs from data to data by half of the NDCG, so it is chosen on the
validation cases (`nqf.evaluation.choice`). Letters: B histories, H newest items, I items.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, cast

import numpy as np
import scipy.sparse

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.splits import Cases
from nqf.fields.encoder import unit_rows

# Of the texts of a history: what each newer item takes off an older one's weight, and how many count.
_TEXT_RECENCY = 0.6
_TEXT_NEWEST = 10
_STAND_IN_TEMPERATURE = 0.05
# Pairs that are in memory before they are added up.
_PAIRS = 2**24
# Items without a count that are compared with all others at a time.
_ROWS = 1_024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting:
    """How pairs of items count: the attributes of `nqf.config.CountingConfig`, none of them left to be chosen.

    Attributes:
      stand_ins: Items, nearest by text, whose counts stand in for those of an item that has none; 0 for none.
    """

    window: int = 10
    decay: float = 0.0
    backward: float = 0.25
    ties: Literal["sequence", "set"] = "sequence"
    damp_history: float = 0.5
    damp_candidate: float = 0.25
    scale: float = 0.0
    newest: int = 10
    recency: float = 0.0
    stand_ins: int = 0

    @property
    def weights(self) -> np.ndarray:
        """Weight of each of the newest items, the newest first, float32 [newest]."""
        return _falling(np.arange(1, self.newest + 1), self.recency)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cooccurrence:
    """Damped counts of pairs.

    Attributes:
      pairs: float32 [I, I], sparse; row: an item of the history, column: a candidate.
      how: How they were counted.
      counts_as: float32 [N, I], sparse, the items whose counts each of N items has: its own, or a mean of others'. None
        if N is I and each has its own.
    """

    pairs: scipy.sparse.csr_matrix
    how: Counting
    counts_as: scipy.sparse.csr_matrix | None = None

    def scores(self, newest_BxH: np.ndarray) -> scipy.sparse.csr_matrix:
        """Sums over the newest history items, older ones weighing less: float32 [B, N], sparse.

        Args:
          newest_BxH: int, the newest item first, -1 for none; H is at most `how.newest`.
        """
        row, column = np.nonzero(newest_BxH >= 0)
        # What is inferred of scipy, which has no annotations, may be None.
        items, _ = cast(tuple[int, int], (self.pairs if self.counts_as is None else self.counts_as).shape)
        weights = self.how.weights[column], (row, newest_BxH[row, column])
        found = scipy.sparse.csr_matrix(weights, shape=(len(newest_BxH), items))
        if self.counts_as is None:
            return found @ self.pairs
        return found @ self.counts_as @ self.pairs @ self._counted_for

    @functools.cached_property
    def _counted_for(self) -> scipy.sparse.csr_matrix:
        # Kept, as every product would turn it again, which takes as long as the catalogue is large.
        assert self.counts_as is not None
        return self.counts_as.T.tocsr()

    def raises(self, history_H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of `scores` of one history, but for rounding, without what a product of sparse matrices costs.

        Args:
          history_H: int, item rows, oldest first.

        Returns:
          Items whose score is not zero, ascending, and the scores, float32.
        """
        newest = history_H[::-1][: self.how.newest]
        found = newest, self.how.weights[: len(newest)]
        if self.counts_as is None:
            return _row_times(*found, self.pairs)
        rows, scores = _row_times(*_row_times(*found, self.counts_as), self.pairs)
        items, counted = cast(tuple[int, int], self.counts_as.shape)
        if 64 * len(rows) < items:
            return _row_times(rows, scores, self._counted_for)
        # Of so many, all items' scores are sooner at hand than sorted entries.
        total = np.zeros(counted, np.float32)
        total[rows] = scores
        total = self.counts_as @ total
        found = np.flatnonzero(total)
        return found, total[found]

    def all_pairs(self) -> scipy.sparse.csr_matrix:
        """The pairs of all N items, float32 [N, N], sparse: larger than both of its parts."""
        return self.pairs if self.counts_as is None else (self.counts_as @ self.pairs @ self._counted_for).tocsr()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NearPairs:
    """Weighted pairs of items, before damping.

    Attributes:
      followed: An item and a later one, float32 [I, I], sparse.
      together: Items of one moment, symmetric, float32 [I, I], sparse.
      popularity: Number of events of every item, at least 1, float32 [I].
    """

    followed: scipy.sparse.csr_matrix
    together: scipy.sparse.csr_matrix
    popularity: np.ndarray


def count_pairs(interactions: Interactions, counted: np.ndarray, items: int, how: Counting) -> Cooccurrence:
    """Counts pairs in every user's sequence and divides them by powers of both items' popularity.

    Args:
      interactions: All interactions.
      counted: bool [events], which of them count; the others are as if they had never been.
      items: I.
      how: How they count.
    """
    return damp(near_pairs(interactions, counted, items, how), how)


def damp(near: NearPairs, how: Counting) -> Cooccurrence:
    """Damped counts of pairs."""
    counts = near.followed + how.backward * near.followed.T + near.together
    counts.setdiag(0)
    history, candidate = near.popularity**-how.damp_history, near.popularity**-how.damp_candidate
    damped = (scipy.sparse.diags(history) @ counts @ scipy.sparse.diags(candidate)).tocsr().astype(np.float32)
    if how.scale:
        damped.data = np.log1p(damped.data / how.scale)
    damped.eliminate_zeros()
    return Cooccurrence(pairs=damped, how=how)


def near_pairs(interactions: Interactions, counted: np.ndarray, items: int, how: Counting) -> NearPairs:
    """Pairs of items that are near each other in a user's sequence; of `how`, window, decay and ties count.

    The distance of items of two moments is one more than the number of events between these moments, so that the order
    inside of a moment does not matter. Without sets every event is a moment of its own.
    """
    events = np.flatnonzero(counted)
    user_of, item_of, times = interactions.users[events], interactions.items[events], interactions.times[events]
    begins = np.ones(len(events), bool)
    if how.ties == "set":
        begins[1:] = (user_of[1:] != user_of[:-1]) | (times[1:] != times[:-1]) | (times[1:] == MISSING_TIME)
    moment = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(events)) - 1
    followed, together = _PairSum(items), _PairSum(items)
    # Of moments of more events than the window, the farthest events are left out.
    for shift in range(1, how.window * (2 if how.ties == "set" else 1) + 1):
        earlier = np.flatnonzero(user_of[shift:] == user_of[:-shift])
        later = earlier + shift
        same = moment[earlier] == moment[later]
        distance = np.where(same, 1, first[moment[later]] - last[moment[earlier]])
        for sums, kept in ((followed, ~same & (distance <= how.window)), (together, same)):
            sums.add(item_of[earlier[kept]], item_of[later[kept]], _falling(distance[kept], how.decay))
    same_moment = together.total()
    return NearPairs(
        followed=followed.total(),
        together=same_moment + same_moment.T,
        popularity=np.maximum(np.bincount(item_of, minlength=items), 1).astype(np.float32),
    )


class _PairSum:
    """Adds up weights of pairs of items; beside the sum, `_PAIRS` and those of one call are in memory at most."""

    def __init__(self, items: int):
        self._sum = scipy.sparse.csr_matrix((items, items), dtype=np.float32)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pairs = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Adds int32 [n] rows and columns with float32 [n] weights."""
        self._parts.append((rows, columns, weights))
        self._pairs += len(rows)
        if self._pairs > _PAIRS:
            self.total()

    def total(self) -> scipy.sparse.csr_matrix:
        """What was added so far, float32 [items, items]."""
        if self._parts:
            rows, columns, weights = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
            self._sum = self._sum + scipy.sparse.csr_matrix((weights, (rows, columns)), shape=self._sum.shape)
            self._parts, self._pairs = [], 0
        return self._sum


def stand_in(
    memory: Cooccurrence, text_NxT: np.ndarray, before: tuple[np.ndarray, scipy.sparse.csr_matrix | None] | None = None
) -> Cooccurrence:
    """Lets items without a count take those of the items whose texts are nearest.

    Counts push what has none down, however well its text fits. A mean of ten neighbors' counts, weighed by the softmax
    of their cosines over 0.05, gave new items of amazon-beauty (a tenth, drawn) an HR@10 of .088 in place of .034 on
    validation cases, at .1260 in place of .1272 on the others.

    Args:
      memory: Counts of the first I items.
      text_NxT: Text vectors of all items, unit rows, zero where there is none; N is at least I.
      before: Texts and `counts_as` of the same counts and fewer or other items; whose text is the same is not compared
        with all others again.
    """
    count, (items, _) = len(text_NxT), cast(tuple[int, int], memory.pairs.shape)
    counted = np.diff(memory.pairs.indptr) + np.bincount(memory.pairs.indices, minlength=items) > 0
    there = np.any(text_NxT != 0, axis=1)
    known, wanting = np.flatnonzero(counted & there[:items]), there.copy()
    wanting[:items] &= ~counted
    near = min(memory.how.stand_ins, len(known))
    wanting &= near > 0
    own = np.flatnonzero(~wanting[:items])
    # Weights, items, and whose counts they have.
    parts = [(np.ones(len(own), np.float32), own, own)]
    if before is not None and before[1] is not None:
        size = min(count, len(before[0]))
        same = np.flatnonzero(wanting[:size] & (text_NxT[:size] == before[0][:size]).all(axis=1))
        kept = before[1][same].tocoo()
        parts.append((kept.data, same[kept.row], kept.col))
        wanting[same] = False
    new = np.flatnonzero(wanting)
    for start in range(0, len(new), _ROWS):
        rows = new[start : start + _ROWS]
        cosine = text_NxT[rows] @ text_NxT[known].T
        best = np.argpartition(-cosine, near - 1, axis=1)[:, :near]
        cosine = np.take_along_axis(cosine, best, axis=1)
        weight = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / _STAND_IN_TEMPERATURE)
        weight /= weight.sum(axis=1, keepdims=True)
        parts.append((weight.astype(np.float32).ravel(), np.repeat(rows, near), known[best].ravel()))
    weights, rows, columns = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts_as = scipy.sparse.csr_matrix((weights, (rows, columns)), shape=(count, items))
    return dataclasses.replace(memory, counts_as=counts_as)


def _row_times(
    columns: np.ndarray, weights: np.ndarray, matrix: scipy.sparse.csr_matrix
) -> tuple[np.ndarray, np.ndarray]:
    """A sparse row, in which a column may come twice, times a matrix: int64 columns that are not zero, and float32."""
    starts = matrix.indptr[columns].astype(np.int64)
    lengths = matrix.indptr[columns + 1] - starts
    at = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    # No array of all items, which would take longer than all else among a million.
    reached, place = np.unique(matrix.indices[at], return_inverse=True)
    total = np.bincount(place, np.repeat(weights, lengths) * matrix.data[at], len(reached)).astype(np.float32)
    return reached[total != 0].astype(np.int64), total[total != 0]


def _falling(distance: np.ndarray, decay: float) -> np.ndarray:
    return (decay ** (distance - 1) if decay else 1 / distance).astype(np.float32)


def newest_of_cases(interactions: Interactions, cases: Cases, rows: np.ndarray, count: int) -> np.ndarray:
    """The `count` newest items before each target, int [B, count], the newest first, -1 for none."""
    at_BxH = cases.cuts[rows, None] - np.arange(1, count + 1)
    inside_BxH = at_BxH >= interactions.offsets[cases.users[rows], None]
    return np.where(inside_BxH, interactions.items[np.maximum(at_BxH, 0)], -1)


def recent_text(interactions: Interactions, cases: Cases, rows: np.ndarray, text_IxT: np.ndarray) -> np.ndarray:
    """Direction of the newest items' texts, older ones weighing exponentially less: float32 [B, T]."""
    newest_BxH = newest_of_cases(interactions, cases, rows, _TEXT_NEWEST)
    total = np.zeros((len(rows), text_IxT.shape[1]), np.float32)
    for place, items in enumerate(newest_BxH.T):
        total += _TEXT_RECENCY**place * np.where(items[:, None] >= 0, text_IxT[np.maximum(items, 0)], 0)
    return unit_rows(total)


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
        pairs_BxI = memory.scores(newest_of_cases(interactions, cases, rows, memory.how.newest)).toarray()
        return users_NxD[rows] @ items_IxD.T + weight * pairs_BxI

    return score
