"""Numbers as people write them: prices with a currency, separators of thousands, ranges, decimal commas."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from nqf.config import MISSING_WORDS
from nqf.data.values import BLANKS, NUMBER_FORMATS, NumberFormat, Reading, text, there

# Signs and names that stand before or behind a price: all currency signs, ISO 4217 codes of the usual shops, and the
# words that have no sign of their own.
_CURRENCY = (
    r"(?:[a-z]{0,3}\p{Sc}|usd|eur|gbp|jpy|cny|rmb|inr|krw|brl|mxn|cad|aud|nzd|chf|sek|nok|dkk|pln|czk|huf|ron|bgn|rub|"
    r"uah|try|ils|zar|aed|sar|sgd|hkd|twd|thb|idr|myr|php|vnd|ars|clp|cop|rs\.?|kr\.?|zł|kč|lei|tl|руб\.?|元|円)"
)
_FROM = r"^(?:from|starting at|starts at|as low as|ab|à partir de|dès|desde|da) "
_AMOUNT = r"[.,]?\d[\d.,'’ ]*"
_PRICE = rf"^(?:([+-]?) ?{_CURRENCY} ?)?([+-]?{_AMOUNT}?) ?(?:{_CURRENCY}|,-|/-|\.-)?$"
_RANGE = r"^(?P<low>.*\d\D*?)(?: (?:-|–|—|to|bis) |[-–—])(?P<high>\D*\d.*)$"
_NUMBERS = {
    "plain": r"^(?:\d+|0?\.\d+|\d+\.|0\.\d+|\d{4,}\.\d+|\d+\.\d{1,2}|\d+\.\d{4,})$",
    "dot": r"^[1-9]\d{0,2}\.\d{3}$",
    "comma": r"^[1-9]\d{0,2},\d{3}$",
    "point": r"^(?:\d{1,3}(?:,\d{2,3})*,\d{3}\.\d+|\d{1,3}(?:,\d{2,3})+,\d{3})$",
    "european": r"^(?:\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d*,\d+)$",
}


def number(
    value: pl.Expr,
    dtype: pl.DataType,
    words: Sequence[str] = MISSING_WORDS,
    formats: Sequence[str] = ("decimal-point",),
) -> pl.Expr:
    """Finite Float64 of numbers and texts; of a range, and of `from 14.99`, the lower end.

    Args:
      value: The column.
      dtype: Its type.
      words: Words for nothing.
      formats: What `decide` found.
    """
    if dtype != pl.String:
        found = text(value, dtype, words) if dtype.is_nested() else value
        found = found.cast(pl.Float64, strict=False)
        return pl.when(found.is_finite()).then(found)
    # On series: as expressions, every step would be written out for each use of the one before.
    return value.map_batches(
        lambda series: _numbers(series, words, formats), return_dtype=pl.Float64, is_elementwise=True
    )


def decide(
    table: pl.LazyFrame, column: str, *, words: Sequence[str] = MISSING_WORDS, given: Sequence[str] = ()
) -> Reading:
    """Decides from all values of a column how its numbers are read.

    Args:
      table: Has the column.
      column: Its name.
      words: Words for nothing.
      given: What the schema says already.
    """
    dtype, notes = table.collect_schema()[column], []
    formats: tuple[NumberFormat, ...] = tuple(entry for entry in NUMBER_FORMATS if entry in given)
    if dtype == pl.String:
        amounts = table.select(
            pl.col(column)
            .map_batches(lambda series: _amounts(series, words), return_dtype=pl.Struct(_AMOUNTS), is_elementwise=True)
            .struct.unnest()
        )
        pointed = pl.col("digits").str.contains(".", literal=True)
        known = amounts.filter(pl.col("kind").is_not_null()).with_columns(
            pointed=pointed, priced=pl.col("plain").is_null()
        )
        groups = known.group_by("kind", "pointed", "priced", "lower", "sign")
        found = groups.agg(count=pl.len(), example=pl.col("shown").min()).collect(engine="streaming")
        formats = formats or _number_formats(found)
        notes = _number_notes(found, column, formats)
    read = table.select(value=pl.col(column)).with_columns(number=number(pl.col("value"), dtype, words, formats))
    here = there(pl.col("value"), dtype, words)
    counts = read.select(values=here.sum(), unreadable=(here & pl.col("number").is_null()).sum())
    return Reading(formats=formats, notes=tuple(notes), **counts.collect(engine="streaming").row(0, named=True))


def amounts_of(values: pl.Series) -> pl.Series | None:
    """Values of texts that are prices or numbers with separators, by more than what a plain number is.

    Two digits behind a comma are a fraction; fewer or more may as well be the second of two numbers in a list.

    Args:
      values: Texts that are there.

    Returns:
      Float64, null where one is something else; None where more than a hundredth is.
    """
    frame = _amounts(values, ()).struct.unnest()
    listed = pl.col("sign").is_null() & pl.col("digits").str.contains(r",(\d|\d{4,})$")
    read = (pl.col("kind").is_not_null() & ~listed).fill_null(False)
    if not len(values) or frame.select(read.mean()).item() < 0.99:
        return None
    votes = frame.with_columns(count=1, pointed=pl.col("digits").str.contains(".", literal=True))
    return _numbers(values, (), _number_formats(votes))


def _number_formats(groups: pl.DataFrame) -> tuple[NumberFormat, ...]:
    def votes(*conditions: pl.Expr) -> int:
        return int(groups.filter(*conditions)["count"].sum())

    comma = votes(pl.col("kind") == "european")
    # Whole numbers are plain, too, and say nothing.
    point = votes(pl.col("kind") == "point") + votes(pl.col("kind") == "plain", pl.col("pointed"))
    return (
        tuple(name for name, count in zip(NUMBER_FORMATS, (point, comma), strict=True) if count) or NUMBER_FORMATS[:1]
    )


def _number_notes(groups: pl.DataFrame, name: str, formats: tuple[NumberFormat, ...]) -> list[str]:
    notes = []
    priced, lower = groups.filter("priced"), groups.filter("lower")
    if len(priced):
        signs = priced["sign"].drop_nulls().unique().sort().to_list()
        several = (
            f"; their {len(signs)} currencies ({', '.join(signs[:5])}) are not converted" if len(signs) > 1 else ""
        )
        notes.append(
            f"{priced['count'].sum()} values of '{name}' are read past currencies and separators of thousands, such as "
            f"'{priced['example'].min()}'{several}"
        )
    if len(lower):
        notes.append(
            f"of {lower['count'].sum()} ranges of '{name}', such as '{lower['example'].min()}', the lower end counts"
        )
    doubtful = groups.filter(pl.col("kind").is_in(["comma"] if len(formats) > 1 else ["comma", "dot"]))
    if len(doubtful) and (len(formats) > 1 or "decimal-comma" in formats or "comma" in doubtful["kind"]):
        what = "cannot be read, as there are decimal points and decimal commas in the column"
        if len(formats) == 1:
            what = f"are read with a {formats[0].replace('-', ' ')}"
        notes.append(f"numbers of '{name}' such as '{doubtful['example'].min()}' {what}")
    return notes


_AMOUNTS = {
    "shown": pl.String(),
    "plain": pl.Float64(),
    "digits": pl.String(),
    "kind": pl.String(),
    "sign": pl.String(),
    "lower": pl.Boolean(),
}


def _amounts(series: pl.Series, words: Sequence[str]) -> pl.Series:
    """Texts taken apart.

    Returns:
      Structs of `shown`, the text; `plain`, what it is as it stands; `digits`, the sign, digits and separators of the
      (lower) amount; `kind`, which of `_NUMBERS` they are, null for none; `sign`, what stands for the currency, in
      lowercase; `lower`, whether it is the lower end of a range.
    """
    frame = series.to_frame("shown").select(shown=text(pl.col("shown"), pl.String(), words)).with_row_index("row")
    # Most are numbers as they stand; the patterns are for the others.
    plain = pl.col("shown").str.contains(rf"^[+-]?{_NUMBERS['plain'][1:]}")
    easy = frame.filter(plain).select("row", digits="shown", kind=pl.lit("plain"))
    parts = pl.concat([easy, _taken_apart(frame.filter(~plain))], how="diagonal")
    return (
        frame.with_columns(plain=pl.col("shown").cast(pl.Float64, strict=False))
        .join(parts, on="row", how="left", maintain_order="left")
        .select("shown", "plain", "digits", "kind", "sign", pl.col("lower").fill_null(False))
        .to_struct(series.name)
    )


def _taken_apart(frame: pl.DataFrame) -> pl.DataFrame:
    """What `_amounts` returns but for `plain`, with the column `row`."""
    spelled = pl.col("shown").str.to_lowercase().str.replace_all(BLANKS, " ")
    frame = frame.with_columns(spelled=spelled, one=spelled.str.replace(_FROM, ""))
    ends = pl.col("one").str.extract_groups(_RANGE).struct
    frame = frame.with_columns(low=ends.field("low").str.strip_chars(), high=ends.field("high").str.strip_chars())
    # Dates and telephone numbers have dashes, too: both ends have to be amounts, and something has to say so.
    said = pl.col("one").str.contains(rf"{_CURRENCY}|[.,]\d|\d (?:-|–|—|to|bis) ")
    ranged = (pl.col("low").str.contains(_PRICE) & pl.col("high").str.contains(_PRICE) & said).fill_null(False)
    frame = frame.with_columns(ranged=ranged).with_columns(one=pl.when("ranged").then("low").otherwise("one"))
    price = pl.col("one").str.extract_groups(_PRICE).struct
    frame = frame.with_columns(before=price.field("1").fill_null(""), digits=price.field("2").str.strip_chars())
    grouped = pl.col("digits").str.contains(r"^[+-]?\d{1,3}(?:[ '’]\d{3})+(?:[.,]\d+)?$")
    frame = frame.with_columns(
        digits=pl.when(grouped).then(pl.col("digits").str.replace_all(r"[ '’]", "")).otherwise("digits")
    ).with_columns(bare=pl.col("digits").str.replace(r"^[+-]", ""))
    kinds = [pl.when(pl.col("bare").str.contains(pattern)).then(pl.lit(name)) for name, pattern in _NUMBERS.items()]
    return frame.select(
        "row",
        digits=pl.concat_str("before", "digits"),
        kind=pl.coalesce(kinds),
        sign=pl.col("spelled").str.extract(rf"({_CURRENCY})", 1).str.strip_chars("."),
        lower=pl.col("ranged") | pl.col("spelled").str.contains(_FROM).fill_null(False),
    )


def _numbers(series: pl.Series, words: Sequence[str], formats: Sequence[str]) -> pl.Series:
    digits, kind, both = pl.col("digits"), pl.col("kind"), len(formats) > 1
    comma = digits.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    frame = (
        _amounts(series, words)
        .struct.unnest()
        .with_columns(
            point=digits.str.replace_all(",", "", literal=True).cast(pl.Float64, strict=False),
            comma=comma.cast(pl.Float64, strict=False),
        )
    )
    european = kind == "european"
    if "decimal-comma" in formats and not both:
        european |= kind.is_in(["dot", "comma"])
    # Where both signs are used, 1,299 can be either; 1.299 is what everybody reads.
    read = pl.when(kind.is_null()).then("plain").when(european).then("comma")
    read = read.when((kind != "comma") | pl.lit(not both)).then("point")
    frame = frame.select(number=read)
    return frame.select(pl.when(pl.col("number").is_finite()).then("number").alias(series.name)).to_series()
