"""Interactions as arrays, grouped by user and ordered in time; those of a prepared folder are memory maps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf.data.errors import DataError
from nqf.data.parquet import checked
from nqf.data.schema import nearest

MISSING_TIME = int(np.iinfo(np.int64).min)
"""The time of an interaction whose time is not known."""
TABLE, SHORT, USERS = "interactions.parquet", "short.parquet", "events-users.parquet"
"""In a prepared folder: the events in order, those of users with too few, and the ids of the users."""
# Reviews that are read at a time.
_REVIEWS = 65_536
MAPPED = {"items": np.int32, "times": np.int64, "ratings": np.float32}
"""The columns of the events in order that are mapped as arrays, beside the offsets of the users."""


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
    reviews: Sequence[str | None] | None

    @functools.cached_property
    def tied_share(self) -> float:
        """Share, 0 to 1, of the pairs of consecutive interactions of a user that have the same known time."""
        tied = (self.times[1:] == self.times[:-1]) & (self.times[1:] != MISSING_TIME)
        # No pair: the last of a user and the first of the next.
        tied[self.offsets[1:-1] - 1] = False
        return float(tied.sum() / max(len(self.times) - len(self.user_ids), 1))

    @property
    def users(self) -> np.ndarray:
        """int64 [events], the user row of every interaction."""
        return np.repeat(np.arange(len(self.user_ids)), np.diff(self.offsets))

    def user_row(self, user_id: str) -> int:
        """The row of a user.

        Raises:
          DataError: The user is not known.
        """
        row = self.find(user_id)
        if row is None:
            raise DataError(f"unknown user '{user_id}'{nearest(user_id, self.user_ids[:10_000])}")
        return row

    def find(self, user_id: str) -> int | None:
        """The row of a user, None for an unknown one."""
        return self._row_of.get(user_id)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {user_id: row for row, user_id in enumerate(self.user_ids)}

    def save(self, path: str | Path) -> None:
        """Writes a Parquet file: user_id, item (row), timestamp, rating and, if there is one, review."""
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
            frame = frame.with_columns(review=pl.Series(self.reviews[:], dtype=pl.String))
        frame.write_parquet(path)


class StoredReviews(Sequence):
    """The reviews in a table of interactions, of which those that are asked for are read."""

    def __init__(self, path: Path):
        self._path = path
        self._count = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int | slice) -> Any:
        if not isinstance(at, slice):
            return self[:][at] if at < 0 else self[at : at + 1][0]
        start, stop, step = at.indices(self._count)
        if step < 0:
            return self[:][at]
        table = pl.scan_parquet(self._path, glob=False).select("review")
        return table.slice(start, max(stop - start, 0)).collect()["review"].to_list()[::step]

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, self._count, _REVIEWS):
            yield from self[start : start + _REVIEWS]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def load_interactions(path: str | Path) -> Interactions:
    """Reads what `Interactions.save` wrote."""
    return from_frame(pl.read_parquet(checked(Path(path)), glob=False))


def array_path(folder: Path, name: str) -> Path:
    """Where a prepared folder has an array of `Interactions`."""
    return folder / f"events-{name}.npy"


def open_interactions(folder: Path) -> Interactions:
    """Opens the interactions of a prepared folder: memory maps, which a folder of before version 0.3 has not."""
    table, users = checked(folder / TABLE), folder / USERS
    if not users.is_file():
        return load_interactions(table)
    # Mapped so that a change stays in memory, as of any other array.
    return Interactions(
        user_ids=pl.read_parquet(checked(users), glob=False)["user_id"].to_list(),
        offsets=np.load(array_path(folder, "offsets"), allow_pickle=False),
        **{name: np.load(array_path(folder, name), mmap_mode="c", allow_pickle=False) for name in MAPPED},
        reviews=StoredReviews(table) if "review" in pl.read_parquet_schema(table) else None,
    )


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
    there = "review" in frame.columns and frame["review"].null_count() < len(frame)
    return Interactions(
        user_ids=users.to_list(),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=numbered["item"].to_numpy().astype(np.int32),
        times=numbered["timestamp"].to_numpy().astype(np.int64),
        ratings=numbered["rating"].cast(pl.Float32).fill_null(float("nan")).to_numpy().copy(),
        reviews=numbered["review"].to_list() if there else None,
    )
