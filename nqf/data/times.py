"""Times in the spellings that are found in the wild, as unix seconds."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from nqf.config import MISSING_WORDS, TimeFormat
from nqf.data.values import BLANKS, TIME_FORMATS, Reading, as_text, text, there

UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Units of numbers that count from 1970, and how many of each are a second."""
UNREADABLE = 0.1
"""Share of a time column's values above which it is no time column."""
_DAY = 86_400
# Years 1700 and 2100: what lies outside is read, and said.
_EARLIEST, _LATEST = -8_520_336_000, 4_102_444_800
# A number is of the coarsest unit that puts it between 1700 and here, the end of 2200.
_UNIT_LATEST = 7_289_654_399
# YYYYMMDDHH looks like the seconds of 2030 to 2036; chance makes three of those dates rarely.
_TEN_DIGITS = 3
# The first shops on the net opened after 1980, and no log counts seconds from 1970 and ends in March 1973.
_EARLIEST_EVENT, _FIRST_YEARS = 315_532_800, 10**8
# 0001 and 9999, the first and last year that calendars and Parquet files can show.
_FIRST, _LAST = -62_135_596_800, 253_402_300_799
# Days since 1899-12-30 of 1954 and 2119.
_EXCEL, _EXCEL_EPOCH = (20_000, 80_000), 25_569
# What databases write for no time: pandas' NaT, MySQL's zero date.
_NO_TIME = ("nat", "0000-00-00", "0000-00-00 00:00:00")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# Hours of the names that RFC 2822, section 4.3, gives a meaning.
_ZONES = {"est": -5, "edt": -4, "cst": -6, "cdt": -5, "mst": -7, "mdt": -6, "pst": -8, "pdt": -7}
_MONTH = rf"({'|'.join(_MONTHS)})[a-z]*\.?"
_ZONE = rf"z|utc|gmt|ut|(?:utc|gmt)? ?[+-]\d{{1,2}}(?::?\d{{2}}(?::?\d{{2}})?)?|{'|'.join(_ZONES)}"
_REST = r"((?:t|[ ,:].*)?)"
# Spellings of dates brought to `year-month-day rest`, in this order; each fits a whole text or leaves it alone.
_SPELLINGS = (
    (BLANKS, " "),
    (r"\x{2212}", "-"),
    (r'^isodate\(["\'](.*)["\']\)$', "$1"),
    # Java's zone behind the offset, and the browser's name of it.
    (r"\[[a-z_/+-]+\]$| \([^)]*\)$", ""),
    (r"^(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,? ", ""),
    (r"^((?:[a-z]+\.? )?\d{1,2})(?:st|nd|rd|th)\b", "$1"),
    (rf"^{_MONTH} (\d{{1,2}}) (\d{{2}}:\d{{2}}:\d{{2}})(?: ({_ZONE}))? (\d{{4}})$", "$5-$1-$2 $3 $4"),
    (rf"^{_MONTH} (\d{{1,2}}),? (\d{{4}}){_REST}$", "$3-$1-$2$4"),
    (rf"^(\d{{1,2}})[ /.-]{_MONTH}[ /.,-]{{1,2}}(\d{{4}}|\d{{2}}){_REST}$", "$3-$2-$1$4"),
    (rf"^{_MONTH},? (\d{{4}})$", "$2-$1"),
    (rf"^(\d{{4}})[ /.-]{_MONTH}[ /.-](\d{{1,2}}){_REST}$", "$1-$2-$3$4"),
    (rf"^(\d{{1,2}}) (\d{{1,2}}), (\d{{4}}){_REST}$", "$3-$1-$2$4"),
    (r"^(\d{1,2})[/.-](\d{4})$", "$2-$1"),
    (r"^(\d{4})(\d{2})(\d{2})[t ]?(\d{2}):?(\d{2}):?(\d{2})(\D.*)?$", "$1-$2-$3 $4:$5:$6$7"),
    (r"^(\d{4})(\d{2})(\d{2})[t ](\d{2}):?(\d{2})(\D.*)?$", "$1-$2-$3 $4:$5$6"),
    (r"^(\d{4})(\d{2})(\d{2}) ?(?:z|utc|gmt)$", "$1-$2-$3"),
    (r"^(\d{4})[/. ](\d{1,2})[/. ](\d{1,2})([t ].*)?$", "$1-$2-$3$4"),
    (r"^(\d{4})[/.](\d{1,2})$", "$1-$2"),
    *((rf"^(\d{{4}})-?q{quarter}$", f"$1-{3 * quarter - 2}") for quarter in range(1, 5)),
    (r"^(\d{4})年(\d{1,2})月(\d{1,2})日", "$1-$2-$3"),
    # Oracle's, DB2's and file names' separators of the time of day.
    (r"^(\d{2,4}-\w+-\d{1,2}[t _-])(\d{1,2})[.-](\d{2})[.-](\d{2})", "$1$2:$3:$4"),
)
_ISO = r"^\d{4}-\d\d-\d\d(?:[t ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:z|[+-]\d\d:?\d\d)?)?$"
_EITHER = r"^(?P<a>\d{1,2})[/.-](?P<b>\d{1,2})[/.-](?P<y>\d{4}|\d{2})" + _REST + "$"
_MOMENT = (
    rf"^(?P<y>\d{{4}}|\d{{2}})-(?P<m>\d{{1,2}}|{'|'.join(_MONTHS)})(?:-(?P<d>\d{{1,2}}))?"
    r"(?:(?:t| at |, ?|[ :_-])(?:(?P<H>\d{1,2})(?::(?P<M>\d{2})(?::(?P<S>\d{2})(?:[.,:]\d+)?)?)?)"
    rf" ?(?P<p>[ap]\.?m\.?)? ?(?P<z>{_ZONE})?)? ?$"
)
_NUMBER = r"^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$"


