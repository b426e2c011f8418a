"""Readers of plain tables: CSV, TSV, JSONL and Parquet, gzipped or not, as lazy frames in bounded memory."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nqf.data.errors import DataError
from nqf.data.schema import Field, nearest

Columns = Mapping[str, Field | None]
"""Columns to read, each with the field that it belongs to; None for ids, times, ratings and reviews."""

_BATCH = 20_000
# What reading a damaged or truncated .gz raises.
_GZIP_ERRORS = (OSError, EOFError, zlib.error)
# Tables shrink by gzip to a twentieth at the least; what grows more than this was made to fill the disk.
_LARGEST_RATIO = 200
_PIECE = 2**20
# Characters; a line is an item or an interaction.
_LONGEST_LINE = 16 * 2**20
_MOST_COLUMNS = 10_000


def read_table(path: Path, scratch: Path, columns: Columns, optional: Collection[str] = ()) -> pl.LazyFrame:
    """Opens a table.

    CSV has quotes and commas, TSV has tabs and no quoting; both have a header, and all their values are read as
    strings, so that an id such as 007 stays what it is. A JSONL line is an object.

    Args:
      path: File whose name ends in .csv, .tsv, .jsonl, .ndjson or .parquet; all but the last also with .gz.
      scratch: Folder for temporary files, which must stay until the frame was collected.
      columns: Columns to read.
      optional: Those of them that may be absent; then they are null.

    Raises:
      DataError: No such file, unknown format, not readable, or a missing or duplicate column.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; mend the path in the data section of the configuration")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if zipped else suffixes)[-1:]
    if suffix in ([".csv"], [".tsv"]):
        separator = "," if suffix == [".csv"] else "\t"
        plain = unzipped(path, scratch) if zipped else path
        header = read_header(plain, separator, quoted=suffix == [".csv"], where=path)
        check_columns(path, columns, header, optional)
        table = scan_text(plain, separator, quoted=suffix == [".csv"])
        return with_all(table.select(name for name in columns if name in header), columns)
    if suffix in ([".jsonl"], [".ndjson"]):
        seen: set[str] = set()
        table = spool(_noting(read_json_lines(path), seen), columns, scratch, path.name)
        check_columns(path, columns, sorted(seen), optional)
        return table
    if suffix == [".parquet"] and not zipped:
        try:
            table = pl.scan_parquet(path)
            names = table.collect_schema().names()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: not readable as Parquet: {error}") from error
        check_columns(path, columns, names, optional)
        return with_all(table.select(name for name in columns if name in names), columns)
    raise DataError(f"{path}: unknown kind of table; known: .csv, .tsv, .jsonl, .ndjson (each also .gz) and .parquet")


def check_columns(path: Path, columns: Columns, names: list[str], optional: Collection[str] = ()) -> None:
    """Refuses a table without the columns that are asked for.

    Raises:
      DataError: Names the column and the nearest one that is there.
    """
    for name in columns:
        if name not in names and name not in optional:
            raise DataError(f"{path}: no column '{name}'{nearest(name, names)}")


def with_all(table: pl.LazyFrame, columns: Columns) -> pl.LazyFrame:
    """Adds the columns that a table lacks, null throughout."""
    names = table.collect_schema().names()
    return table.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in columns if name not in names)


