"""Histories that are served: of the run's users, of those with too few events to be trained on, and given ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from nqf.data.catalogue import BAD, canonical
from nqf.data.interactions import MISSING_TIME, Interactions, from_frame
from nqf.data.schema import Field, Schema, nearest
from nqf.fields.cache import REVIEW, encode_column
from nqf.fields.tables import FieldTable
from nqf.pipelines.histories import EventFeatures
from nqf.stages.run import Run

EXTRAS = ("times", "ratings", "reviews")
"""What may come with the items of a history."""
_COLUMNS = {"times": ("timestamp", "time"), "ratings": ("rating", "number"), "reviews": ("review", "text")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Past:
    """What one user has met.

    Attributes:
      features: Features of many events; None where only the items are known.
      events: int64 [n], which of these events are the user's, oldest first; without features the items' rows.
    """

    features: EventFeatures | None
    events: np.ndarray

    @property
    def items(self) -> np.ndarray:
        """Item rows [n], oldest first."""
        return self.events if self.features is None else self.features.items[self.events]


def pasts_of(features: EventFeatures, interactions: Interactions, users: Sequence[int]) -> list[Past]:
    """The whole pasts of some users."""
    spans = [np.arange(interactions.offsets[user], interactions.offsets[user + 1]) for user in users]
    return [Past(features=features, events=span) for span in spans]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What the run's training data has, so that what it lacks is refused.

    Attributes:
      times: Whether any event has a time.
      ratings: float32, the smallest and the largest rating that was trained on; empty where there is none.
      reviews: Embeddings of the run's reviews; None without.
    """

    times: bool
    ratings: np.ndarray
    reviews: FieldTable | None


def known_of(run: Run) -> Known:
    """What a run has."""
    return Known(
        times=bool((run.dataset.interactions.times != MISSING_TIME).any()),
        ratings=run.features.rated,
        reviews=run.features.reviews,
    )


def events_of(run: Run) -> pl.DataFrame:
    """The run's events as a table: see `Recommender.events`."""
    interactions, split = run.dataset.interactions, run.dataset.split
    ids = pl.Series(list(run.dataset.catalogue.item_ids), dtype=pl.String)
    part = np.where(split.train, "train", "")
    for name, cases in (("valid", split.valid), ("test", split.test)):
        part[cases.cuts] = name
    columns: dict[str, Any] = {
        "user_id": pl.Series(interactions.user_ids, dtype=pl.String).gather(interactions.users),
        "item_id": ids.gather(interactions.items),
    }
    if (known := interactions.times != MISSING_TIME).any():
        columns["timestamp"] = pl.Series(interactions.times).set(pl.Series(~known), None)
    if np.isfinite(interactions.ratings).any():
        columns["rating"] = pl.Series(interactions.ratings, nan_to_null=True)
    if interactions.reviews is not None:
        columns["review"] = pl.Series(interactions.reviews[:], dtype=pl.String)
    return pl.DataFrame(columns | {"part": pl.Series(part).replace("", None)})


def features_of(run: Run, known: Known, interactions: Interactions) -> EventFeatures:
    """Features of interactions that no stage has read, as those of the run's own."""
    bare = _bare_features(interactions.items, known)
    reviews = bare.reviews
    if known.reviews is not None and interactions.reviews is not None:
        texts = pl.Series(interactions.reviews[:], dtype=pl.String)
        there = texts.is_not_null().to_numpy()
        found, readable = encode_column(run.cache.encoder(REVIEW), texts.drop_nulls())
        values = np.concatenate([np.zeros((1, known.reviews.values.shape[1]), np.float16), found])
        rows = np.full(len(texts), -1, np.int32)
        rows[there] = np.where(readable, np.arange(1, len(values)), -1)
        reviews = _table(values, rows)
    return dataclasses.replace(
        bare,
        times=interactions.times,
        ratings=interactions.ratings,
        rated=known.ratings,
        reviews=reviews,
    )


def _bare_features(items: np.ndarray, known: Known) -> EventFeatures:
    """Features of events of which only the items are known."""
    count, reviews = len(items), None
    if known.reviews is not None:
        width = known.reviews.values.shape[1]
        reviews = _table(np.zeros((1, width), np.float16), np.full(count, -1, np.int32))
    return EventFeatures(
        items=items.astype(np.int32),
        times=np.full(count, MISSING_TIME),
        ratings=np.full(count, np.nan, np.float32),
        rated=np.zeros(0, np.float32),
        reviews=reviews,
    )


