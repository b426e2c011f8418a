"""Histories as arrays: from interactions to the batches of the user and joint stages.

Letters: B users, N history slots, P supervised positions, R distinct items of a batch, E events.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.splits import Cases, Split
from nqf.fields.cache import FieldTable
from nqf.pipelines.batches import RATING_BUCKETS, Array, History, HistoryBatch, ItemTables


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventFeatures:
    """What is known of every interaction; memory maps, of which a batch reads its own rows.

    Attributes:
      items: int32 [E].
      times: int64 [E], unix seconds, `MISSING_TIME` where unknown.
      ratings: float32 [E], NaN where unknown.
      rated: float32 [2], the smallest and the largest rating that was trained on; empty where there is none.
      reviews: Table of review embeddings with a row per event, or None.
    """

    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    rated: np.ndarray
    reviews: FieldTable | None


def event_features(interactions: Interactions, split: Split, reviews: FieldTable | None) -> EventFeatures:
    """The features of all interactions."""
    return EventFeatures(
        items=interactions.items,
        times=interactions.times,
        ratings=interactions.ratings,
        rated=rating_range(interactions, split),
        reviews=reviews,
    )


def calendar_parts(times: np.ndarray) -> np.ndarray:
    """Hour of day, day of week (Monday 0) and month (January 0) in UTC of int64 unix seconds, int8 [..., 3]."""
    known = times != MISSING_TIME
    seconds = np.where(known, times, 0)
    days = seconds // 86_400
    months = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    # 1970-01-01 was a Thursday.
    parts = np.stack([seconds // 3_600 % 24, (days + 3) % 7, months % 12], axis=-1)
    return np.where(known[..., None], parts, -1).astype(np.int8)


def rating_range(interactions: Interactions, split: Split) -> np.ndarray:
    """The smallest and the largest rating of the training split, float32 [2]; empty where there is none."""
    known = np.isfinite(interactions.ratings) & split.train
    if not known.any():
        return np.zeros(0, np.float32)
    low = np.min(interactions.ratings, where=known, initial=np.inf)
    return np.array([low, np.max(interactions.ratings, where=known, initial=-np.inf)], np.float32)


def rating_buckets(ratings: np.ndarray, rated: np.ndarray) -> np.ndarray:
    """Buckets of ratings, int8, -1 where unknown, spread evenly over the range `rated` of `rating_range`."""
    known = np.isfinite(ratings)
    if not len(rated):
        return np.full(ratings.shape, -1, np.int8)
    low, high = map(float, rated)
    scaled = (np.where(known, ratings, low) - low) / max(high - low, 1e-9) * (RATING_BUCKETS - 1)
    return np.where(known, np.clip(np.rint(scaled), 0, RATING_BUCKETS - 1), -1).astype(np.int8)


def gather_history(features: EventFeatures, events_BxN: np.ndarray) -> History:
    """Builds the slots of a batch from event numbers, -1 in padding."""
    valid = events_BxN >= 0
    events = np.maximum(events_BxN, 0)
    times = features.times[events]
    known = valid & (times != MISSING_TIME)
    newest = np.max(np.where(known, times, np.iinfo(np.int64).min), axis=1, keepdims=True)
    # int32 holds gaps of 68 years.
    age = np.clip(np.where(known, newest - np.where(known, times, 0), 0), 0, np.iinfo(np.int32).max)
    if features.reviews is not None:
        rows = np.where(valid, features.reviews.rows[events], -1)
        has_review = rows >= 0
        reviews = np.where(has_review[..., None], features.reviews.values[np.maximum(rows, 0)], 0).astype(np.float32)
    else:
        has_review = np.zeros(events_BxN.shape, bool)
        reviews = np.zeros((*events_BxN.shape, 0), np.float32)
    return History(
        items=np.where(valid, features.items[events], -1).astype(np.int32),
        calendar=calendar_parts(np.where(known, times, MISSING_TIME)).astype(np.int32),
        age=np.where(known, age, -1).astype(np.int32),
        ratings=np.where(valid, rating_buckets(features.ratings[events], features.rated), -1).astype(np.int32),
        reviews=reviews,
        has_review=has_review,
    )


def history_of_items(items_BxN: Array, review_width: int) -> History:
    """The slots of histories of which only the items are known; int32 [B, N], -1 in padding, of the host or traced."""
    unknown = np.full(items_BxN.shape, -1, np.int32)
    return History(
        items=items_BxN.astype(np.int32),
        calendar=np.full((*items_BxN.shape, 3), -1, np.int32),
        age=unknown,
        ratings=unknown,
        reviews=np.zeros((*items_BxN.shape, review_width), np.float32),
        has_review=np.zeros(items_BxN.shape, bool),
    )


def hide_features(history: History, hidden_B: np.ndarray) -> History:
    """Makes times, ratings and reviews of some histories unknown."""
    return history.replace(
        calendar=np.where(hidden_B[:, None, None], -1, history.calendar),
        age=np.where(hidden_B[:, None], -1, history.age),
        ratings=np.where(hidden_B[:, None], -1, history.ratings),
        has_review=history.has_review & ~hidden_B[:, None],
    )


def supervised_places(targets_BxP: np.ndarray, usual: int) -> np.ndarray:
    """Flat places that hold a target, int32 [M], filled up with -1.

    M is `usual` or, where there are more targets, the number of all places: two programs to compile, and the second
    one rarely.
    """
    places = np.flatnonzero(targets_BxP >= 0)
    size = usual if len(places) <= usual else targets_BxP.size
    return np.concatenate([places, np.full(size - len(places), -1)]).astype(np.int32)


def usual_places(counts: np.ndarray, batch_size: int, most: int) -> int:
    """Targets that hardly any batch exceeds: four standard deviations above the mean, in steps of 64, at most `most`.

    Args:
      counts: Number of targets of every example that batches are drawn from.
      batch_size: Examples per batch.
      most: Places of a batch.
    """
    expected = batch_size * counts.mean() + 4 * np.sqrt(batch_size) * counts.std()
    return int(min(most, 64 * np.ceil(expected / 64)))


def newest(events: np.ndarray, slots: int) -> np.ndarray:
    """The newest `slots` entries, padded with -1 before the oldest."""
    kept = events[-slots:]
    return np.concatenate([np.full(slots - len(kept), -1, np.int64), kept])


def slot_buckets(longest: int) -> tuple[int, ...]:
    """Numbers of slots that batches may have: powers of two from 8, then `longest`; few, so few compilations."""
    buckets = []
    size = 8
    # A bucket that would hold little but padding of the next shorter one is not worth its compilation.
    while 1.25 * size < longest:
        buckets.append(size)
        size *= 2
    return (*buckets, longest)


def bucket_of(lengths: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Index of the smallest bucket that holds each length; the last one for longer histories."""
    return np.minimum(np.searchsorted(buckets, lengths), len(buckets) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingWindows:
    """Training examples: windows over the users' training sequences.

    Attributes:
      order: int32 (int64 where they need it), event numbers of the training split, grouped by user, oldest first.
      starts: int64 [examples], first entry of the example's user in `order`.
      ends: int64 [examples], entry in `order` of the last target; slots are the entries before it.
      users: int64 [examples], the example's user.
    """

    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    users: np.ndarray

    def slots(self) -> np.ndarray:
        """Number of history slots of every example before any cut."""
        return self.ends - self.starts

    def only(self, targets: np.ndarray) -> TrainingWindows:
        """The windows whose last target is one of bool [events]."""
        kept = targets[self.order[self.ends]]
        return dataclasses.replace(self, starts=self.starts[kept], ends=self.ends[kept], users=self.users[kept])


def training_windows(interactions: Interactions, split: Split, positions: int) -> TrainingWindows:
    """Cuts every user's training sequence into windows so that each event but the first is a target once.

    The newest window ends at the user's newest training event; each older one ends `positions` events before.
    """
    trained = np.zeros(len(interactions.user_ids), np.int64)
    there = np.diff(interactions.offsets) > 0
    trained[there] = np.add.reduceat(split.train, interactions.offsets[:-1][there], dtype=np.int64)
    starts, newest = np.cumsum(trained) - trained, np.cumsum(trained) - 1
    counts = -(-np.maximum(newest - starts, 0) // positions)
    users = np.repeat(np.arange(len(counts)), counts)
    # The place of a window among those of its user, newest first.
    places = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return TrainingWindows(
        order=_places_of(split.train),
        starts=starts[users],
        ends=newest[users] - positions * places,
        users=users,
    )


def _places_of(marks: np.ndarray) -> np.ndarray:
    """Where bool [n] is True, ascending; in int32 where it holds n, and without an int64 of all on the way."""
    places = np.empty(int(marks.sum()), np.int32 if len(marks) < 2**31 else np.int64)
    filled, step = 0, 1 << 20
    for start in range(0, len(marks), step):
        found = np.flatnonzero(marks[start : start + step])
        places[filled : filled + len(found)] = found + start
        filled += len(found)
    return places


def window_events(windows: TrainingWindows, examples: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Event numbers of the slots and of the item after each slot, both int64 [B, N], -1 in padding."""
    at = windows.ends[examples, None] - slots + np.arange(slots + 1)[None, :]
    events = np.where(at >= windows.starts[examples, None], windows.order[np.maximum(at, 0)], np.int64(-1))
    history = events[:, :-1]
    return history, np.where(history >= 0, events[:, 1:], -1)


def case_events(interactions: Interactions, cases: Cases, which: np.ndarray, slots: int) -> np.ndarray:
    """Event numbers of the newest `slots` interactions before each case's target, int64 [B, N], -1 in padding."""
    at = cases.cuts[which, None] - slots + np.arange(slots)[None, :]
    return np.where(at >= interactions.offsets[cases.users[which], None], at, -1)


def distinct_of(items: np.ndarray) -> np.ndarray:
    """The items that are there, int32 [R], ascending; below zero is none."""
    return np.unique(items[items >= 0]).astype(np.int32)


def places_among(distinct_R: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Places of items among those of `distinct_of`, int32 of their shape, -1 where there is none."""
    return np.where(items >= 0, np.searchsorted(distinct_R, items), -1).astype(np.int32)


def number_by_rows(
    batch: HistoryBatch,
    tables: ItemTables | None,
    everyone: np.ndarray | None = None,
    shard: tuple[int, int] = (0, 1),
) -> HistoryBatch:
    """Renumbers a batch by its distinct items, so that a step touches only their rows.

    Args:
      batch: Numbered by the catalogue.
      tables: Host tables to gather the rows from; None if the step gathers them on the device.
      everyone: Items of the whole batch, -1 in padding, where `batch` is one process's slice of it.
      shard: Which of how many slices of the rows of `tables` is gathered here.

    Returns:
      The batch with `rows` padded to a power of two (at most one compilation per doubling).
    """
    parts = [batch.history.items.ravel(), batch.targets.ravel()] if everyone is None else [everyone.ravel()]
    if batch.negatives is not None:
        parts.append(batch.negatives)
    everything = np.concatenate(parts)
    distinct = distinct_of(everything)
    size = max(64, 1 << max(len(distinct) - 1, 0).bit_length())
    rows = np.concatenate([distinct, np.full(size - len(distinct), -1, np.int32)])

    return batch.replace(
        history=batch.history.replace(items=places_among(distinct, batch.history.items)),
        targets=places_among(distinct, batch.targets),
        rows=rows,
        negatives=None if batch.negatives is None else places_among(distinct, batch.negatives),
        given=None if batch.given is None else places_among(distinct, batch.given),
        tables=None if tables is None else tables.take(np.maximum(np.split(rows, shard[1])[shard[0]], 0)),
    )
