"""Items in canonical form: one Parquet file whose columns have one type per modality, read in chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from nqf.config import DataConfig
from nqf.data import numbers, times, values
from nqf.data.errors import DataError
from nqf.data.parquet import checked
from nqf.data.schema import Field, Schema

BAD = "_bad "
"""Prefix of the columns that mark values which could not be read."""
URL = r"^[A-Za-z][A-Za-z0-9+.-]*://"


class Catalogue:
    """The items of a canonical Parquet file; the order of its rows numbers the items everywhere.

    Missing values are null. Column types by modality: text String, category List(String), number Float64, time
    Int64 (unix seconds), geo List(Float64) [latitude, longitude] in degrees, image String (absolute path or URL),
    vector List(Float32) of one length. There are also `item_id` and `title` (String).

    Attributes:
      path: The Parquet file.
      schema: The fields.
      item_ids: Item id of every row.
    """

    def __init__(self, path: str | Path, schema: Schema):
        self.path = checked(Path(path))
        self.schema = schema
        self.item_ids: list[str] = pl.read_parquet(self.path, columns=["item_id"], glob=False)["item_id"].to_list()

    def __len__(self) -> int:
        return len(self.item_ids)

    @functools.cached_property
    def known_ids(self) -> frozenset[str]:
        """The ids, for looking single ones up."""
        return frozenset(self.item_ids)

    def chunks(self, columns: list[str], rows: int) -> Iterator[pl.DataFrame]:
        """Reads some columns in order, at most `rows` items at a time."""
        table = pl.scan_parquet(self.path, glob=False).select(columns)
        for start in range(0, len(self), rows):
            yield table.slice(start, rows).collect()


def canonical_items(frame: pl.DataFrame, schema: Schema, *, folder: Path | str | None = None) -> pl.DataFrame:
    """Brings a few items into canonical form, all values readable or an error.

    Args:
      frame: Column item_id and the schema's columns; a column that is not there is missing in every item.
      schema: The fields, with the formats that the catalogue was read with.
      folder: Where relative image paths start; the working directory by default.

    Raises:
      DataError: No item_id; a duplicate one; a value that does not parse.
    """
    if "item_id" not in frame.columns:
        raise DataError(f"the items have no column 'item_id'; they have {', '.join(frame.columns) or 'no columns'}")
    missing = [name for field in schema.fields for name in field.columns if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in missing)
    # An id that is a word for nothing was let into the catalogue, or was not: it is the same item again.
    table, _ = plain_ids(frame.lazy(), ("item_id",), (), "the new items")
    result = canonical(table, schema, folder or Path.cwd()).collect()
    check_item_ids(result["item_id"], "the new items")
    for field in schema.fields:
        rows = result[BAD + field.name].arg_true()
        if len(rows):
            values = frame.select(field.columns).row(rows[0])
            raise DataError(
                f"the new item '{result['item_id'][rows[0]]}': {field.name} is not a {field.modality}: "
                f"{', '.join(map(repr, values))}; fix it or leave it out"
            )
    lengths = vector_lengths(result.lazy(), schema)
    for name, found in lengths.items():
        if len(found) > 1:
            raise DataError(f"the new items: vectors of '{name}' have {found[0]} and {found[1]} numbers")
    return result.drop(BAD + field.name for field in schema.fields)


def plain_ids(
    table: pl.LazyFrame, columns: Sequence[str], words: Sequence[str], where: str
) -> tuple[pl.LazyFrame, list[str]]:
    """Brings id columns into the form in which they are compared: stripped String, null where there is no id.

    Args:
      table: Has the columns.
      columns: Their names.
      words: Words for nothing.
      where: What errors and notes begin with.

    Returns:
      The table, and notes: which columns' whole floats are read as integers.

    Raises:
      DataError: Floats so large that different ids are the same number.
    """
    dtypes, notes, ids = table.collect_schema(), [], {}
    for name in columns:
        whole = values.whole_ids(table, name, words, where)
        ids[name] = values.identifier(pl.col(name), dtypes[name], words, whole)
        if whole:
            notes.append(f"{where}: every '{name}' is a whole number, some written like 1.0; they are read as 1")
    return table.with_columns(**ids), notes


def missing_ids(absent: pl.LazyFrame, source: pl.LazyFrame, name: str, config: DataConfig, where: str) -> list[str]:
    """Refuses or counts rows without an id, as `data.missing_ids` says.

    Args:
      absent: Column row of those rows, in any order.
      source: The table as it was read, for an example.
      name: The column.
      config: What to do with them.
      where: What errors begin with.

    Returns:
      A warning, if rows are to be left out.

    Raises:
      DataError: There are some, and they are refused.
    """
    count, first = absent.select(pl.len(), pl.col("row").min()).collect(engine="streaming").row(0)
    if not count:
        return []
    value = source.select(name).slice(first, 1).collect().item()
    word = isinstance(value, str) and value.strip() != ""
    what = f"has the {name} '{value}', a word for nothing" if word else f"has no {name}"
    if config.missing_ids == "drop":
        return [f"{where}: {count} rows are left out, as row {first + 1} {what}"]
    keep = f", or keep where '{value}' is an id" if word else ""
    raise DataError(
        f"{where}: row {first + 1} {what} ({count} such rows); remove them, or set data.missing_ids: drop to "
        f"leave them out{keep}"
    )


def resolve(
    table: pl.LazyFrame, schema: Schema, where: str, *, events: bool = False
) -> tuple[Schema, list[str], dict[str, int]]:
    """Decides from whole columns how times and numbers are read, where the schema does not say.

    Args:
      table: All columns of the schema.
      schema: The fields.
      where: What errors and notes begin with.
      events: Whether the rows are interactions, whose times cannot be centuries old.

    Returns:
      The schema with the formats; what was guessed, in words; and, by field, the values that are words for nothing.

    Raises:
      DataError: More than a tenth of a time column's values cannot be read.
    """
    notes, fields = [], []
    for field in schema.fields:
        if field.modality not in ("time", "number"):
            fields.append(field)
            continue
        reading = _reading(table, field, schema.missing_words, events)
        if field.modality == "time" and _hopeless(reading):
            raise DataError(_unreadable(table, field, schema.missing_words, reading, where))
        notes += [f"{where}: {note}" for note in reading.notes]
        fields.append(dataclasses.replace(field, format=reading.formats))
    dtypes = table.collect_schema()
    texts = {
        name: field.name
        for field in schema.fields
        for name in field.columns
        if dtypes[name] in (pl.String, pl.List(pl.String))
    }

    def some(name: str, test: Callable[[pl.Expr], pl.Expr]) -> pl.Expr:
        column = pl.col(name)
        return test(column) if dtypes[name] == pl.String else column.list.eval(test(pl.element())).list.any()

    def is_word(cell: pl.Expr) -> pl.Expr:
        return values.is_word(cell, schema.missing_words)

    counts = table.select(
        *(some(name, is_word).sum().alias(f"word {name}") for name in texts),
        *(some(name, values.has_entity).sum().alias(f"entity {name}") for name in texts),
    )
    found = counts.collect(engine="streaming").row(0, named=True) if texts else {}
    words = {texts[name]: int(found[f"word {name}"]) for name in texts if found[f"word {name}"]}
    if words:
        shown = ", ".join(f"{count} of '{name}'" for name, count in words.items())
        notes.append(f"{where}: words for nothing, such as NA or None, count as missing (data.missing_words): {shown}")
    decoded = [
        f"{found[f'entity {name}']} of '{field.name}'"
        for field in schema.fields
        for name in field.columns
        if field.modality in ("text", "category") and found.get(f"entity {name}")
    ]
    if decoded:
        notes.append(f"{where}: HTML's names of characters, such as &amp;, are decoded: {', '.join(decoded)}")
    return dataclasses.replace(schema, fields=tuple(fields)), notes, words


def _hopeless(reading: values.Reading) -> bool:
    # One slip in a table of a few rows is no reason to think of another spelling.
    few = reading.unreadable == 1 < reading.values
    return reading.unreadable > times.UNREADABLE * reading.values and not few


def _unreadable(table: pl.LazyFrame, field: Field, words: Sequence[str], reading: values.Reading, where: str) -> str:
    column = pl.col(field.columns[0])
    dtype = table.collect_schema()[field.columns[0]]
    time = times.seconds(column, dtype, words, reading.formats)
    unread = table.select(values.there(column, dtype, words) & time.is_null(), column.alias("value")).with_row_index()
    rows = unread.filter(pl.nth(1)).head(3).collect()
    examples = ", ".join(f"{str(value)[:60]!r} in row {row + 1}" for row, _, value in rows.iter_rows())
    return (
        f"{where}: {reading.unreadable} of {reading.values} values of '{field.name}' are not times that can be read "
        f"({', '.join(reading.formats)}): {examples}; write them as 2024-01-31 12:00:00 or as unix seconds, say how "
        "they are meant with the field's format or data.time_format, or empty the cells"
    )


def canonical(
    table: pl.LazyFrame, schema: Schema, folder: Path | str, *, ids: Sequence[str] = ("item_id",)
) -> pl.LazyFrame:
    """Expressions from a source table to canonical columns; only columns without a format are read, to decide it.

    Args:
      table: Columns `ids` and all columns of the schema.
      schema: The fields.
      folder: Where relative image paths start; a text, as of an address, stands before them as it is.
      ids: Columns that are kept as they are, as String.

    Returns:
      The ids, the canonical columns, and per field a Boolean column `BAD + name` that marks values which are there but
      could not be read: not a number, not finite, not a time, out of range.
    """
    if any(not field.format and field.modality in ("time", "number") for field in schema.fields):
        decided = [_decided(table, field, schema.missing_words) for field in schema.fields]
        schema = dataclasses.replace(schema, fields=tuple(decided))
    dtypes, words = table.collect_schema(), schema.missing_words
    read = {field.name: _value(field, dtypes, folder, words) for field in schema.fields}
    title = read[schema.title] if schema.title else pl.lit(None, dtype=pl.String)
    titled = {} if schema.title == "title" else {"title": title}
    bad = {BAD + field.name: _there(field, dtypes, words) & read[field.name].is_null() for field in schema.fields}
    return table.select(**{name: values.text(pl.col(name), dtypes[name], ()) for name in ids}, **titled, **read, **bad)


def _decided(table: pl.LazyFrame, field: Field, words: Sequence[str]) -> Field:
    if field.format or field.modality not in ("time", "number"):
        return field
    return dataclasses.replace(field, format=_reading(table, field, words).formats)


def _reading(table: pl.LazyFrame, field: Field, words: Sequence[str], events: bool = False) -> values.Reading:
    column, given = field.columns[0], field.format
    if field.modality == "time":
        return times.decide(table, column, words=words, given=given, events=events)
    return numbers.decide(table, column, words=words, given=given)


def check_item_ids(item_ids: pl.Series, where: str) -> None:
    """Refuses missing and duplicate item ids.

    Raises:
      DataError: Names the first ones and their rows.
    """
    if item_ids.null_count():
        row = item_ids.is_null().arg_true()[0]
        raise DataError(f"{where}: row {row + 1} has no item_id; every item needs one")
    if item_ids.n_unique() < len(item_ids):
        rows = item_ids.is_duplicated().arg_true()
        first = item_ids[rows[0]]
        where_too = (item_ids == first).arg_true() + 1
        raise DataError(
            f"{where}: duplicate item_id '{first}' in rows {where_too[0]} and {where_too[1]} "
            f"({len(item_ids) - item_ids.n_unique()} rows too many in all); keep one row per item"
        )


def vector_lengths(table: pl.LazyFrame, schema: Schema) -> dict[str, list[int]]:
    """The different lengths of the values of every vector field, ascending."""
    names = [field.name for field in schema.fields if field.modality == "vector"]
    return {
        name: sorted(
            table.select(pl.col(name).list.len().drop_nulls().unique()).collect(engine="streaming")[name].to_list()
        )
        for name in names
    }


def _value(field: Field, dtypes: pl.Schema, folder: Path | str, words: Sequence[str]) -> pl.Expr:
    column, dtype = pl.col(field.columns[0]), dtypes[field.columns[0]]
    if field.modality == "text":
        return values.decoded(values.text(column, dtype, words))
    if field.modality == "category":
        return _categories(field, column, dtype, words)
    if field.modality == "number":
        return numbers.number(column, dtype, words, field.format)
    if field.modality == "time":
        return times.seconds(column, dtype, words, field.format)
    if field.modality == "image":
        path = values.text(column, dtype, words)
        local = pl.concat_str(pl.lit(f"{folder.resolve() if isinstance(folder, Path) else folder}/"), path)
        return pl.when(path.str.contains(URL) | path.str.starts_with("/")).then(path).otherwise(local)
    if field.modality == "vector":
        return _vector(column, dtype, words)
    latitude, longitude = (numbers.number(pl.col(name), dtypes[name], words) for name in field.columns)
    inside = (latitude.abs() <= 90) & (longitude.abs() <= 180)
    return pl.when(inside).then(pl.concat_list(latitude, longitude))


def _categories(field: Field, column: pl.Expr, dtype: pl.DataType, words: Sequence[str]) -> pl.Expr:
    if isinstance(dtype, (pl.List, pl.Array)):
        split = column.cast(pl.List(pl.String))
    elif field.multi_valued:
        # An entity's semicolon is no separator.
        split = values.decoded(values.text(column, dtype, words)).str.split(field.separator)
    else:
        split = pl.concat_list(values.text(column, dtype, words))
    element = values.text(pl.element(), pl.String(), words)
    split = split.list.eval(values.decoded(element.drop_nulls()))
    return pl.when(split.list.len() > 0).then(split)


def _vector(column: pl.Expr, dtype: pl.DataType, words: Sequence[str]) -> pl.Expr:
    if not isinstance(dtype, (pl.List, pl.Array)):
        column = values.text(column, dtype, words).str.strip_chars(" []()\t")
        column = column.str.replace_all(r"[,;\s]+", " ").str.split(" ")
    parts = column.cast(pl.List(pl.String)).list.eval(pl.element().cast(pl.Float32, strict=False))
    finite = parts.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return pl.when((parts.list.len() > 0) & finite).then(parts)


def _there(field: Field, dtypes: pl.Schema, words: Sequence[str]) -> pl.Expr:
    """Whether the source has something for a field that ought to be a value."""
    if field.modality in ("text", "category", "image"):
        return pl.lit(False)
    there = (values.there(pl.col(name), dtypes[name], words) for name in field.columns)
    return pl.any_horizontal(*(part.fill_null(False) for part in there))
