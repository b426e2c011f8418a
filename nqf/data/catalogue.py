"""Items in canonical form: one Parquet file whose columns have one type per modality, read in chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from nqf.data.errors import DataError
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
        self.path = Path(path)
        self.schema = schema
        self.item_ids: list[str] = pl.read_parquet(self.path, columns=["item_id"])["item_id"].to_list()

    def __len__(self) -> int:
        return len(self.item_ids)

    def chunks(self, columns: list[str], rows: int) -> Iterator[pl.DataFrame]:
        """Reads some columns in order, at most `rows` items at a time."""
        table = pl.scan_parquet(self.path).select(columns)
        for start in range(0, len(self), rows):
            yield table.slice(start, rows).collect()


def canonical_items(
    frame: pl.DataFrame, schema: Schema, *, taken: Collection[str] = (), folder: Path | None = None
) -> pl.DataFrame:
    """Brings a few items into canonical form, all values readable or an error.

    Args:
      frame: Column item_id and the schema's columns; a column that is not there is missing in every item.
      schema: The fields.
      taken: Item ids that exist already.
      folder: Where relative image paths start; the working directory by default.

    Raises:
      DataError: No item_id; a duplicate or taken one; a value that does not parse.
    """
    if "item_id" not in frame.columns:
        raise DataError(f"the items have no column 'item_id'; they have {', '.join(frame.columns) or 'no columns'}")
    missing = [name for field in schema.fields for name in field.columns if name not in frame.columns]
    frame = frame.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in missing)
    result = canonical(frame.lazy(), schema, folder or Path.cwd()).collect()
    check_item_ids(result["item_id"], "the new items")
    known = [item_id for item_id in result["item_id"] if item_id in taken]
    if known:
        raise DataError(f"{len(known)} of the new items are in the catalogue already, such as item_id '{known[0]}'")
    for field in schema.fields:
        rows = result[BAD + field.name].arg_true()
        if len(rows):
            values = frame.select(field.columns).row(rows[0])
            raise DataError(
                f"the new item '{result['item_id'][rows[0]]}': {field.name} is not a {field.modality}: "
                f"{', '.join(map(repr, values))}; mend it or leave it out"
            )
    lengths = vector_lengths(result.lazy(), schema)
    for name, found in lengths.items():
        if len(found) > 1:
            raise DataError(f"the new items: vectors of '{name}' have {found[0]} and {found[1]} numbers")
    return result.drop(BAD + field.name for field in schema.fields)


def canonical(table: pl.LazyFrame, schema: Schema, folder: Path) -> pl.LazyFrame:
    """Expressions from a source table to canonical columns; nothing is read yet.

    Args:
      table: Column item_id and all columns of the schema.
      schema: The fields.
      folder: Where relative image paths start.

    Returns:
      The canonical columns, and per field a Boolean column `BAD + name` that marks values which are there but
      could not be read: not a number, not finite, not a time, out of range.
    """
    dtypes = table.collect_schema()
    values = {field.name: _value(field, dtypes, folder) for field in schema.fields}
    title = values[schema.title] if schema.title else pl.lit(None, dtype=pl.String)
    titled = {} if schema.title == "title" else {"title": title}
    bad = {BAD + field.name: _there(field, dtypes) & values[field.name].is_null() for field in schema.fields}
    return table.select(item_id=_string(pl.col("item_id"), dtypes["item_id"]), **titled, **values, **bad)


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


def unix_seconds(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Int64 unix seconds of dates, ISO 8601 strings (UTC unless they say otherwise) and numbers.

    Numbers are seconds, milliseconds, microseconds or nanoseconds by their magnitude: seconds stay below 1e11
    until the year 5138, and milliseconds are above it since March 1973.
    """
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return value.dt.epoch("s")
    if dtype == pl.String:
        text = value.str.strip_chars()
        # One pattern per spelling: with several the first that fits decides, whatever comes after it.
        zoned = text.str.replace(r"(?i)z$", "+00:00")
        times = [
            zoned.str.to_datetime(pattern, strict=False, time_zone="UTC").dt.epoch("s")
            for pattern in ("%Y-%m-%dT%H:%M:%S%.f%:z", "%Y-%m-%d %H:%M:%S%.f%:z")
        ] + [
            text.str.to_datetime(pattern, strict=False).dt.epoch("s")
            for pattern in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M")
        ]
        times.append(text.str.to_date("%Y-%m-%d", strict=False).dt.epoch("s"))
        whole = text.cast(pl.Int64, strict=False)
        return pl.coalesce(_scale_down(whole), _scale_down(_whole(text.cast(pl.Float64, strict=False))), *times)
    return _scale_down(_whole(value) if dtype.is_float() else value.cast(pl.Int64, strict=False))


