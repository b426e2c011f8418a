"""Interactions as arrays, grouped by user and ordered in time."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf.config import DataConfig
from nqf.data.catalogue import BAD, canonical, missing_ids, plain_ids, resolve
from nqf.data.errors import DataError
from nqf.data.parquet import checked
from nqf.data.schema import Field, Schema, nearest

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
    return from_frame(pl.read_parquet(checked(Path(path)), glob=False))


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


def read_interactions(
    table: pl.LazyFrame, item_ids: pl.Series, config: DataConfig, *, where: str, items_where: str
) -> tuple[Interactions, Interactions | None, dict[str, Any]]:
    """Reads, checks and counts the events of a table.

    Args:
      table: Columns user_id, item_id, timestamp, rating and review.
      item_ids: String, the id of every item row.
      config: What to do with what cannot be used.
      where: Table of the interactions, named in errors.
      items_where: Table of the items, likewise.

    Returns:
      The interactions; those of users with fewer than `data.min_interactions`, None if there are none; and the report:
      what was read, left out and warned about (JSON-able).

    Raises:
      DataError: Missing ids, unreadable times, bad values or unknown items, where the configuration refuses them, or
        nothing is left.
    """
    frame, report = _read_events(table, config, where)
    frame = _with_items(frame, item_ids, config, report, where, items_where)
    copies = frame.is_duplicated() & frame["timestamp"].is_not_null()
    report["duplicates"] = len(frame.filter(copies)) - frame.filter(copies).n_unique()
    if report["duplicates"]:
        done = "are merged" if config.duplicates == "merge" else "are kept (data.duplicates: merge makes one of each)"
        report["warnings"].append(
            f"{where}: {report['duplicates']} interactions are identical to another one of their user, time included; "
            f"they {done}"
        )
    if config.duplicates == "merge":
        # Without a time, the same item again may well be another event.
        frame = frame.filter(~copies | pl.struct(pl.all()).is_first_distinct())
    lengths = pl.len().over("user_id")
    short = frame.filter(lengths < config.min_interactions)
    report["short_users"] = short["user_id"].n_unique()
    report["short_user_interactions"] = len(short)
    if len(short):
        report["warnings"].append(
            f"{report['short_users']} users with fewer than {config.min_interactions} interactions are left out of "
            "training and evaluation; they are served"
        )
        frame = frame.filter(lengths >= config.min_interactions)
    if not len(frame):
        raise DataError(
            f"{where}: no interaction is left of {report['read']}: {report['unknown_items']} are with unknown items "
            f"(not in {items_where}), {report['missing_ids']} without ids, "
            f"{report['short_user_interactions']} of users with fewer than data.min_interactions"
        )
    if config.shuffle_ties:
        frame = _shuffle_ties(frame, config.seed)
    interactions = from_frame(frame)
    tied = interactions.tied_share
    if tied > 0.01:
        order = "in random order (data.shuffle_ties)" if config.shuffle_ties else "in the order of the source"
        report["warnings"].append(f"{tied:.0%} of consecutive interactions share their time; those stand {order}")
    report |= {"count": len(frame), "users": len(interactions.user_ids)}
    return interactions, from_frame(short) if len(short) else None, report


def _read_events(table: pl.LazyFrame, config: DataConfig, where: str) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Readable events with ids, and the beginning of the report."""
    # The events are the items of a small catalogue: the same reading of strings and numbers, the same marks.
    schema = Schema(
        fields=(
            Field(name="timestamp", modality="time", columns=("timestamp",), format=config.time_format),
            Field(name="rating", modality="number", columns=("rating",)),
            Field(name="review", modality="text", columns=("review",)),
        ),
        missing_words=config.missing_words,
    )
    words = () if config.missing_ids == "keep" else config.missing_words
    try:
        source = table
        table, notes = plain_ids(table, ("user_id", "item_id"), words, where)
        schema, more, found = resolve(table, schema, where, events=True)
        frame = canonical(table, schema, Path(), ids=("user_id", "item_id")).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{where}: could not be read: {error}") from error
    report: dict[str, Any] = {"read": len(frame), "warnings": [*notes, *more], "missing_words": found}
    report["formats"] = {field.name: list(field.format) for field in schema.fields if field.format}
    bad = {name: int(frame[BAD + name].sum()) for name in ("timestamp", "rating")}
    report["bad_values"] = {name: count for name, count in bad.items() if count}
    for name, count in report["bad_values"].items():
        row = frame[BAD + name].arg_true()[0]
        value = source.select(name).slice(row, 1).collect().item()
        if config.bad_values == "refuse":
            raise DataError(
                f"{where}: row {row + 1} (user_id '{frame['user_id'][row]}'): {name} cannot be read: {value!r}; there "
                f"are {count} such rows; fix them or set data.bad_values: missing"
            )
        report["warnings"].append(f"{where}: {count} values of '{name}' could not be read, such as {value!r}")
    frame = frame.drop("title", *(BAD + field.name for field in schema.fields))
    absent = frame["user_id"].is_null() | frame["item_id"].is_null()
    report["missing_ids"] = int(absent.sum())
    for name in ("user_id", "item_id"):
        report["warnings"] += missing_ids(frame[name], source, name, config, where)
    return frame.filter(~absent), report


