"""What a batch and the item tables are: arrays with names, on the host and on the device alike.

Letters: B users or pairs, N history slots, P supervised positions, Q item tokens, I items, R rows, D and E widths.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np
from flax import struct

Array: TypeAlias = Any
"""An array of either kind: numpy's on the host, jax's in a compiled step. What takes such an array takes both, and a
union of the two types has no operation that type checkers know for both."""

RATING_BUCKETS = 12


class History(struct.PyTreeNode):
    """Slots of a batch of histories, oldest to newest; padding stands before the oldest.

    Attributes:
      items: int32 [B, N], row of the item, -1 in padding.
      calendar: int32 [B, N, 3], hour of day (0-23), day of week (0-6), month (0-11) in UTC; -1 where unknown.
      age: int32 [B, N], seconds from the slot's time to the newest slot's; -1 where unknown.
      ratings: int32 [B, N], rating bucket 0..RATING_BUCKETS-1, -1 where unknown.
      reviews: float [B, N, R] embedding of the review; R may be 0.
      has_review: bool [B, N].
    """

    items: Array
    calendar: Array
    age: Array
    ratings: Array
    reviews: Array
    has_review: Array


class ItemTables(struct.PyTreeNode):
    """What the user and joint stages know of items; rows are items.

    Attributes:
      tokens: Item query tokens, float [I, Q, E].
      vectors: Item vectors of the Item Q-Former, float [I, E].
      fields: Whitened field vectors beside each other, float [I, F]; F may be 0.
      neighbors: Means of those of the items that occur near it in histories, float [I, F]; F may be 0.
      text: Frozen text embeddings, float [I, T]; zero rows where `has_text` is False.
      has_text: bool [I].
      trained: bool [I], whether the item is in a training event.
      titles: Token ids of the titles, int32 [I, S], -1 in padding; S may be 0.
    """

    tokens: Array
    vectors: Array
    fields: Array
    neighbors: Array
    text: Array
    has_text: Array
    trained: Array
    titles: Array

    def take(self, rows: Array) -> ItemTables:
        """The tables of some rows, in that order."""
        return jax.tree.map(lambda table: table[rows], self)


class HistoryBatch(struct.PyTreeNode):
    """One training batch.

    Attributes:
      history: The slots; `history.items` index `rows` where that is given, else the catalogue.
      targets: int32 [B, P], the item after each of the newest P slots in the same numbering, -1 for none.
      supervised: int32 [M], the places in `targets.ravel()` that hold a target, -1 in padding. A loss over them alone
        does not score the positions of short histories that have none.
      rows: int32 [R] catalogue rows of the batch's distinct items, -1 in padding; None if items are numbered by
        the catalogue.
      negatives: int32 [S], sampled negatives in the same numbering; None without sampling.
      given: int32 [B, P, K], further negatives of each target alone, -1 for none; None without such.
      tables: Gathered tables of `rows`; None if the tables are on the device.
    """

    history: History
    targets: Array
    supervised: Array
    rows: Array | None = None
    negatives: Array | None = None
    given: Array | None = None
    tables: ItemTables | None = None

    def items(self) -> np.ndarray:
        """Catalogue rows of the batch's items, int32; -1 in padding."""
        if self.rows is not None:
            return self.rows
        return np.concatenate([self.history.items.ravel(), self.targets.ravel()])


class PairBatch(struct.PyTreeNode):
    """One training batch of the item stage; all items are catalogue rows.

    Attributes:
      anchors: int32 [B], item t of a user.
      positives: int32 [B], item t + 1 of the same user.
      negatives: int32 [B], items that the user met in no training event.
      catalogue: int32 [B], items drawn evenly from those that may be trained on.
      known: bool [B, B], True where `positives` of column j is among the items of row i's user.
      values: Field name to float [B, 4, W], gathered for the four lists in that order; None on-device.
      present: Field name to bool [B, 4]; None on-device.
    """

    anchors: Array
    positives: Array
    negatives: Array
    catalogue: Array
    known: Array
    values: dict[str, Array] | None = None
    present: dict[str, Array] | None = None

    def items(self) -> np.ndarray:
        """The four lists side by side, int32 [B, 4]."""
        return np.stack([self.anchors, self.positives, self.negatives, self.catalogue], axis=1)