def seconds(
    value: pl.Expr,
    dtype: pl.DataType,
    words: Sequence[str] = MISSING_WORDS,
    formats: Sequence[str] = ("seconds", "month-first"),
) -> pl.Expr:
    """Int64 unix seconds of dates, times, texts and numbers; null where there is none or it cannot be read.

    Texts are UTC unless they say otherwise; fractions of a second are cut off towards the past. Two-digit years are
    those of POSIX: 69 to 99 are of the 20th century.

    Args:
      value: The column.
      dtype: Its type.
      words: Words for nothing.
      formats: What `decide` found.
    """
    if _is_time(dtype):
        return value.dt.epoch("s")
    # On series: as expressions, every step would be written out for each use of the one before.
    return value.map_batches(
        lambda series: _seconds(series, words, formats), return_dtype=pl.Int64, is_elementwise=True
    )


def guessed(series: pl.Series) -> tuple[pl.Series, Reading]:
    """Unix seconds of a column that nothing is known about, and how it was read."""
    reading = decide(series.alias("value").to_frame().lazy(), "value")
    read = seconds(pl.col("value"), series.dtype, formats=reading.formats)
    return series.alias("value").to_frame().select(read).to_series(), reading


def decide(
    table: pl.LazyFrame,
    column: str,
    *,
    words: Sequence[str] = MISSING_WORDS,
    given: Sequence[str] = (),
    events: bool = False,
) -> Reading:
    """Decides from all values of a column how its times are read.

    Args:
      table: Has the column.
      column: Its name.
      words: Words for nothing.
      given: What the schema or the configuration says already.
      events: Whether they are times of interactions, which cannot be centuries old.
    """
    dtype, notes, early = table.collect_schema()[column], [], False
    formats: tuple[TimeFormat, ...] = ()
    if not _is_time(dtype):
        votes = table.select(
            pl.col(column)
            .map_batches(lambda series: _votes(series, words), return_dtype=pl.Struct(_VOTES), is_elementwise=True)
            .struct.unnest()
        )
        counted = votes.group_by(name for name in _VOTES if name != "example")
        groups = counted.agg(count=pl.len(), example=pl.col("example").min()).collect(engine="streaming")
        (unit, early), order = _unit(groups, column, given, notes), _order(groups, column, given, notes)
        formats = (unit, order)
    if dtype == pl.Float32 and "seconds" in formats:
        notes.append(f"'{column}' is stored as Float32, which holds the seconds of this century to 64 or 128 alone")
    read = table.select(value=pl.col(column)).with_columns(time=seconds(pl.col("value"), dtype, words, formats))
    earliest = _EARLIEST_EVENT if events else _EARLIEST
    strange = ~pl.col("time").is_between(earliest, _LATEST)
    here = there(pl.col("value"), dtype, words)
    if dtype == pl.String:
        here &= ~pl.col("value").str.to_lowercase().str.strip_chars().is_in(list(_NO_TIME))
    counts = read.select(
        values=here.sum(), unreadable=(here & pl.col("time").is_null()).sum(), strange=strange.sum()
    ).collect(engine="streaming")
    found = counts.row(0, named=True)
    if found["strange"] and not early:
        example, time = read.filter(strange).head(1).collect().row(0)
        notes.append(
            f"{found['strange']} times of '{column}' are before {_shown(earliest)[:4]} or after 2100, such as "
            f"'{example}', read as {_shown(time)}; if that is wrong, give its format"
        )
    return Reading(formats=formats, notes=tuple(notes), unreadable=found["unreadable"], values=found["values"])


