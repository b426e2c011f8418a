"""From a table of events to those of a prepared folder.

The table is never in memory as a whole: it is read in pieces, dealt out to files of some users each, and put in order
file by file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf.config import DataConfig
from nqf.data.catalogue import BAD, canonical, missing_ids, plain_ids, resolve
from nqf.data.errors import DataError
from nqf.data.interactions import MAPPED, SHORT, TABLE, USERS, Interactions, array_path, from_frame, open_interactions
from nqf.data.schema import Field, Schema

# Events that are read at a time; events, and bytes of their reviews, that are put in order at a time.
_PIECE, _SHARE, _SHARE_BYTES = 500_000, 2_000_000, 2**27


def write_interactions(
    table: pl.LazyFrame, item_ids: pl.Series, config: DataConfig, *, folder: Path, scratch: Path, where: tuple[str, str]
) -> tuple[Interactions, dict[str, Any]]:
    """Reads, checks, counts and puts in order the events of a table; `open_interactions` opens what is written.

    Args:
      table: Columns user_id, item_id, timestamp, rating and review.
      item_ids: String, the id of every item row.
      config: What to do with what cannot be used.
      folder: Written: `TABLE`, its arrays and, if users have fewer than `data.min_interactions` events, `SHORT`.
      scratch: For files on the way.
      where: The tables of the interactions and of the items, named in errors.

    Returns:
      The interactions as they are opened, and what was read, left out and warned about (JSON-able).

    Raises:
      DataError: Missing ids, unreadable times, bad values or unknown items, where the configuration refuses them, or
        nothing is left.
    """
    scratch = scratch / "ordering"
    scratch.mkdir()
    draft = scratch / "canonical.parquet"
    report = _write_readable(table, draft, config, where[0])
    known = pl.DataFrame({"item_id": item_ids, "item": pl.arange(len(item_ids), eager=True, dtype=pl.Int32)})
    _check_items(draft, known, config, report, where)
    _order(_shares(draft, known, scratch), folder, scratch, config, report)
    _say_counts(config, report, where, empty=not (folder / TABLE).is_file())
    interactions = open_interactions(folder)
    tied = interactions.tied_share
    if tied > 0.01:
        order = "in random order (data.shuffle_ties)" if config.shuffle_ties else "in the order of the source"
        report["warnings"].append(f"{tied:.0%} of consecutive interactions share their time; those stand {order}")
    return interactions, report | {"count": len(interactions.items), "users": len(interactions.user_ids)}


def _write_readable(table: pl.LazyFrame, draft: Path, config: DataConfig, where: str) -> dict[str, Any]:
    """Writes the events in canonical form, in the order of the source, and begins the report."""
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
        canonical(table, schema, Path(), ids=("user_id", "item_id")).drop("title").sink_parquet(
            draft, row_group_size=_PIECE // 4
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{where}: could not be read: {error}") from error
    events = pl.scan_parquet(draft, row_index_name="row", glob=False)
    marks = events.select(
        pl.len(), *(pl.col(BAD + name).sum().cast(pl.Int64).alias(name) for name in ("timestamp", "rating"))
    ).collect(engine="streaming")
    report: dict[str, Any] = {"read": marks["len"][0], "warnings": [*notes, *more], "missing_words": found}
    report["formats"] = {field.name: list(field.format) for field in schema.fields if field.format}
    report["bad_values"] = {name: marks[name][0] for name in ("timestamp", "rating") if marks[name][0]}
    for name, count in report["bad_values"].items():
        row, user = events.filter(pl.col(BAD + name)).select("row", "user_id").sort("row").head(1).collect().row(0)
        value = source.select(name).slice(row, 1).collect().item()
        if config.bad_values == "refuse":
            raise DataError(
                f"{where}: row {row + 1} (user_id '{user}'): {name} cannot be read: {value!r}; there "
                f"are {count} such rows; fix them or set data.bad_values: missing"
            )
        report["warnings"].append(f"{where}: {count} values of '{name}' could not be read, such as {value!r}")
    for name in ("user_id", "item_id"):
        report["warnings"] += missing_ids(events.filter(pl.col(name).is_null()), source, name, config, where)
    report["missing_ids"] = report["read"] - _identified(events).select(pl.len()).collect(engine="streaming").item()
    return report


def _identified(events: pl.LazyFrame) -> pl.LazyFrame:
    return events.filter(pl.col("user_id").is_not_null() & pl.col("item_id").is_not_null())


def _check_items(
    draft: Path, known: pl.DataFrame, config: DataConfig, report: dict[str, Any], where: tuple[str, str]
) -> None:
    """Refuses or counts events with items that the catalogue lacks."""
    events = _identified(pl.scan_parquet(draft, row_index_name="row", glob=False))
    unknown = (
        events.join(known.lazy(), on="item_id", how="anti")
        .group_by("item_id")
        .agg(pl.len().alias("count"), pl.col("row").min())
        .collect(engine="streaming")
        .sort("row")
    )
    report["unknown_items"] = count = int(unknown["count"].sum())
    if not count:
        return
    item_ids, left = known["item_id"], report["read"] - report["missing_ids"]
    has, example = f"{where[1]} has '{item_ids[0]}'", unknown["item_id"][0]
    hint = _likeness(unknown, item_ids)
    if count == left:
        raise DataError(
            f"{where[0]}: no interaction is left of {left}: {left} are with unknown items, such as "
            f"'{example}', and {has}{hint}; write the ids of both tables in one way, or name the columns that "
            "are meant"
        )
    message = f"{where[0]}: {count} interactions are with items that {where[1]} lacks, such as '{example}'{hint}"
    if config.unknown_items == "refuse":
        raise DataError(f"{message}; add the items or set data.unknown_items: drop")
    report["warnings"].append(f"{message}; they are left out")


def _likeness(unknown: pl.DataFrame, item_ids: pl.Series) -> str:
    """What would make unknown ids known ones, in words; `unknown` has them once, with the count of their events."""
    ways = {
        "leading zeros": lambda ids: ids.str.strip_chars_start("0"),
        "upper and lower case": lambda ids: ids.str.to_lowercase(),
        "a .0 at the end": lambda ids: ids.str.replace(r"\.0+$", ""),
        "quotes and blanks": lambda ids: ids.str.replace_all(r"[\s\"']", ""),
    }
    for what, plain in ways.items():
        known = plain(item_ids)
        alike = plain(unknown["item_id"]).is_in(known.implode())
        if alike.any():
            count = unknown["count"].filter(alike).sum()
            example = unknown["item_id"].filter(alike)[0]
            other = item_ids.filter(known == plain(pl.Series([example]))[0])[0]
            return f" ({count} of them differ from an item by {what} alone, as '{example}' from '{other}')"
    return ""


def _shares(draft: Path, known: pl.DataFrame, scratch: Path) -> Iterator[pl.DataFrame]:
    """The usable events in shares of some users each, who stand in the order of their first event in the source.

    Yields:
      Columns user_id, item (row), timestamp, rating and review, in the order of the source.
    """
    users = _count(draft, known).sort("row")
    # A share begins where the events before a user fill the one before.
    filled = pl.max_horizontal(
        *(
            (pl.col(name).cum_sum() - pl.col(name)) // most
            for name, most in (("events", _SHARE), ("bytes", _SHARE_BYTES))
        )
    )
    users = users.select("user_id", share=filled.cast(pl.Int32))
    folders: dict[int, Path] = {}
    for start, piece in _pieces(draft):
        piece = piece.join(known, on="item_id", maintain_order="left").join(users, on="user_id", maintain_order="left")
        for (share,), part in piece.partition_by("share", as_dict=True, include_key=False, maintain_order=True).items():
            folder = folders.setdefault(share, scratch / f"share-{share}")
            folder.mkdir(exist_ok=True)
            part.select("user_id", "item", "timestamp", "rating", "review").write_parquet(
                folder / f"{start:012d}.parquet"
            )
    for share in sorted(folders):
        yield pl.read_parquet(sorted(folders[share].iterdir()), glob=False)
        shutil.rmtree(folders[share])


def _pieces(draft: Path) -> Iterator[tuple[int, pl.DataFrame]]:
    """The events in pieces, each with the row where it begins."""
    rows = pl.scan_parquet(draft, glob=False).select("user_id", "item_id", "timestamp", "rating", "review")
    for start in range(0, rows.select(pl.len()).collect().item(), _PIECE):
        yield start, rows.slice(start, _PIECE).collect()


def _count(draft: Path, known: pl.DataFrame) -> pl.DataFrame:
    """Users with usable events: user_id, events, row (of the first in the source) and bytes (of reviews)."""
    # Counted piece by piece: the streaming engine's tables of all users at once are several times larger.
    numbers = ("row", "events", "bytes")
    parts = [pl.DataFrame(schema={"user_id": pl.String, **dict.fromkeys(numbers, pl.Int64)})]
    for start, piece in _pieces(draft):
        events = piece.with_row_index("row", start).filter(pl.col("user_id").is_not_null())
        events = events.join(known, on="item_id", how="semi")
        counted = events.with_columns(events=pl.lit(1), bytes=pl.col("review").str.len_bytes())
        parts.append(counted.select("user_id", pl.col(numbers).cast(pl.Int64)))
        if sum(map(len, parts[1:])) > len(parts[0]):
            parts = [_added(parts)]
    return _added(parts)


def _added(parts: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(parts).group_by("user_id").agg(pl.col("row").min(), pl.col("events", "bytes").sum())


def _order(
    shares: Iterator[pl.DataFrame], folder: Path, scratch: Path, config: DataConfig, report: dict[str, Any]
) -> None:
    """Puts share by share in order, and writes the tables and arrays of a prepared folder."""
    generator = np.random.default_rng(config.seed)
    users: list[pl.Series] = []
    offsets, tables = [np.zeros(1, np.int64)], {TABLE: [], SHORT: []}
    report |= dict.fromkeys(("duplicates", "short_users", "short_user_interactions"), 0)
    for number, share in enumerate(shares):
        share, short = _usable(share, config, report)
        if config.shuffle_ties:
            share = _shuffle_ties(share, generator)
        for name, frame in ((TABLE, share), (SHORT, short)):
            if not len(frame):
                continue
            part = from_frame(frame)
            tables[name].append(scratch / f"{number}-{name}")
            part.save(tables[name][-1])
            if name == TABLE:
                users.append(pl.Series("user_id", part.user_ids, pl.String))
                offsets.append(offsets[-1][-1] + part.offsets[1:])
                for key in MAPPED:
                    with (scratch / key).open("ab") as file:
                        file.write(getattr(part, key).tobytes())
    for name, parts in tables.items():
        if parts:
            table = pl.concat([pl.scan_parquet(part, glob=False) for part in parts], how="diagonal")
            table.sink_parquet(folder / name)
    if users:
        for name, dtype in MAPPED.items():
            np.save(array_path(folder, name), np.memmap(scratch / name, dtype, mode="r"))
        np.save(array_path(folder, "offsets"), np.concatenate(offsets))
        pl.concat(users).to_frame().write_parquet(folder / USERS)


def _usable(share: pl.DataFrame, config: DataConfig, report: dict[str, Any]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The events of a share that are trained on, and those of users with too few; counts what is merged or left out."""
    # Rows of one hash are few, and are all that is compared in full.
    alike = share.hash_rows().is_duplicated().arg_true()
    twice = share[alike]
    # Without a time, the same item again may well be another event.
    copies = twice.is_duplicated() & twice["timestamp"].is_not_null()
    again = alike.filter(copies & ~twice.select(pl.struct(pl.all()).is_first_distinct()).to_series())
    report["duplicates"] += len(again)
    if config.duplicates == "merge" and len(again):
        kept = np.ones(len(share), bool)
        kept[again] = False
        share = share.filter(kept)
    few = share.select(pl.len().over("user_id") < config.min_interactions).to_series()
    short = share.filter(few)
    report["short_users"] += short["user_id"].n_unique()
    report["short_user_interactions"] += len(short)
    return share.filter(~few), short