def read_header(plain: Path, separator: str, *, quoted: bool, where: Path) -> list[str]:
    """Column names of an unzipped CSV or TSV file.

    Raises:
      DataError: Empty file, not UTF-8, an endless line, too many columns, or a duplicate one.
    """
    try:
        with plain.open(encoding="utf-8-sig", newline="") as file:
            quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            lines = iter(lambda: file.readline(_LONGEST_LINE), "")
            header = next(csv.reader(lines, delimiter=separator, quoting=quoting), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text: {error}; convert it first") from error
    except csv.Error as error:
        raise DataError(f"{where}: its header line is not readable: {error}") from error
    if not header:
        raise DataError(f"{where}: the file is empty; it needs a header line")
    if len(header) > _MOST_COLUMNS:
        raise DataError(f"{where}: {len(header):,} columns are more than {_MOST_COLUMNS:,}; is the separator right?")
    for name, count in Counter(header).items():
        if count > 1:
            raise DataError(f"{where}: duplicate column '{name}'; rename or remove one of them")
    return header


def scan_text(plain: Path, separator: str, *, quoted: bool) -> pl.LazyFrame:
    """Scans an unzipped CSV or TSV file, all values as strings, empty ones as null."""
    return pl.scan_csv(plain, separator=separator, infer_schema=False, quote_char='"' if quoted else None)


def unzipped(path: Path, scratch: Path) -> Path:
    """Unpacks a .gz file into the scratch folder, as a scan of the packed file would hold all of it in memory.

    Raises:
      DataError: Damaged or truncated.
    """
    target = scratch / path.name.removesuffix(".gz")
    room = _room(path)
    try:
        with gzip.open(path) as packed, target.open("wb") as plain:
            while piece := packed.read(_PIECE):
                room -= len(piece)
                if room < 0:
                    raise _bomb(path)
                plain.write(piece)
    except _GZIP_ERRORS as error:
        raise DataError(f"{path}: not readable as gzip: {error}; fetch or pack the file again") from error
    return target


def _room(path: Path) -> int:
    return 64 * _PIECE + _LARGEST_RATIO * path.stat().st_size


def _bomb(path: Path) -> DataError:
    return DataError(
        f"{path}: unpacks to more than {_LARGEST_RATIO} times its size, as files do that are made to fill the disk; if "
        "it is meant, unpack it first"
    )


def parse_json(text: str) -> Any:
    """`json.loads`, with a question mark for half a surrogate pair, which JSON can hold and UTF-8 cannot.

    Texts that were cut in the middle of an emoji end in one.
    """
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    return value


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, gzipped if its name ends in .gz; blank lines are passed over.

    Raises:
      DataError: No such file, or a line that is not a JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; mend the path in the data section of the configuration")
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    room = _room(path) if opener is gzip.open else None
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            # Not `for line in file`: a line without an end would be read into memory whole.
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
                if len(line) == _LONGEST_LINE:
                    raise DataError(f"{path}: line {number}: longer than {_LONGEST_LINE:,} characters")
                if room is not None and (room := room - len(line)) < 0:
                    raise _bomb(path)
                if not line.strip():
                    continue
                value = parse_json(line)
                if not isinstance(value, dict):
                    raise DataError(f"{path}: line {number}: expected a JSON object, found {type(value).__name__}")
                yield value
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: after line {number}: not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        # Not only JSONDecodeError: numbers of thousands of digits and deep nesting have errors of their own.
        raise DataError(f"{path}: line {number}: not JSON that can be read: {error}") from error
    except _GZIP_ERRORS as error:
        raise DataError(f"{path}: after line {number}: not readable: {error}; fetch or pack the file again") from error


def spool(rows: Iterable[Mapping[str, Any]], columns: Columns, scratch: Path, name: str) -> pl.LazyFrame:
    """Writes rows of JSON values into Parquet files of one type per column and scans those.

    Lists stay lists in category and vector columns and are joined by spaces in all others; a text with separators
    of a multi-valued category is split.

    Args:
      rows: Objects; what `columns` does not name is passed over.
      columns: Columns to keep; absent ones are null.
      scratch: Folder for the Parquet files.
      name: Start of their names.
    """
    schema = {column: _spooled_type(field) for column, field in columns.items()}
    parts: list[Path] = []
    batch: list[list[Any]] = []

    def flush() -> None:
        parts.append(scratch / f"{name}-{len(parts):05d}.parquet")
        pl.DataFrame(batch, schema=schema, orient="row").write_parquet(parts[-1])
        batch.clear()

    for row in rows:
        batch.append([_plain(row.get(column), field) for column, field in columns.items()])
        if len(batch) == _BATCH:
            flush()
    if batch or not parts:
        flush()
    return pl.scan_parquet(parts)


def _noting(rows: Iterable[dict[str, Any]], seen: set[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        seen.update(row)
        yield row


def _spooled_type(field: Field | None) -> pl.DataType:
    listed = field is not None and field.modality in ("category", "vector")
    return pl.List(pl.String) if listed else pl.String()


def _plain(value: Any, field: Field | None) -> str | list[str] | None:
    # NaN, which JSON as Python writes it can hold, is not itself.
    if value is None or value != value:
        return None
    if field is not None and field.modality in ("category", "vector"):
        if isinstance(value, list):
            # A hole in a vector must not make it shorter.
            return [_scalar(element) if element is not None and element == element else "" for element in value]
        if field.modality == "vector":
            return _scalar(value).strip(" []").replace(",", " ").split()
        return _scalar(value).split(field.separator) if field.multi_valued else [_scalar(value)]
    if isinstance(value, list):
        return " ".join(_scalar(element) for element in value if element is not None and element == element)
    return _scalar(value)


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
