"""A first look at tables: columns, types, fill rates, distinct values, sequence lengths and a schema to start from."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from nqf.config import ColumnsConfig, DataConfig, DialectConfig, from_tree, to_tree
from nqf.data import amazon, recbole, unirec
from nqf.data.columns import CANONICAL, identify, identify_interactions
from nqf.data.errors import DataError
from nqf.data.load import prepare
from nqf.data.nested import plain, unpacked
from nqf.data.numbers import amounts_of
from nqf.data.readers import TEXTS, Table, kind_of, open_table, parts_of
from nqf.data.schema import Field
from nqf.data.text import PLAIN, guess_dialect
from nqf.data.times import guessed
from nqf.files import is_address

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
_WORDS_NAME = re.compile(r"(title|name|description|text|summary)$", re.I)
_INDEX_NAME = re.compile(r"Unnamed: \d+(\.\d+)?|index|level_0|__index_level_\d+__")
_COLUMNS = ColumnsConfig()
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An item table, opened in the way that was guessed.

    Attributes:
      format: What `data.format` has to be.
      table: The table.
      dialect: How it is written, where it is text.
      id: Column of the item ids; None if none was found.
      notes: What was guessed, in words.
    """

    format: str
    table: Table
    dialect: DialectConfig
    id: str | None
    notes: list[str]


def examine(path: Path, columns: ColumnsConfig = _COLUMNS) -> Source:
    """Opens an item table of any kind: those of `nqf.data.readers`, Amazon's metadata, and item dictionaries.

    Args:
      path: The table.
      columns: Names that are known.

    Raises:
      DataError: No such file, an unknown kind of table, or one that is not readable.
    """
    table, dialect, notes = _open(path)
    kind = "recbole" if kind_of(path) in (".inter", ".item") else "table"
    if amazon.is_metadata(table.names):
        return Source(format="amazon-2023", table=table, dialect=dialect, id="item_id", notes=notes)
    if kind_of(path) == ".json" and table.names[:1] == ["item_id"] and {"details", "main_image"} & set(table.names):
        return Source(format="unirec", table=table, dialect=dialect, id="item_id", notes=notes)
    try:
        found, guessed = identify(path, table.names, ("id",), columns)
    except DataError as error:
        return Source(format=kind, table=table, dialect=dialect, id=None, notes=[*notes, str(error)])
    return Source(format=kind, table=table, dialect=dialect, id=found["id"], notes=[*notes, *guessed])


def _open(path: Path) -> tuple[Table, DialectConfig, list[str]]:
    if not path.exists() or kind_of(path) not in TEXTS:
        table = open_table(path)
        return table, PLAIN, list(table.notes)
    dialect, notes = guess_dialect(parts_of(path)[0], separators=TEXTS[kind_of(path)])
    return open_table(path, dialect), dialect, notes


def open_items(source: Source, scratch: Path) -> pl.LazyFrame:
    """All columns of an item table; lists stay lists, also those that are written as texts.

    Args:
      source: From `examine`.
      scratch: Folder for temporary files, which must stay until the frame was collected.

    Returns:
      The columns of the table, those of Amazon's and the reference's items as `nqf.data.amazon.flatten` names them.

    Raises:
      DataError: Rows that cannot be read.
    """
    table, names = source.table, source.table.names
    sample = dict(zip(names, zip(*itertools.islice(table.rows(names), SAMPLE), strict=True), strict=False))
    if source.format in ("amazon-2023", "unirec"):
        kept = [name for name in names if name not in (*_NESTED, "parent_asin", "item_id")]
        extra = [*(amazon.DETAILS if "details" in names else ()), *(["main_image"] if "images" in names else [])]
        names = ["item_id", *dict.fromkeys([*kept, *extra])]
    listed = [name for name in names if _listed(sample.get(name, ())) and not _is_text(name, sample[name], table)]
    fields = {
        name: Field(name=name, modality="category", columns=(name,)) if name in listed else None for name in names
    }
    if source.format == "amazon-2023":
        return amazon.read_items(table.path, scratch, fields, source.dialect)
    if source.format == "unirec":
        return unirec.read_items(table.path, scratch, fields)
    return table.read({name: field for name, field in fields.items() if name not in table.unreadable}, scratch)


