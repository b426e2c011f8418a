"""Histories that are served: of the run's users, of those with too few events to be trained on, and given ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf.data.catalogue import BAD, canonical
from nqf.data.interactions import MISSING_TIME, Interactions, from_frame
from nqf.data.schema import Field, Schema, nearest
from nqf.fields.cache import REVIEW, encode_column
from nqf.fields.tables import FieldTable
from nqf.pipelines.histories import EventFeatures, calendar_parts, rating_buckets
from nqf.stages.run import Run

EXTRAS = ("times", "ratings", "reviews")
"""What may come with the items of a history."""
_COLUMNS = {"times": ("timestamp", "time"), "ratings": ("rating", "number"), "reviews": ("review", "text")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Past:
    """What one user has met.

    Attributes:
      features: Features of many events.
      events: int64 [n], which of them are the user's, oldest first.
    """

    features: EventFeatures
    events: np.ndarray

    @property
    def items(self) -> np.ndarray:
        """int32 [n], item rows, oldest first."""
        return self.features.items[self.events]


def pasts_of(features: EventFeatures, interactions: Interactions, users: Sequence[int]) -> list[Past]:
    """The whole pasts of some users."""
    spans = [np.arange(interactions.offsets[user], interactions.offsets[user + 1]) for user in users]
    return [Past(features=features, events=span) for span in spans]


def features_of(run: Run, interactions: Interactions) -> EventFeatures:
    """Features of interactions that no stage has read, as those of the run's own."""
    dataset, table = run.dataset, run.features.reviews
    reviews = None
    if table is not None:
        texts = pl.Series(interactions.reviews or [None] * len(interactions.items), dtype=pl.String)
        there = texts.is_not_null().to_numpy()
        values = np.zeros((1, table.values.shape[1]), np.float16)
        rows = np.full(len(texts), -1, np.int32)
        if there.any():
            found, readable = encode_column(run.cache.encoder(REVIEW), texts.drop_nulls())
            values = np.concatenate([values, found])
            rows[there] = np.where(readable, np.arange(1, len(values)), -1)
        # Memory maps are how the run's own tables are read, not what the models ask for.
        reviews = FieldTable(values=values, rows=rows, modality=table.modality)  # type: ignore[arg-type]
    return EventFeatures(
        items=interactions.items,
        times=interactions.times,
        calendar=calendar_parts(interactions.times),
        ratings=rating_buckets(interactions.ratings, dataset.interactions.ratings[dataset.split.train]),
        reviews=reviews,
    )


def given_pasts(run: Run, histories: Sequence[np.ndarray], extras: Mapping[str, Sequence[Sequence[Any]]]) -> list[Past]:
    """Histories of item rows, oldest first, with what is known of their events.

    With times, the events of a history are put in their order, as those of the run's users are.

    Args:
      run: The run.
      histories: int64 rows of each history.
      extras: Some of `EXTRAS`: for every history a value (None for unknown) for each of its items.

    Raises:
      ValueError: Lengths that differ, a value that cannot be read, a rating of another scale than those of the
        training, or something that the run's training data does not have.
    """
    lengths = [len(history) for history in histories]
    items = np.concatenate([np.zeros(0, np.int64), *histories])
    count, users = len(items), np.repeat(np.arange(len(histories)), lengths)
    interactions = Interactions(
        user_ids=[],
        offsets=np.zeros(1, np.int64),
        items=items.astype(np.int32),
        times=np.full(count, MISSING_TIME),
        ratings=np.full(count, np.nan, np.float32),
        reviews=None,
    )
    if extras:
        columns = {_COLUMNS[name][0]: _column(run, name, values, lengths) for name, values in extras.items()}
        frame = pl.DataFrame({"user_id": users.astype(str), "item": items} | columns)
        absent = [name for name, _ in _COLUMNS.values() if name not in frame.columns]
        frame = frame.with_columns(pl.lit(None, dtype=pl.String if name == "review" else pl.Int64).alias(name)
                                   for name in absent)  # fmt: skip
        # Users stand in the order of their first event; one without events has no place among them.
        interactions = from_frame(frame)
    ends = np.cumsum(lengths)
    features = features_of(run, interactions)
    return [
        Past(features=features, events=np.arange(end - length, end)) for end, length in zip(ends, lengths, strict=True)
    ]


def _column(run: Run, name: str, values: Sequence[Sequence[Any]], lengths: Sequence[int]) -> pl.Series:
    """Readable values of one kind, of all histories one after the other."""
    if isinstance(values, str) or any(isinstance(some, str) for some in values):
        raise ValueError(f"{name}: give a list with one value for each item of the history")
    found = [len(some) for some in values]
    if found != list(lengths):
        raise ValueError(f"{name}: {found} values for histories of {list(lengths)} items; give one for each, or None")
    interactions = run.dataset.interactions
    known = {
        "times": bool((interactions.times != MISSING_TIME).any()),
        "ratings": bool(np.isfinite(interactions.ratings[run.dataset.split.train]).any()),
        "reviews": run.features.reviews is not None,
    }
    if not known[name]:
        raise ValueError(f"{name}: this run was trained without {name}, so it cannot read them; leave them out")
    column, modality = _COLUMNS[name]
    flat = pl.Series(column, [value for some in values for value in some], strict=False)
    flat = flat.cast(pl.String) if flat.dtype in (pl.Null, pl.Object) else flat
    frame = pl.DataFrame({"item_id": pl.Series(["-"] * len(flat), dtype=pl.String), column: flat})
    field = Field(name=column, modality=modality, columns=(column,))  # type: ignore[arg-type]
    read = canonical(frame.lazy(), Schema(fields=(field,)), Path()).collect()
    if len(bad := read[BAD + column].arg_true()):
        raise ValueError(f"{name}: {flat[bad[0]]!r} cannot be read; give a {modality}, or None where it is unknown")
    if name == "ratings" and len(read[column].drop_nulls()):
        training = interactions.ratings[run.dataset.split.train]
        low, high = float(np.nanmin(training)), float(np.nanmax(training))
        least, most = read[column].min(), read[column].max()
        # One that was too rare to be trained on counts as its neighbor; one of another scale is a mistake.
        if least < 2 * low - high or most > 2 * high - low:  # type: ignore[operator]
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


def unknown_ids(what: str, unknown: Sequence[str], known: Callable[[], Sequence[str]]) -> ValueError:
    """The error of ids that are not known."""
    near = nearest(unknown[0], known()[:10_000])
    # A list of all ids helps nobody.
    near = near if near.startswith("; did you mean") else ""
    return ValueError(f"unknown {what}: {', '.join(map(repr, unknown[:5]))}{near}")