def _with_items(
    frame: pl.DataFrame,
    item_ids: pl.Series,
    config: DataConfig,
    report: dict[str, Any],
    where: str,
    items_where: str,
) -> pl.DataFrame:
    """The events with known items, and their rows."""
    rows = pl.DataFrame({"item_id": item_ids, "item": pl.arange(len(item_ids), eager=True, dtype=pl.Int32)})
    frame = frame.join(rows, on="item_id", how="left", maintain_order="left")
    unknown = frame["item"].is_null()
    report["unknown_items"] = int(unknown.sum())
    if report["unknown_items"]:
        known, example = f"{items_where} has '{item_ids[0]}'", frame["item_id"].filter(unknown)[0]
        hint = _likeness(frame["item_id"].filter(unknown), item_ids)
        if unknown.all():
            raise DataError(
                f"{where}: no interaction is left of {len(frame)}: {len(frame)} are with unknown items, such as "
                f"'{example}', and {known}{hint}; write the ids of both tables in one way, or name the columns that "
                "are meant"
            )
        message = (
            f"{where}: {report['unknown_items']} interactions are with items that {items_where} lacks, such as "
            f"'{example}'{hint}"
        )
        if config.unknown_items == "refuse":
            raise DataError(f"{message}; add the items or set data.unknown_items: drop")
        report["warnings"].append(f"{message}; they are left out")
        frame = frame.filter(~unknown)
    return frame


def _likeness(unknown: pl.Series, item_ids: pl.Series) -> str:
    """What would make unknown ids known ones, in words."""
    ways = {
        "leading zeros": lambda ids: ids.str.strip_chars_start("0"),
        "upper and lower case": lambda ids: ids.str.to_lowercase(),
        "a .0 at the end": lambda ids: ids.str.replace(r"\.0+$", ""),
        "quotes and blanks": lambda ids: ids.str.replace_all(r"[\s\"']", ""),
    }
    for what, plain in ways.items():
        known = plain(item_ids)
        alike = plain(unknown).is_in(known.implode())
        if alike.any():
            example = unknown.filter(alike)[0]
            other = item_ids.filter(known == plain(pl.Series([example]))[0])[0]
            return f" ({alike.sum()} of them differ from an item by {what} alone, as '{example}' from '{other}')"
    return ""


def _shuffle_ties(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Rows of one user and time change places at random; those without a time keep theirs."""
    draws = pl.Series(np.random.default_rng(seed).random(len(frame)))
    frame = frame.with_row_index("place").with_columns(
        draw=pl.when(pl.col("timestamp").is_null()).then(pl.col("place")).otherwise(draws)
    )
    places = frame.sort("user_id", "timestamp", "place")["place"]
    return frame.sort("user_id", "timestamp", "draw").with_columns(place=places).sort("place").drop("place", "draw")