def _listed(values: Sequence[Any]) -> bool:
    """Whether the values are lists or objects, or texts that hold such."""
    there = [value for value in values if value is not None and not (isinstance(value, str) and not value.strip())]
    lists = sum(isinstance(unpacked(value) if isinstance(value, str) else value, (list, dict)) for value in there)
    return lists > 0.8 * len(there) if there else False


def _is_text(name: str, values: Sequence[Any], table: Table) -> bool:
    """Whether a sequence of a RecBole file is a title or the like, or has commas between its values, not blanks."""
    if name not in table.sequences:
        return False
    commas = sum(", " in str(plain(value, None)) for value in values if value)
    return bool(_WORDS_NAME.search(name)) or commas > 0.5 * len(values)


def inspect_items(source: Source, scratch: Path) -> list[Column]:
    """Looks at every column of an item table.

    Args:
      source: From `examine`.
      scratch: Folder for temporary files.

    Raises:
      DataError: Not readable, or empty.
    """
    path, table = source.table.path, open_items(source, scratch)
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
        if name == source.id:
            options, note = (
                {},
                "the id of an item" if filled == distinct == rows else "must be there and differ in every row",
            )
        elif _INDEX_NAME.fullmatch(name) and _counts_rows(values):
            options, note = {}, "the numbers of the rows, as pandas writes them"
        elif not filled:
            options, note = {}, "no value at all"
        elif distinct == 1 and filled == rows:
            options, note = {}, "the same value in every row"
        else:
            options, note = _suggest(name, values, distinct / filled)
        columns.append(
            Column(
                name=name,
                kind=str(sample[name].dtype).lower()[:30],
                filled=filled / rows,
                distinct=distinct,
                example=_shorten(values[0]) if len(values) else "",
                options=options,
                note=note,
            )
        )
    return columns


def _counts_rows(values: pl.Series) -> bool:
    numbers = values.cast(pl.String).cast(pl.Int64, strict=False)
    return len(numbers) > 0 and not numbers.null_count() and bool((numbers.diff().drop_nulls() == 1).all())


def _suggest(name: str, values: pl.Series, variety: float) -> tuple[dict[str, Any], str]:
    """Schema options of a column and what to check, from a sample of its values and the share of distinct ones."""
    dtype = values.dtype
    if isinstance(dtype, (pl.List, pl.Array)):
        parts = values.cast(pl.List(pl.String))
        lengths, elements = parts.list.len(), parts.explode(empty_as_null=False)
        if lengths.n_unique() == 1 and lengths[0] > 1 and elements.cast(pl.Float64, strict=False).null_count() == 0:
            return {"modality": "vector"}, f"{lengths[0]} numbers"
        if _float(elements.str.split(" ").list.len().mean()) > 6:
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
    if _TIME_NAME.search(name) and _float(values.abs().min()) >= 1e7:
        return {"modality": "time"}, ""
    if _LATER_NAME.search(name):
        return (
            {"modality": "number", "after_the_fact": True},
            "a total of the day it was collected knows the future; left out unless data.use_after_the_fact is set",
        )
    return {"modality": "number"}, ""


def _suggest_string(name: str, values: pl.Series, variety: float) -> tuple[dict[str, Any], str]:
    def share(mask: pl.Series) -> float:
        return _float(mask.fill_null(False).mean())

    numbers = values.cast(pl.Float64, strict=False)
    if share(numbers.is_not_null()) >= 0.99:
        # A leading zero is that of a code, not of a number.
        if share(values.str.contains(r"^0\d")) > 0.01:
            return {"modality": "category"}, "numbers with leading zeros are taken for codes"
        return _suggest_number(name, numbers.drop_nulls(), variety)
    times, _ = guessed(values)
    if share(times.is_not_null()) >= 0.99:
        return {"modality": "time"}, ""
    if (amounts := amounts_of(values)) is not None:
        return _suggest_number(name, amounts.drop_nulls(), variety)
    if share(values.str.contains(_NUMBERS)) >= 0.99:
        return {"modality": "vector"}, ""
    if share(values.str.contains(_IMAGE)) >= 0.8:
        if share(values.str.contains(_URL)) > 0.5:
            return {}, "links to pictures; modality image where fields.image_encoder is a CLIP model"
        return {"modality": "image"}, ""
    if share(values.str.contains(_URL)) >= 0.8:
        return {}, "links"
    words = _float(values.str.split(" ").list.len().mean())
    for separator in _SEPARATORS:
        if share(values.str.contains(separator, literal=True)) < 0.2:
            continue
        parts = values.str.split(separator).explode(empty_as_null=False).str.strip_chars()
        short = _float(parts.str.split(" ").list.len().mean()) <= 3
        if short and parts.n_unique() <= 0.5 * len(parts):
            return {"modality": "category", "multi_valued": True, "separator": separator}, ""
    if variety == 1 and words < 1.5:
        return {}, "a code that differs in every row"
    if variety <= 0.5 and words <= 5:
        return {"modality": "category"}, ""
    return {"modality": "text"}, ""


