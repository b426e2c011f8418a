"""Interactions as arrays, grouped by user and ordered in time."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import polars as pl

from nqf.data.errors import DataError
from nqf.data.schema import nearest

MISSING_TIME = int(np.iinfo(np.int64).min)
"""The time of an interaction whose time is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interactions:
    """All interactions of all users.

    Users stand in the order of their first interaction in the source. Within a user, interactions are ordered by
    time, then as in the source; one without a time stays behind the one that it follows in the source.

    Attributes:
      user_ids: User id of every user row.
      offsets: int64 [users + 1]; the interactions of user row u are offsets[u] to offsets[u + 1].
      items: int32 [events], item rows.
      times: int64 [events], unix seconds; `MISSING_TIME` where unknown.
      ratings: float32 [events], NaN where unknown.
      reviews: Text of every interaction's review, None where there is none; None if no interaction has one.
    """

    user_ids: list[str]
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray
    ratings: np.ndarray
    reviews: list[str | None] | None

    @property
    def tied_share(self) -> float:
        """Share, 0 to 1, of the pairs of consecutive interactions of a user that have the same known time."""
        inside = self.users[1:] == self.users[:-1]
        tied = inside & (self.times[1:] == self.times[:-1]) & (self.times[1:] != MISSING_TIME)
        return float(tied.sum() / max(inside.sum(), 1))

    @property
    def users(self) -> np.ndarray:
        """int64 [events], the user row of every interaction."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

    def user_row(self, user_id: str) -> int:
        """The row of a user.

        Raises:
          DataError: The user is not known.
        """
        if user_id not in self._row_of:
            raise DataError(f"unknown user '{user_id}'{nearest(user_id, self.user_ids[:10_000])}")
        return self._row_of[user_id]

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {user_id: row for row, user_id in enumerate(self.user_ids)}

    def save(self, path: str | Path) -> None:
        """Writes a Parquet file: user_id, item (row), timestamp, rating, review."""
        frame = pl.DataFrame(
            {
                "user_id": pl.Series(self.user_ids, dtype=pl.String).gather(self.users),
                "item": self.items,
                "timestamp": self.times,
                "rating": self.ratings,
            }
        ).with_columns(
            timestamp=pl.when(pl.col("timestamp") != MISSING_TIME).then(pl.col("timestamp")),
            rating=pl.when(pl.col("rating").is_not_nan()).then(pl.col("rating")),
        )
        if self.reviews is not None:
            frame = frame.with_columns(review=pl.Series(self.reviews, dtype=pl.String))
        frame.write_parquet(path)


def load_interactions(path: str | Path) -> Interactions:
    """Reads what `Interactions.save` wrote."""
    return from_frame(pl.read_parquet(path))


def from_frame(frame: pl.DataFrame) -> Interactions:
    """Groups and orders interactions.

    Args:
      frame: Columns user_id (String), item (integer row), timestamp (Int64 unix seconds or null), rating (float
        or null) and, optionally, review (String or null), in source order.
    """
    users = frame["user_id"].unique(maintain_order=True)
    numbered = frame.with_columns(
        pl.col("user_id").replace_strict(users, np.arange(len(users)), return_dtype=pl.Int64).alias("_user"),
        pl.col("timestamp").forward_fill().over("user_id").fill_null(MISSING_TIME).alias("_key"),
        pl.col("timestamp").fill_null(MISSING_TIME),
    ).sort("_user", "_key", maintain_order=True)
    counts = np.bincount(numbered["_user"].to_numpy(), minlength=len(users))
    reviews = None
    if "review" in frame.columns and frame["review"].null_count() < len(frame):
        reviews = numbered["review"].to_list()
    return Interactions(
        user_ids=users.to_list(),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=numbered["item"].to_numpy().astype(np.int32),
        times=numbered["timestamp"].to_numpy().astype(np.int64),
        ratings=numbered["rating"].cast(pl.Float32).fill_null(float("nan")).to_numpy().copy(),
        reviews=reviews,
    )