_VOTES = {
    "unit": pl.String(),
    "digits": pl.Boolean(),
    "ten": pl.Boolean(),
    "excel": pl.Boolean(),
    "early": pl.Boolean(),
    "zero": pl.Boolean(),
    "number": pl.Boolean(),
    "order": pl.String(),
    "example": pl.String(),
}


def _is_time(dtype: pl.DataType) -> bool:
    return dtype == pl.Date or isinstance(dtype, pl.Datetime)


def _votes(series: pl.Series, words: Sequence[str]) -> pl.Series:
    """For which readings each value speaks; null where it says nothing."""
    frame = _parts(series, words)
    whole, either = pl.col("whole"), _spelled(frame["spelled"]).str.extract_groups(_EITHER)
    units = [
        pl.when((whole // scale).is_between(_EARLIEST, _UNIT_LATEST)).then(pl.lit(name))
        for name, scale in UNITS.items()
    ]
    first, second = (either.struct.field(part).cast(pl.Int64, strict=False) for part in "ab")
    frame = frame.with_columns(calendar=_digits(frame["whole"]), a=first, b=second)
    order = (
        pl.when(pl.col("a") > 12)
        .then(pl.lit("day-first"))
        .when(pl.col("b") > 12)
        .then(pl.lit("month-first"))
        .when(pl.col("a") != pl.col("b"))
        .then(pl.lit("either"))
    )
    votes = frame.select(
        unit=pl.coalesce(units),
        digits=pl.col("calendar").is_between(_EARLIEST, _LATEST).fill_null(False),
        ten=whole.is_between(10**9, 10**10 - 1).fill_null(False),
        excel=pl.col("real").is_between(*_EXCEL).fill_null(False),
        early=(whole.abs() < _FIRST_YEARS).fill_null(False),
        zero=(whole == 0).fill_null(False),
        number=whole.is_not_null(),
        order=order,
        example=pl.col("shown"),
    )
    return votes.to_struct(series.name)


def _unit(groups: pl.DataFrame, name: str, given: Sequence[str], notes: list[str]) -> tuple[TimeFormat, bool]:
    """What the numbers of a time column count, and whether that puts most of them into the first years after 1970."""
    counted = groups.filter("number", ~pl.col("zero"))
    total = int(counted["count"].sum())
    for entry in TIME_FORMATS[:-2]:
        if entry in given:
            return entry, False
    if not total:
        return "digits", False

    def share(condition: pl.Expr) -> float:
        return int(counted.filter(condition)["count"].sum()) / total

    ten = counted.filter("ten")["count"].sum()
    start = f"the numbers of '{name}', such as '{counted['example'].min()}', are read as"
    if share(pl.col("digits")) >= 1 - UNREADABLE and not 0 < ten < _TEN_DIGITS:
        notes.append(f"{start} years, months and days of a calendar")
        return "digits", False
    if share(pl.col("excel")) >= 1 - UNREADABLE:
        notes.append(f"{start} days since 1899-12-30 (Excel)")
        return "excel", False
    unit = max(TIME_FORMATS[: len(UNITS)], key=lambda one: share(pl.col("unit") == one))
    early = unit == "seconds" and share(pl.col("early")) > 0.5
    if early:
        notes.append(
            f"{start} seconds since 1970, which puts most of them before March 1973; if that is wrong, give its format"
        )
    elif share(pl.col("unit") == unit) < 0.99:
        notes.append(f"{start} {unit} since 1970, as {share(pl.col('unit') == unit):.0%} of them suggest")
    return unit, early


def _order(groups: pl.DataFrame, name: str, given: Sequence[str], notes: list[str]) -> TimeFormat:
    """Whether 3/4/2019 is in March."""
    for entry in TIME_FORMATS[-2:]:
        if entry in given:
            return entry
    votes = {one: int(groups.filter(pl.col("order") == one)["count"].sum()) for one in ("month-first", "day-first")}
    open_ = groups.filter(pl.col("order") == "either")
    order: TimeFormat = "day-first" if votes["day-first"] > votes["month-first"] else "month-first"
    if all(votes.values()):
        notes.append(
            f"'{name}' has {votes['day-first']} dates that can only be day-first and {votes['month-first']} that can "
            f"only be month-first; those that can be both are read {order}"
        )
    elif len(open_):
        doubt = "" if any(votes.values()) else ", as no other date of it tells; if that is wrong, give its format"
        notes.append(f"dates of '{name}' such as '{open_['example'].min()}' are read {order}{doubt}")
    return order


def _parts(series: pl.Series, words: Sequence[str]) -> pl.DataFrame:
    """Times as `whole` (Int64) and `real` numbers (Float64), as text `spelled` without numbers, and as `shown`."""
    dtype, frame = series.dtype, series.alias("value").to_frame()
    value, nothing = pl.col("value"), pl.lit(None)
    if dtype.is_numeric():
        spelled, real, whole = nothing.cast(pl.String), value.cast(pl.Float64), nothing.cast(pl.Int64)
        if dtype.is_integer():
            whole = value.cast(pl.Int64, strict=False)
    else:
        spelled = nothing.cast(pl.String) if dtype.is_nested() else text(value, dtype, words)
        real = pl.when(spelled.str.contains(_NUMBER)).then(spelled).cast(pl.Float64, strict=False)
        whole = spelled.cast(pl.Int64, strict=False)
    frame = frame.select(
        shown=nothing.cast(pl.String) if dtype.is_nested() else as_text(value, dtype),
        real=real,
        whole=whole,
        spelled=spelled,
    )
    # Beyond 2^63 there is no time, and a cast would be an error. What is a number need not go through the spellings.
    real = pl.col("real")
    return frame.with_columns(
        whole=pl.coalesce(
            "whole",
            pl.when(real.is_finite() & (real.abs() < 2.0**63)).then(real).floor().cast(pl.Int64, strict=False),
        ),
        spelled=pl.when(real.is_null()).then("spelled"),
    )


def _seconds(series: pl.Series, words: Sequence[str], formats: Sequence[str]) -> pl.Series:
    unit = next((name for name in formats if name in UNITS or name in ("digits", "excel")), "digits")
    frame = _parts(series, words)
    if unit == "excel":
        # Milliseconds first: a day's fraction is rarely a whole second in binary.
        milliseconds = ((frame["real"] - _EXCEL_EPOCH) * _DAY * 1000).round()
        numbers = (milliseconds / 1000).floor().cast(pl.Int64, strict=False)
    elif unit == "digits":
        numbers = _digits(frame["whole"])
    else:
        numbers = frame["whole"] // UNITS[unit]
    frame = pl.DataFrame({"time": numbers, "spelled": _moment(frame["spelled"], "day-first" in formats)})
    time = frame.select(time=pl.coalesce("time", "spelled"))
    inside = pl.col("time").is_between(_FIRST, _LAST)
    return time.select(pl.when(inside).then("time").alias(series.name)).to_series()


def _digits(whole: pl.Series) -> pl.Series:
    """Unix seconds of YYYY, YYYYMM, YYYYMMDD, YYYYMMDDHH, …MM, …SS and …SSmmm."""
    digits = pl.col("digits")
    frame = whole.cast(pl.String).alias("digits").to_frame()
    frame = frame.select(
        pl.when(digits.str.contains(r"^[12](?:\d{3}|\d{5}|\d{7}|\d{9}|\d{11}|\d{13}|\d{16})$")).then(digits)
    )
    month, day = (digits.str.slice(start, 2).replace("", "01") for start in (4, 6))
    clock = {name: digits.str.slice(start, 2) for name, start in (("hour", 8), ("minute", 10), ("second", 12))}
    return _at(frame.select(year=digits.str.slice(0, 4), month=month, day=day, **clock))


def _at(parts: pl.DataFrame) -> pl.Series:
    """Unix seconds of `year`, `month`, `day`, `hour`, `minute`, `second` as String; null of the clock is 0."""
    date = pl.concat_str("year", pl.lit("-"), "month", pl.lit("-"), "day").str.to_date("%Y-%m-%d", strict=False)
    clock = (pl.col(name).cast(pl.Int64, strict=False).fill_null(0) for name in ("hour", "minute", "second"))
    hour, minute, second = clock
    inside = (hour < 24) & (minute < 60) & (second <= 60)
    time = date.cast(pl.Int64) * _DAY + hour * 3_600 + minute * 60 + second
    return parts.select(time=pl.when(inside).then(time)).to_series()


def _spelled(cells: pl.Series) -> pl.Series:
    spelled = cells.str.to_lowercase()
    # Most texts are ISO as it stands; the rules are for the others.
    rest = (~spelled.str.contains(_ISO)).fill_null(False).arg_true()
    others = spelled.gather(rest)
    if len(others):
        for pattern, replacement in _SPELLINGS:
            others = others.str.replace_all(pattern, replacement)
        spelled = spelled.scatter(rest, others)
    return spelled.str.strip_chars()


def _moment(cells: pl.Series, day_first: bool) -> pl.Series:
    """Unix seconds of spelled-out times."""
    order = "$y-$b-$a$4" if day_first else "$y-$a-$b$4"
    parts = _spelled(cells).str.replace(_EITHER, order).str.extract_groups(_MOMENT).struct.unnest()
    year, hour, half = pl.col("y"), pl.col("H").cast(pl.Int64, strict=False), pl.col("p").str.slice(0, 1)
    century = pl.when(year.cast(pl.Int64, strict=False) >= 69).then(pl.lit("19")).otherwise(pl.lit("20"))
    # 99 is no hour: there is no 13 PM.
    twelve = pl.when(hour <= 12).then(hour % 12 + 12 * (half == "p").cast(pl.Int64)).otherwise(99)
    times = _at(
        parts.select(
            year=pl.when(year.str.len_chars() == 2).then(pl.concat_str(century, year)).otherwise(year),
            month=pl.col("m").replace(_MONTHS, [str(at) for at in range(1, 13)]),
            day=pl.col("d").fill_null("1"),
            hour=pl.when(half.is_null()).then(hour).otherwise(twelve).cast(pl.String),
            minute="M",
            second="S",
        )
    )
    return times - _offset(parts["z"])


def _offset(zone: pl.Series) -> pl.Series:
    """Seconds east of Greenwich of a zone's spelling; 0 for none."""
    named = zone.replace_strict(_ZONES, default=0, return_dtype=pl.Int64).fill_null(0) * 3_600
    frame = pl.DataFrame({"named": named, "digits": zone.str.extract(r"([+-][\d:]+)$", 1).str.replace_all(":", "")})
    frame = frame.with_columns(bare=pl.col("digits").str.slice(1))
    # 5, 05, 530 and 0530 are hours, and hours with minutes.
    odd = pl.col("bare").str.len_chars() % 2 == 1
    frame = frame.with_columns(bare=pl.when(odd).then(pl.concat_str(pl.lit("0"), "bare")).otherwise("bare"))
    parts = (pl.col("bare").str.slice(at, 2).cast(pl.Int64, strict=False).fill_null(0) for at in (0, 2, 4))
    hour, minute, second = parts
    sign = pl.when(pl.col("digits").str.starts_with("-")).then(-1).otherwise(1)
    numbered = sign * (hour * 3_600 + minute * 60 + second)
    return frame.select(pl.when(pl.col("digits").is_null()).then("named").otherwise(numbered)).to_series()


def _shown(time: int) -> str:
    return pl.select(pl.from_epoch(pl.lit(time), "s").dt.to_string("%Y-%m-%d %H:%M:%S")).item()