def suggest_schema(source: Source, columns: Sequence[Column]) -> str:
    """A schema YAML to start from: what was guessed, with a comment where it ought to be checked.

    Raises:
      DataError: No column can be used.
    """
    if source.format == "amazon-2023":
        return amazon.schema_text()
    by_name = {column.name.lower(): column for column in columns}
    place = next((pair for pair in _PLACES if set(pair) <= by_name.keys()), None)
    taken = {by_name[part].name for part in place or ()}
    title = _title(columns)
    names: set[str] = set()

    def name_of(column: str) -> str:
        # What a schema reserves, and what has that name already.
        name = column.lstrip("_") or "field"
        name = f"{name}_" if name == "item_id" or (name == "title" and column != (title and title.name)) else name
        while name in names:
            name += "_"
        names.add(name)
        return name

    lines = ["fields:"]
    for column in columns:
        if not column.options or column.name in taken:
            if column.name != source.id and column.name not in taken:
                lines.append(f"  # {_plain(column.name)}: left out, {column.note}")
            continue
        options, name = dict(column.options), name_of(column.name)
        if column is title:
            lines.insert(0, f"title: {_plain(name)}")
        if name != column.name:
            options["column"] = column.name
        if column.note:
            lines.append(f"  # {column.note}")
        written = (
            options["modality"]
            if len(options) == 1
            else yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10_000).strip()
        )
        lines.append(f"  {_plain(name)}: {written}")
    if place:
        pair = ", ".join(_plain(by_name[part].name) for part in place)
        lines.append(f"  {_plain(name_of('place'))}: {{modality: geo, columns: [{pair}]}}")
    if not names:
        raise DataError(f"{source.table.path}: no column of it can be a field, so nothing can be learned from it")
    return "\n".join(lines) + "\n"


def _title(columns: Sequence[Column]) -> Column | None:
    texts = [
        column for column in columns if column.options.get("modality") == "text" and not column.name.startswith("_")
    ]
    named = [column for column in texts if _TITLE_NAME.fullmatch(column.name)]
    alike = [column for column in texts if column.name.lower().endswith(("title", "name"))]
    # A field called title has to be the title.
    exact = [column for column in named if column.name == "title"]
    return (exact or named or alike or sorted(texts, key=lambda column: len(column.example)) or [None])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Events:
    """An interaction table, opened in the way that was guessed.

    Attributes:
      path: The file.
      format: What `data.format` has to be, beside the item table that was examined.
      dialect: How it is written, where it is text.
      columns: Columns by role, as `data.columns`.
      frame: The columns user_id and item_id, and timestamp, rating and review where they were found.
      notes: What was guessed, in words.
    """

    path: Path
    format: str
    dialect: DialectConfig
    columns: dict[str, str]
    frame: pl.DataFrame
    notes: list[str]


def open_events(path: Path, scratch: Path, source: Source | None = None, given: ColumnsConfig = _COLUMNS) -> Events:
    """Opens an interaction table.

    Args:
      path: As `nqf.data.readers` reads, RecBole's, Amazon's reviews, or samples of the reference system.
      scratch: Folder for temporary files.
      source: The item table.
      given: Names that are known.

    Raises:
      DataError: Not readable, empty, or without users or items.
    """
    table, dialect, notes = _open(path)
    kind, columns = "table" if source is None else source.format, {}
    wanted = dict.fromkeys(CANONICAL.values())
    if {"history", "candidate", "ground_truth"} <= set(table.names):
        kind = "unirec"
        frame = unirec.read_interactions(path, scratch, wanted).select("user_id", "item_id")
    elif kind == "amazon-2023" and "user_id" in table.names and {"parent_asin", "asin"} & set(table.names):
        frame = amazon.read_reviews(path, scratch, wanted, dialect)
    else:
        kind = "recbole" if kind_of(path) == ".inter" else "table"
        if kind == "recbole":
            table = recbole.open_interactions(path, dialect, given)
        columns, guessed = identify_interactions(path, table.names, given)
        scan = table.read(dict.fromkeys(columns.values()), scratch)
        notes = list(dict.fromkeys([*notes, *guessed, *table.notes]))
        frame = scan.select(pl.col(name).alias(CANONICAL[role]) for role, name in columns.items())
    try:
        collected = frame.collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: could not be read: {str(error)[:300]}") from error
    if not len(collected):
        raise DataError(f"{path}: there is no row in it")
    return Events(path=path, format=kind, dialect=dialect, columns=columns, frame=collected, notes=notes)