def _table(values: np.ndarray, rows: np.ndarray) -> FieldTable:
    # Memory maps are how the run's own tables are read, not what the models ask for.
    return FieldTable(values=cast(np.memmap, values), rows=cast(np.memmap, rows), modality="text")


def given_pasts(
    run: Run, known: Known, histories: Sequence[np.ndarray], extras: Mapping[str, Sequence[Sequence[Any]]]
) -> list[Past]:
    """Histories of item rows, oldest first, with what is known of their events.

    With times, the events of a history are put in their order, as those of the run's users are.

    Args:
      run: The run.
      known: What it has.
      histories: int64 rows of each history.
      extras: Some of `EXTRAS`: for every history a value (None for unknown) for each of its items.

    Raises:
      ValueError: Lengths that differ, a value that cannot be read, a rating of another scale than those of the
        training, or something that the run's training data does not have.
    """
    if not extras:
        return [Past(features=None, events=history) for history in histories]
    lengths = [len(history) for history in histories]
    items = np.concatenate([np.zeros(0, np.int64), *histories])
    columns = {_COLUMNS[name][0]: _column(known, name, values, lengths) for name, values in extras.items()}
    users = np.repeat(np.arange(len(histories)), lengths)
    frame = pl.DataFrame({"user_id": users.astype(str), "item": items} | columns)
    absent = [name for name, _ in _COLUMNS.values() if name not in frame.columns]
    frame = frame.with_columns(
        pl.lit(None, dtype=pl.String if name == "review" else pl.Int64).alias(name) for name in absent
    )
    # Users stand in the order of their first event; one without events has no place among them.
    features = features_of(run, known, from_frame(frame))
    ends = np.cumsum(lengths)
    return [
        Past(features=features, events=np.arange(end - length, end)) for end, length in zip(ends, lengths, strict=True)
    ]


def _column(known: Known, name: str, values: Sequence[Sequence[Any]], lengths: Sequence[int]) -> pl.Series:
    """Readable values of one kind, of all histories one after the other."""
    if isinstance(values, str) or any(isinstance(some, str) for some in values):
        raise ValueError(f"{name}: give a list with one value for each item of the history")
    found = [len(some) for some in values]
    if found != list(lengths):
        raise ValueError(f"{name}: {found} values for histories of {list(lengths)} items; give one for each, or None")
    if not {"times": known.times, "ratings": len(known.ratings), "reviews": known.reviews is not None}[name]:
        raise ValueError(f"{name}: this run was trained without {name}, so it cannot read them; leave them out")
    column, modality = _COLUMNS[name]
    flat = pl.Series(column, [value for some in values for value in some], strict=False)
    flat = flat.cast(pl.String) if flat.dtype in (pl.Null, pl.Object) else flat
    frame = pl.DataFrame({"item_id": pl.Series(["-"] * len(flat), dtype=pl.String), column: flat})
    field = Field(name=column, modality=cast(Any, modality), columns=(column,))
    read = canonical(frame.lazy(), Schema(fields=(field,)), Path()).collect()
    if len(bad := read[BAD + column].arg_true()):
        raise ValueError(f"{name}: {flat[bad[0]]!r} cannot be read; give a {modality}, or None where it is unknown")
    if name == "ratings" and len(read[column].drop_nulls()):
        low, high = known.ratings.tolist()
        least, most = cast(float, read[column].min()), cast(float, read[column].max())
        # One that was too rare to be trained on counts as its neighbor; one of another scale is a mistake.
        if least < 2 * low - high or most > 2 * high - low:
            raise ValueError(f"ratings: {least:g} to {most:g}, but this run was trained on {low:g} to {high:g}")
    return read[column]


def checked_ids(ids: Any, what: str) -> list[str]:
    """A list of ids, each of them a text.

    Raises:
      ValueError: One string, or something else than texts.
    """
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"{what}: one text, {ids!r}; give a list, such as [{ids!r}]")
    if isinstance(ids, Mapping) or not hasattr(ids, "__iter__"):
        raise ValueError(f"{what}: {type(ids).__name__}; give a list of texts")
    ids = list(ids)
    for id_ in ids:
        if not isinstance(id_, str):
            raise ValueError(f"{what}: {id_!r} is a {type(id_).__name__}; ids are texts, so write {str(id_)!r}")
    return ids


def some_ids(unknown: Sequence[str], known: Callable[[], Sequence[str]]) -> str:
    """The first of some ids that are not known, and a known one like them."""
    near = nearest(unknown[0], known()[:10_000])
    # A list of all ids helps nobody.
    return ", ".join(map(repr, unknown[:5])) + (near if near.startswith("; did you mean") else "")
