"""A first look at tables: columns, types, fill rates, distinct values, sequence lengths and a schema to start from."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from nqf.data import amazon, recbole, unirec
from nqf.data.errors import DataError
from nqf.data.readers import read_header, read_json_lines, read_table, unzipped
from nqf.data.schema import Field
from nqf.data.times import guessed

SAMPLE = 10_000
"""Rows that a modality is guessed from; counts are over all rows."""
_TIME_NAME = re.compile(r"(^|_)(time|timestamp|date|datetime|released?|created|updated|published)(_|$)|_at$", re.I)
_LATER_NAME = re.compile(
    r"(^|_)(rank|popularity|votes?)(_|$)|(average|avg|mean)_?rating|"
    r"(rating|review|view|sale|download)s?_?(num|number|count|total)|(num|number|count|total)_?(of_)?(rating|review|view|sale)",
    re.I,
)
_TITLE_NAME = re.compile(r"((item|product|movie|book|track|article)_?)?(title|name)", re.I)
_IMAGE = r"(?i)\.(jpe?g|png|webp|gif|bmp|tiff?)(\?.*)?$"
_URL = r"(?i)^https?://"
_NUMBERS = r"^\s*[\[(]?\s*-?\d[\d.eE+-]*(\s*[,; ]\s*-?\d[\d.eE+-]*){3,}\s*[\])]?\s*$"
_SEPARATORS = ("|", ">", ";", ",")
_PLACES = (("lat", "lon"), ("lat", "lng"), ("latitude", "longitude"))
_NESTED = ("images", "videos", "details", "bought_together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """What is known of a column.

    Attributes:
      name: Name in the table.
      kind: Type as stored; of text files always string.
      filled: Share of the rows, 0 to 1, that have a value.
      distinct: Number of distinct values.
      example: The first value, shortened.
      options: Options of a schema field; empty if the column had better be left out.
      note: Why, or what to check.
    """

    name: str
    kind: str
    filled: float
    distinct: int
    example: str
    options: dict[str, Any]
    note: str


def open_table(path: Path, scratch: Path) -> pl.LazyFrame:
    """All columns of a table that nqf can read, whatever its kind; lists stay lists where the format has them.

    Args:
      path: CSV, TSV, JSONL or Parquet; RecBole's .inter and .item; raw Amazon 2023 metadata; an item dictionary of
        the reference system (.json).
      scratch: Folder for temporary files, which must stay until the frame was collected.

    Raises:
      DataError: No such file, an unknown kind of table, or one that is not readable.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = "".join((suffixes[:-1] if zipped else suffixes)[-1:])
    if suffix in (".inter", ".item", ".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        plain = unzipped(path, scratch) if zipped else path
        names = read_header(plain, separator, quoted=suffix == ".csv", where=path)
        if suffix in (".inter", ".item"):
            return recbole.read_atomic(path, scratch, dict.fromkeys(name.rpartition(":")[0] for name in names))
        return read_table(path, scratch, dict.fromkeys(names))
    if suffix in (".jsonl", ".ndjson"):
        return _open_json(read_json_lines(path), path, scratch)
    if suffix == ".json":
        return _open_json(unirec.read_json(path, dict).values(), path, scratch)
    names = []
    if suffix == ".parquet":
        try:
            names = list(pl.read_parquet_schema(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not readable as Parquet: {error}") from error
    return read_table(path, scratch, dict.fromkeys(names))


def _open_json(rows: Iterable[dict[str, Any]], path: Path, scratch: Path) -> pl.LazyFrame:
    listed: dict[str, bool] = {}
    for row in rows:
        for key, value in row.items():
            listed[key] = listed.get(key, False) or isinstance(value, list)
    dictionary = path.suffix.lower() == ".json"
    if dictionary or {"parent_asin", "details"} <= listed.keys():
        kept = [key for key in listed if key not in _NESTED and key != "parent_asin"]
        extra = [*(amazon.DETAILS if "details" in listed else ()), *(["main_image"] if "images" in listed else [])]
        names = ["item_id", *dict.fromkeys([*kept, *extra])]
        reader = unirec.read_items if dictionary else amazon.read_items
    else:
        names, reader = list(listed), read_table
    fields = {
        name: Field(name=name, modality="category", columns=(name,)) if listed.get(name) else None for name in names
    }
    return reader(path, scratch, fields)


def inspect_items(path: Path, scratch: Path) -> list[Column]:
    """Looks at every column of an item table.

    Args:
      path: As `open_table` reads.
      scratch: Folder for temporary files.

    Raises:
      DataError: Not readable, or empty.
    """
    table = open_table(path, scratch)
    names = table.collect_schema().names()
    counts = table.select(
        pl.len().alias("rows"),
        *(pl.col(name).null_count().alias(f"null {name}") for name in names),
        *(pl.col(name).drop_nulls().n_unique().alias(f"distinct {name}") for name in names),
    ).collect(engine="streaming")
    rows = int(counts["rows"].item())
    if not rows:
        raise DataError(f"{path}: there is no row in it")
    sample = table.head(SAMPLE).collect()
    columns = []
    for name in names:
        values = sample[name].drop_nulls()
        filled = rows - int(counts[f"null {name}"].item())
        distinct = int(counts[f"distinct {name}"].item())
        if name == "item_id":
            options, note = (
                {},
                "the id of an item" if filled == distinct == rows else "must be there and differ in every row",
            )
        elif not filled:
            options, note = {}, "no value at all"
        elif distinct == 1 and filled == rows:
            options, note = {}, "the same value in every row"
        else:
            options, note = _suggest(name, values, distinct / filled)
        columns.append(
            Column(
                name=name,
                kind=str(sample[name].dtype).lower(),
                filled=filled / rows,
                distinct=distinct,
                example=_shorten(values[0]) if len(values) else "",
                options=options,
                note=note,
            )
        )
    return columns


def _suggest(name: str, values: pl.Series, variety: float) -> tuple[dict[str, Any], str]:
    """Schema options of a column and what to check, from a sample of its values and the share of distinct ones."""
    dtype = values.dtype
    if isinstance(dtype, (pl.List, pl.Array)):
        parts = values.cast(pl.List(pl.String))
        lengths, elements = parts.list.len(), parts.explode(empty_as_null=False)
        if lengths.n_unique() == 1 and lengths[0] > 1 and elements.cast(pl.Float64, strict=False).null_count() == 0:
            return {"modality": "vector"}, f"{lengths[0]} numbers"
        if elements.str.split(" ").list.len().mean() > 6:
            return {"modality": "text"}, "lists of sentences are joined"
        return {"modality": "category"}, ""
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return {"modality": "time"}, ""
    if dtype.is_nested():
        return {}, "nested; take out what is needed into columns of their own"
    if dtype == pl.Boolean:
        return {"modality": "category"}, ""
    if dtype == pl.String:
        values = values.str.strip_chars()
        values = values.filter(values != "")
        if not len(values):
            return {}, "blank values only"
        return _suggest_string(name, values, variety)
    return _suggest_number(name, values.cast(pl.Float64), variety)


def _suggest_number(name: str, values: pl.Series, variety: float) -> tuple[dict[str, Any], str]:
    if variety == 1 and name.lower().endswith("id"):
        return {}, "a code that differs in every row"
    if _TIME_NAME.search(name) and values.abs().min() >= 1e7:
        return {"modality": "time"}, ""
    if _LATER_NAME.search(name):
        return (
            {"modality": "number", "after_the_fact": True},
            "a total of the day it was collected knows the future; left out unless data.use_after_the_fact is set",
        )
    return {"modality": "number"}, ""


def _suggest_string(name: str, values: pl.Series, variety: float) -> tuple[dict[str, Any], str]:
    def share(mask: pl.Series) -> float:
        return float(mask.fill_null(False).mean())

    numbers = values.cast(pl.Float64, strict=False)
    if share(numbers.is_not_null()) >= 0.99:
        # A leading zero is that of a code, not of a number.
        if share(values.str.contains(r"^0\d")) > 0.01:
            return {"modality": "category"}, "numbers with leading zeros are taken for codes"
        return _suggest_number(name, numbers.drop_nulls(), variety)
    times, _ = guessed(values)
    if share(times.is_not_null()) >= 0.99:
        return {"modality": "time"}, ""
    if share(values.str.contains(_NUMBERS)) >= 0.99:
        return {"modality": "vector"}, ""
    if share(values.str.contains(_IMAGE)) >= 0.8:
        if share(values.str.contains(_URL)) > 0.5:
            return {}, "links to pictures; modality image where fields.image_encoder is a CLIP model"
        return {"modality": "image"}, ""
    if share(values.str.contains(_URL)) >= 0.8:
        return {}, "links"
    words = float(values.str.split(" ").list.len().mean())
    for separator in _SEPARATORS:
        if share(values.str.contains(separator, literal=True)) < 0.2:
            continue
        parts = values.str.split(separator).explode(empty_as_null=False).str.strip_chars()
        short = float(parts.str.split(" ").list.len().mean()) <= 3
        if short and parts.n_unique() <= 0.5 * len(parts):
            return {"modality": "category", "multi_valued": True, "separator": separator}, ""
    if variety == 1 and words < 1.5:
        return {}, "a code that differs in every row"
    if variety <= 0.5 and words <= 5:
        return {"modality": "category"}, ""
    return {"modality": "text"}, ""


def suggest_schema(columns: Sequence[Column]) -> str:
    """A schema YAML to start from: what was guessed, with a comment where it ought to be checked."""
    by_name = {column.name.lower(): column for column in columns}
    place = next((pair for pair in _PLACES if set(pair) <= by_name.keys()), None)
    taken = {by_name[part].name for part in place or ()}
    title = _title(columns)
    lines = [f"title: {_plain(title.name)}"] if title else []
    lines.append("fields:")
    for column in columns:
        if not column.options or column.name in taken:
            if column.name != "item_id" and column.name not in taken:
                lines.append(f"  # {_plain(column.name)}: left out, {column.note}")
            continue
        options = dict(column.options)
        if column.name.startswith("_"):
            options["column"] = column.name
        if column.note:
            lines.append(f"  # {column.note}")
        plain = (
            options["modality"]
            if len(options) == 1
            else yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10_000).strip()
        )
        lines.append(f"  {_plain(column.name.lstrip('_') or 'field')}: {plain}")
    if place:
        pair = ", ".join(_plain(by_name[part].name) for part in place)
        lines.append(f"  place: {{modality: geo, columns: [{pair}]}}")
    return "\n".join(lines) + "\n"


def _title(columns: Sequence[Column]) -> Column | None:
    texts = [
        column for column in columns if column.options.get("modality") == "text" and not column.name.startswith("_")
    ]
    named = [column for column in texts if _TITLE_NAME.fullmatch(column.name)]
    # A field called title has to be the title.
    exact = [column for column in named if column.name == "title"]
    return (exact or named or sorted(texts, key=lambda column: len(column.example)) or [None])[0]


def inspect_interactions(path: Path, scratch: Path, items: pl.Series | None = None) -> list[tuple[str, str]]:
    """Looks at an interaction table.

    Args:
      path: As `open_table` reads, or raw Amazon 2023 reviews; columns user_id and item_id, optionally timestamp,
        rating and review.
      scratch: Folder for temporary files.
      items: Ids of the item table, to count who is without company.

    Returns:
      Lines of a report: what, and how much.

    Raises:
      DataError: Not readable, empty, or without users or items.
    """
    wanted = {"user_id": None, "item_id": None, "timestamp": None, "rating": None, "review": None}
    table = open_table(path, scratch)
    names = table.collect_schema().names()
    if "parent_asin" in names and "item_id" not in names:
        table, names = amazon.read_reviews(path, scratch, wanted), list(wanted)
    for name in ("user_id", "item_id"):
        if name not in names:
            raise DataError(f"{path}: no column '{name}'; it has {', '.join(names)}; rename the one that is meant")
    frame = table.select(name for name in wanted if name in names).collect()
    if not len(frame):
        raise DataError(f"{path}: there is no row in it")
    lengths = frame.group_by("user_id").len()["len"]
    counts = frame.group_by("item_id").len()["len"]
    lines = [
        ("interactions", f"{len(frame):,}"),
        ("users", f"{len(lengths):,}"),
        ("items in them", f"{len(counts):,}"),
        ("history length", _spread(lengths)),
        ("users with fewer than 3", f"{(lengths < 3).sum():,}"),
        ("interactions per item", _spread(counts)),
        ("the same user and item again", f"{len(frame) - frame.select('user_id', 'item_id').n_unique():,}"),
    ]
    if items is not None:
        known = frame["item_id"].cast(pl.String).is_in(items.cast(pl.String).implode())
        unused = ~items.cast(pl.String).is_in(frame["item_id"].cast(pl.String).unique().implode())
        lines += [
            ("with unknown items", f"{(~known).sum():,}"),
            ("items without any interaction", f"{unused.sum():,}"),
        ]
    if "timestamp" in names:
        lines += _times(frame)
    if "rating" in names:
        rating = frame["rating"].cast(pl.Float64, strict=False)
        lines.append(
            (
                "ratings",
                f"{_share(rating)}, {rating.min():g} to {rating.max():g}, mean {rating.mean():.2f}"
                if rating.count()
                else "none",
            )
        )
    if "review" in names:
        lines.append(("reviews", _share(frame["review"])))
    return lines


def _times(frame: pl.DataFrame) -> list[tuple[str, str]]:
    timed = frame.select("user_id", guessed(frame["timestamp"])[0].alias("time"))
    known = timed.drop_nulls()
    if not len(known):
        return [("timestamps", "none; the order of the rows counts")]
    days = pl.Series([known["time"].min() * 1000, known["time"].max() * 1000]).cast(pl.Datetime("ms")).dt.date()
    gaps = known.sort("user_id", "time").select(pl.col("time").diff().over("user_id"))["time"].drop_nulls()
    tied = float((gaps == 0).mean() or 0)
    return [
        ("timestamps", f"{_share(timed['time'])}, {days[0]} to {days[1]}"),
        ("consecutive, at the same time", f"{tied:.1%}"),
    ]


def _spread(values: pl.Series) -> str:
    middle = f"median {values.median():,.4g}, mean {values.mean():,.4g}, 95 % at most {values.quantile(0.95):,.4g}"
    return f"{values.min():,} to {values.max():,}, {middle}"


def _share(values: pl.Series) -> str:
    return f"{1 - values.null_count() / len(values):.1%} filled"


def _plain(name: str) -> str:
    return yaml.safe_dump(name, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _shorten(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (pl.Series, list)) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"


def suggest_config(items: Path, interactions: Path, folder: Path) -> str:
    """A configuration YAML for two tables and the schema.yaml of a folder."""
    suffixes = [suffix.lower() for suffix in items.suffixes]
    kind = "table"
    if ".item" in suffixes:
        kind = "recbole"
    elif ".json" in suffixes:
        kind = "unirec"
    elif {".jsonl", ".ndjson"} & set(suffixes) and "parent_asin" in next(read_json_lines(items)):
        kind = "amazon-2023"
    where = [os.path.relpath(path, folder) for path in (items, interactions)]
    return (
        "# Train with: python -m nqf.train --config THIS_FILE\n"
        f"name: {_plain(folder.resolve().name)}\n"
        f"data:\n  format: {kind}\n  items: {_plain(where[0])}\n  interactions: {_plain(where[1])}\n"
        "  schema: schema.yaml\n"
    )