def inspect_interactions(events: Events, items: pl.Series | None = None) -> list[tuple[str, str]]:
    """Looks at an interaction table.

    Args:
      events: From `open_events`.
      items: Ids of the item table, to count who is without company.

    Returns:
      Lines of a report: what, and how much.
    """
    frame = events.frame
    names = frame.columns
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
    lines += _times(frame) if "timestamp" in names else [("timestamps", "none; the order of the rows counts")]
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
    days = (known["time"].sort().gather([0, len(known) - 1]) * 1000).cast(pl.Datetime("ms")).dt.date()
    gaps = known.sort("user_id", "time").select(pl.col("time").diff().over("user_id"))["time"].drop_nulls()
    tied = _float((gaps == 0).mean() or 0)
    return [
        ("timestamps", f"{_share(timed['time'])}, {days[0]} to {days[1]}"),
        ("consecutive, at the same time", f"{tied:.1%}"),
    ]


def _float(value: Any) -> float:
    """A statistic of a column, whose type polars does not tell."""
    return float(value)


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


def suggest_config(source: Source, events: Events, schema: str, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """The data section of a configuration that was tried: its tables are read, checked and split by it.

    Args:
      source: The item table.
      events: The interactions.
      schema: The schema YAML.
      scratch: Folder for temporary files.

    Returns:
      The section, with absolute paths and without what is as by default, and what was decided, in words.

    Raises:
      DataError: No configuration of these tables can be trained; says why.
    """
    if source.id is None:
        raise DataError(source.notes[-1])
    (scratch / "schema.yaml").write_text(schema, encoding="utf-8")
    kind = "table" if "table" in (source.format, events.format) else events.format
    tree: dict[str, Any] = {
        "format": kind,
        "items": str(source.table.path.absolute()),
        "interactions": str(events.path.absolute()),
        "schema": str(scratch / "schema.yaml"),
    }
    columns = {role: name for role, name in events.columns.items() if name != CANONICAL[role]}
    if kind in ("table", "recbole") and source.id not in ("item_id", columns.get("item")):
        columns["id"] = source.id
    options = {"columns": columns, "items_dialect": _changed(source), "interactions_dialect": _changed(events)}
    tree |= {key: section for key, section in options.items() if section}
    failure: DataError | None = None
    for split in ("temporal", "leave-one-out") if "timestamp" in events.frame.columns else ("leave-one-out",):
        data = from_tree(DataConfig, {**tree, "split": split}, where="data")
        try:
            prepare(data, scratch / "prepared")
        except DataError as error:
            failure = failure or error
            continue
        reason = "" if failure is None else f", as the temporal split does not work: {str(failure).split(';')[0]}"
        return {**tree, "split": split}, [f"data.split: {split}{reason}"]
    raise failure or DataError(f"{events.path}: there is no way to split it")


def _changed(opened: Source | Events) -> dict[str, Any]:
    usual = to_tree(PLAIN)
    return {key: value for key, value in to_tree(opened.dialect).items() if value != usual[key]}


def config_text(data: dict[str, Any], folder: Path) -> str:
    """A configuration YAML for a folder that also holds its schema.yaml."""
    local = [key for key in ("items", "interactions") if not is_address(data[key])]
    where = {key: os.path.relpath(data[key], folder.absolute()) for key in local}
    tree = {"name": folder.resolve().name or "shop", "data": {**data, **where, "schema": "schema.yaml"}}
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)
    return f"# Train with: python -m nqf.train --config THIS_FILE\n{text}"
