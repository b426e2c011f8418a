"""What the cells of a table say: ids, words for nothing, HTML's characters.

Times and numbers have one reading per column, which is decided from all its values (`nqf.data.times`,
`nqf.data.numbers`) and carried by the field's `format`, so that new items are read in the same way.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import Literal, get_args

import polars as pl

from nqf.config import MISSING_WORDS, TimeFormat
from nqf.data.errors import DataError

NumberFormat = Literal["decimal-point", "decimal-comma"]
Format = Literal[TimeFormat, NumberFormat]
"""How a column is read.

Numbers of a time field are `seconds` to `nanoseconds` since 1970, calendar `digits` (YYYY, YYYYMM, YYYYMMDD and longer)
or `excel`'s days since 1899-12-30; 3/4/2019 in it is `month-first` or `day-first`; 1,299 and 1.299 in a number field
depend on `decimal-point` or `decimal-comma`.
"""
TIME_FORMATS: tuple[TimeFormat, ...] = get_args(TimeFormat)
NUMBER_FORMATS: tuple[NumberFormat, ...] = get_args(NumberFormat)

BLANKS = r"[\s\x{a0}\x{2009}\x{202f}]+"
"""White space, also what does not break."""
# A named or numbered character of HTML; without the semicolon, `R&D &notes` would hold one.
_ENTITY = r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a column is read.

    Attributes:
      formats: The decision, as a field's `format` holds it.
      notes: What was guessed or is strange, in words.
      unreadable: Values that are there and could not be read.
      values: Values that are there.
    """

    formats: tuple[Format, ...]
    notes: tuple[str, ...]
    unreadable: int
    values: int


def text(value: pl.Expr, dtype: pl.DataType, words: Sequence[str] = MISSING_WORDS) -> pl.Expr:
    """A column as stripped String, null where there is nothing: null, NaN, empty, or one of `words`."""
    if isinstance(dtype, (pl.List, pl.Array)):
        element = text(pl.element(), pl.String(), words)
        joined = value.cast(pl.List(pl.String)).list.eval(element.drop_nulls()).list.join(" ")
        return pl.when(joined != "").then(joined)
    if dtype.is_float():
        value = value.fill_nan(None)
    stripped = as_text(value, dtype).str.strip_chars()
    return pl.when(~stripped.is_in(["", *words])).then(stripped)


def as_text(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """A column as String; durations as ISO 8601 has them, which polars casts to nothing."""
    return value.dt.to_string("iso") if isinstance(dtype, pl.Duration) else value.cast(pl.String)


def identifier(value: pl.Expr, dtype: pl.DataType, words: Sequence[str], whole: bool) -> pl.Expr:
    """Ids as stripped String, null where there is none; whole floats without their `.0` if `whole`."""
    if whole and dtype.is_float():
        return value.fill_nan(None).cast(pl.Int64, strict=False).cast(pl.String)
    found = text(value, dtype, words)
    return found.str.replace(r"\.0+$", "") if whole else found


def whole_ids(table: pl.LazyFrame, column: str, words: Sequence[str], where: str) -> bool:
    """Whether all ids of a column are whole numbers and some are written as floats, as a column with a gap makes them.

    Raises:
      DataError: There are floats so large that different ids are the same number.
    """
    dtype = table.collect_schema()[column]
    if not dtype.is_float() and dtype != pl.String:
        return False
    found = text(pl.col(column), dtype, words)
    if dtype.is_float():
        value = pl.col(column).fill_nan(None)
        whole, some, large = (value == value.floor()).all(), value.is_not_null().any(), value.abs().max()
    else:
        whole, some = found.str.contains(r"^-?\d+(\.0+)?$").all(), found.str.contains(r"^-?\d+\.0+$").any()
        large = pl.lit(0.0)
    row = table.select(whole=whole, some=some, large=large).collect(engine="streaming").row(0, named=True)
    digits = 24 if dtype == pl.Float32 else 53
    if (row["large"] or 0) >= 2**digits:
        raise DataError(
            f"{where}: column '{column}' holds ids as floating-point numbers beyond 2^{digits}, such as "
            f"{row['large']:.0f}: their last digits are lost; store them as text or as integers"
        )
    return bool(row["whole"] and row["some"])


def is_word(value: pl.Expr, words: Sequence[str]) -> pl.Expr:
    """Whether a String is one of the words for nothing."""
    return value.str.strip_chars().is_in(list(words))


def has_entity(value: pl.Expr) -> pl.Expr:
    """Whether `decoded` might find something in a String."""
    return value.str.contains(_ENTITY)


def decoded(value: pl.Expr) -> pl.Expr:
    """Text with HTML's named and numbered characters (`&amp;`, `&#39;`) as the characters themselves.

    What was escaped twice is decoded twice; names without a semicolon and unknown ones stay.
    """

    def decode(values: pl.Series) -> pl.Series:
        found = values.filter(values.str.contains(_ENTITY).fill_null(False)).unique()
        if not len(found):
            return values
        return values.replace(found, pl.Series([_unescaped(entry) for entry in found], dtype=pl.String))

    return value.map_batches(decode, return_dtype=pl.String, is_elementwise=True)


def _unescaped(entry: str) -> str:
    before = ""
    # Every round makes the text shorter, so it ends.
    while before != entry:
        before, entry = entry, re.sub(_ENTITY, lambda match: html.unescape(match[0]), entry)
    return entry.strip()


def there(value: pl.Expr, dtype: pl.DataType, words: Sequence[str]) -> pl.Expr:
    """Whether there is a value that ought to be readable."""
    if isinstance(dtype, (pl.List, pl.Array)):
        return (value.cast(pl.List(pl.String)).list.len() > 0).fill_null(False)
    return text(value, dtype, words).is_not_null() if dtype == pl.String or dtype.is_float() else value.is_not_null()