def _whole(value: pl.Expr) -> pl.Expr:
    return pl.when(value.is_finite()).then(value).cast(pl.Int64, strict=False)


def _scale_down(value: pl.Expr) -> pl.Expr:
    size = value.abs()
    # floor_div keeps whole numbers exact; times before 1970 round towards the past, as seconds do.
    scale = pl.when(size < 10**11).then(1).when(size < 10**14).then(10**3).when(size < 10**17).then(10**6)
    return value // scale.otherwise(10**9).cast(pl.Int64)


def _string(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if isinstance(dtype, (pl.List, pl.Array)):
        value = value.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    text = value.cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def _number(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    number = _string(value, dtype).cast(pl.Float64, strict=False) if dtype == pl.String else value.cast(pl.Float64)
    return pl.when(number.is_finite()).then(number)


def _value(field: Field, dtypes: pl.Schema, folder: Path) -> pl.Expr:
    column, dtype = pl.col(field.columns[0]), dtypes[field.columns[0]]
    if field.modality == "text":
        return _string(column, dtype)
    if field.modality == "category":
        return _categories(field, column, dtype)
    if field.modality == "number":
        return _number(column, dtype)
    if field.modality == "time":
        return unix_seconds(column, dtype)
    if field.modality == "image":
        path = _string(column, dtype)
        local = pl.concat_str(pl.lit(f"{folder.resolve()}/"), path)
        return pl.when(path.str.contains(URL) | path.str.starts_with("/")).then(path).otherwise(local)
    if field.modality == "vector":
        return _vector(column, dtype)
    latitude, longitude = (_number(pl.col(name), dtypes[name]) for name in field.columns)
    inside = (latitude.abs() <= 90) & (longitude.abs() <= 180)
    return pl.when(inside).then(pl.concat_list(latitude, longitude))


def _categories(field: Field, column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if isinstance(dtype, (pl.List, pl.Array)):
        values = column.cast(pl.List(pl.String))
    elif field.multi_valued:
        values = column.cast(pl.String).str.split(field.separator)
    else:
        values = pl.concat_list(column.cast(pl.String))
    element = pl.element().str.strip_chars()
    values = values.list.eval(element.filter(element != ""))
    return pl.when(values.list.len() > 0).then(values)


def _vector(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if not isinstance(dtype, (pl.List, pl.Array)):
        column = column.cast(pl.String).str.strip_chars(" []()\t").str.replace_all(r"[,;\s]+", " ").str.split(" ")
    values = column.cast(pl.List(pl.String)).list.eval(pl.element().cast(pl.Float32, strict=False))
    finite = values.list.eval(pl.element().is_finite().fill_null(False)).list.all()
    return pl.when((values.list.len() > 0) & finite).then(values)


def _there(field: Field, dtypes: pl.Schema) -> pl.Expr:
    """Whether the source has something for a field that ought to be a value."""
    if field.modality in ("text", "category", "image"):
        return pl.lit(False)
    parts = []
    for name in field.columns:
        dtype, column = dtypes[name], pl.col(name)
        if isinstance(dtype, (pl.List, pl.Array)):
            parts.append(column.cast(pl.List(pl.String)).list.len() > 0)
        else:
            parts.append(_string(column, dtype).is_not_null() if dtype == pl.String else column.is_not_null())
    return pl.any_horizontal(*(part.fill_null(False) for part in parts))