def _say_counts(config: DataConfig, report: dict[str, Any], where: tuple[str, str], empty: bool) -> None:
    """Warns of what is twice and of what is left out, and refuses a table of which nothing is left."""
    if report["duplicates"]:
        done = "are merged" if config.duplicates == "merge" else "are kept (data.duplicates: merge makes one of each)"
        report["warnings"].append(
            f"{where[0]}: {report['duplicates']} interactions are identical to another one of their user, time "
            f"included; they {done}"
        )
    if report["short_users"]:
        report["warnings"].append(
            f"{report['short_users']} users with fewer than {config.min_interactions} interactions are left out of "
            "training and evaluation; they are served"
        )
    if empty:
        raise DataError(
            f"{where[0]}: no interaction is left of {report['read']}: {report['unknown_items']} are with unknown items "
            f"(not in {where[1]}), {report['missing_ids']} without ids, "
            f"{report['short_user_interactions']} of users with fewer than data.min_interactions"
        )


def _shuffle_ties(frame: pl.DataFrame, generator: np.random.Generator) -> pl.DataFrame:
    """Rows of one user and time change places at random; those without a time keep theirs."""
    draws = pl.Series(generator.random(len(frame)))
    frame = frame.with_row_index("place").with_columns(
        draw=pl.when(pl.col("timestamp").is_null()).then(pl.col("place")).otherwise(draws)
    )
    places = frame.sort("user_id", "timestamp", "place")["place"]
    return frame.sort("user_id", "timestamp", "draw").with_columns(place=places).sort("place").drop("place", "draw")
