"""Pairs of consecutive items and catalogue samples: the batches of the item stage."""

from __future__ import annotations

import dataclasses

import numpy as np

from nqf.data.interactions import Interactions
from nqf.data.splits import Split
from nqf.pipelines.batches import PairBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where pairs are drawn from.

    Attributes:
      users: int32 [pairs].
      anchors: int32 [pairs].
      positives: int32 [pairs].
      trainable: int32, items that may be trained on.
      owned: int64, sorted `user * items + item` of every training event: what a negative must not be.
      items: Number of catalogue items.
    """

    users: np.ndarray
    anchors: np.ndarray
    positives: np.ndarray
    trainable: np.ndarray
    owned: np.ndarray
    items: int

    def owns(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each user has a training event with each item; broadcasts."""
        keys = users.astype(np.int64) * self.items + items
        at = np.minimum(np.searchsorted(self.owned, keys), len(self.owned) - 1)
        return self.owned[at] == keys

    def owns_each(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each user has a training event with each item, bool [users, items].

        It looks up what the users own among the items, which is far less than users times items.
        """
        bounds = users.astype(np.int64) * self.items
        starts = np.searchsorted(self.owned, bounds)
        counts = np.searchsorted(self.owned, bounds + self.items) - starts
        rows = np.repeat(np.arange(len(users)), counts)
        at = np.arange(len(rows)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        own = self.owned[at] - bounds[rows]
        distinct, column = np.unique(items, return_inverse=True)
        place = np.minimum(np.searchsorted(distinct, own), len(distinct) - 1)
        met = distinct[place] == own
        known = np.zeros((len(users), len(distinct)), bool)
        known[rows[met], place[met]] = True
        return known[:, column]


def pair_source(interactions: Interactions, split: Split, items: int, held_out: np.ndarray) -> PairSource:
    """Consecutive training events of a user as (anchor, positive).

    Args:
      interactions: All interactions.
      split: Only its training events make pairs, and only they are spared as negatives: to spare a held-out item would
        tell that it is one.
      items: Number of catalogue items.
      held_out: bool [items]; these and items without a training event are never trained on.
    """
    allowed = ~(held_out | split.cold)
    users = np.repeat(np.arange(len(interactions.user_ids), dtype=np.int32), np.diff(interactions.offsets))
    users, trained = users[split.train], interactions.items[split.train]
    anchors, positives = trained[:-1], trained[1:]
    keep = (users[:-1] == users[1:]) & allowed[anchors] & allowed[positives] & (anchors != positives)
    return PairSource(
        users=users[:-1][keep],
        anchors=anchors[keep],
        positives=positives[keep],
        trainable=np.flatnonzero(allowed).astype(np.int32),
        owned=np.unique(users.astype(np.int64) * items + trained),
        items=items,
    )


def pair_batch(
    source: PairSource, examples: np.ndarray, rng: np.random.Generator, mine: slice = slice(None)
) -> PairBatch:
    """Draws negatives and catalogue items for a batch of pairs; returns the rows `mine` of it."""
    users, positives = source.users[examples], source.positives[examples]
    negatives = rng.choice(source.trainable, len(examples))
    # Redrawn until clean; a user who owns nearly the whole catalogue keeps a random owned item after 100 rounds.
    for _ in range(100):
        wrong = source.owns(users, negatives)
        if not wrong.any():
            break
        negatives[wrong] = rng.choice(source.trainable, int(wrong.sum()))
    return PairBatch(
        anchors=source.anchors[examples][mine],
        positives=positives[mine],
        negatives=negatives.astype(np.int32)[mine],
        catalogue=rng.choice(source.trainable, len(examples)).astype(np.int32)[mine],
        known=source.owns_each(users[mine], positives),
    )
