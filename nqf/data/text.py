"""Delimited text (CSV, TSV, RecBole's files), read in bounded memory exactly as Python's csv module reads it."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nqf.config import DialectConfig
from nqf.data.errors import DataError
from nqf.data.schema import some

GZIP_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a damaged or truncated .gz raises."""
# Tables shrink by gzip to a twentieth at the least; what grows more than this was made to fill the disk.
_LARGEST_RATIO = 200
_LEAST_ROOM = 64 * 2**20
LONGEST_LINE = 16 * 2**20
"""Characters; a line is an item or an interaction."""
MOST_COLUMNS = 10_000
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 200, 2**20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PLAIN = DialectConfig()
"""UTF-8, quoted as spreadsheets and pandas do, with the separator found out."""
# What Excel writes above the header and takes away again.
_DECLARED = re.compile(r"sep=(.)\r?\n", re.I)
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "blank"}
ADVICE = (
    "python -m nqf.data inspect tries other dialects; they are set by data.items_dialect and data.interactions_dialect"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTable:
    """A delimited file whose header has been read.

    Attributes:
      path: The file.
      header: Names of the columns; those without one are called `Unnamed: 0` and so on, as pandas does.
      dialect: How it is written, with separator and encoding decided.
      notes: What was guessed or repaired, in words; `rows` appends to it.
    """

    path: Path
    header: list[str]
    dialect: DialectConfig
    notes: list[str]

    def rows(self) -> Iterator[list[str]]:
        """The rows under the header, without empty lines.

        Raises:
          DataError: A row that is longer or shorter than the header, or whose quotes do not match; names its line.
        """
        reader = _Reader(self.path, self.dialect)
        rows = reader.rows()
        next(rows)
        for line, row in rows:
            if len(row) == len(self.header):
                yield row
            else:
                reader.bad(line, f"{len(row)} fields, and the header has {len(self.header)}: {some(row, 5, ' | ')}")
        self.notes.extend(note for note in reader.notes() if note not in self.notes)


def open_text(path: Path, dialect: DialectConfig, *, separators: str) -> TextTable:
    """Reads the header of a delimited file and decides what the dialect leaves open.

    Args:
      path: CSV, TSV or alike, gzipped if its name ends in .gz.
      dialect: How it is written.
      separators: Separators to choose from; the first is the usual one.

    Raises:
      DataError: Empty, not decodable, an endless line, too many columns, or a duplicate one.
    """
    notes: list[str] = []
    dialect = dataclasses.replace(dialect, encoding=dialect.encoding or marked_encoding(path) or "utf-8")
    if dialect.separator is None:
        dialect = dataclasses.replace(dialect, separator=_guess_separator(path, dialect, separators))
        if dialect.separator != separators[0]:
            name = SEPARATORS.get(str(dialect.separator), f"'{dialect.separator}'")
            notes.append(f"{path}: the separator is taken to be {name}")
    _, header = next(_Reader(path, dataclasses.replace(dialect, bad_lines="refuse")).rows(), (0, []))
    if not header:
        raise DataError(f"{path}: the file is empty; it needs a header line")
    if len(header) > MOST_COLUMNS:
        raise DataError(f"{path}: {len(header):,} columns are more than {MOST_COLUMNS:,}; is the separator right?")
    if any("\0" in name for name in header):
        raise DataError(f"{path}: zero bytes in the header; set the encoding, such as utf-16-le; {ADVICE}")
    header = name_unnamed([header[0].removeprefix("\ufeff"), *header[1:]])
    for name, count in Counter(header).items():
        if count > 1:
            raise DataError(f"{path}: duplicate column '{some([name])}'; rename or remove one of them")
    return TextTable(path=path, header=header, dialect=dialect, notes=notes)


def name_unnamed(header: Iterable[str]) -> list[str]:
    """Names for the columns that have none."""
    names: list[str] = list(header)
    for index, name in enumerate(names):
        if not name:
            candidates = itertools.chain([f"Unnamed: {index}"], (f"Unnamed: {index}.{n}" for n in itertools.count(1)))
            names[index] = next(candidate for candidate in candidates if candidate not in names)
    return names


def marked_encoding(path: Path) -> str | None:
    """The encoding that a byte order mark at the start of a file announces."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            start = file.read(4)
    except GZIP_ERRORS as error:
        raise DataError(f"{path}: not readable as gzip: {error}; fetch or pack the file again") from error
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def lines(path: Path, encoding: str, *, endless: bool = False) -> Iterator[str]:
    """The lines of a text file, with their ends, never more than one of them in memory.

    Args:
      path: The file, gzipped if its name ends in .gz.
      encoding: A name that Python knows.
      endless: Whether a line may be longer than `LONGEST_LINE`; then it comes in pieces.

    Raises:
      DataError: Not decodable, damaged, an endless line, or a .gz that was made to fill the disk.
    """
    zipped = path.suffix.lower() == ".gz"
    room = _LEAST_ROOM + _LARGEST_RATIO * path.stat().st_size
    number = 0
    # A mark that is not asked for would become a part of the first name.
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    try:
        with (gzip.open if zipped else open)(path, "rt", encoding=encoding, newline="") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), 1):
                if len(line) == LONGEST_LINE and not endless:
                    raise DataError(f"{path}: line {number}: longer than {LONGEST_LINE:,} characters")
                room -= len(line)
                if zipped and room < 0:
                    raise DataError(
                        f"{path}: unpacks to more than {_LARGEST_RATIO} times its size, as files do that are made to "
                        "fill the disk; if it is meant, unpack it first"
                    )
                yield line
    except UnicodeError as error:
        name = "UTF-8" if encoding.startswith("utf-8") else encoding
        # All lines of the pieces before the one that cannot be decoded have been handed out.
        before = error.object[: error.start].count(b"\n") if isinstance(error, UnicodeDecodeError) else 0
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise DataError(
            f"{path}: line {number + 1 + before}: not {name} text ({reason}); set its encoding, such as cp1252 or "
            f"utf-16; {ADVICE}"
        ) from error
    except LookupError as error:
        raise DataError(f"{path}: {error}; the encoding is one that Python knows, such as utf-8 or cp1252") from error
    except GZIP_ERRORS as error:
        raise DataError(f"{path}: after line {number}: not readable: {error}; fetch or pack the file again") from error


class _Reader:
    """Rows of the csv module with the line that each starts in; strict, so that what is damaged is seen."""

    def __init__(self, path: Path, dialect: DialectConfig):
        self.path, self.dialect = path, dialect
        self.stray: list[int] = []
        self.dropped: list[int] = []
        self.options: dict[str, Any] = {"delimiter": dialect.separator, "escapechar": dialect.escape or None}
        self.options |= {"quotechar": dialect.quote} if dialect.quote else {"quoting": csv.QUOTE_NONE}
        csv.field_size_limit(LONGEST_LINE)
        try:
            csv.reader([], **self.options)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: the dialect cannot be used: {error}") from error

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        taken: list[str] = []
        source = lines(self.path, str(self.dialect.encoding))
        ahead: list[str] = []

        def feed() -> Iterator[str]:
            while True:
                line = ahead.pop() if ahead else next(source, "")
                if not line:
                    return
                taken.append(line)
                yield line

        start, first = 1, next(source, "")
        if _DECLARED.fullmatch(first):
            start = 2
        else:
            ahead.append(first)
        reader = csv.reader(feed(), strict=True, **self.options)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                row = self._lenient(start, taken, error)
                # The lines that an open quote has swallowed may be good ones.
                ahead += reversed(taken[1:])
                del taken[1:]
                reader = csv.reader(feed(), strict=True, **self.options)
            if row is None:
                return
            if row:
                yield start, row
            start += len(taken)
            taken.clear()

    def _lenient(self, start: int, taken: list[str], error: csv.Error) -> list[str]:
        """A line with text behind a closing quote, as csv and pandas read it; what swallows other lines is refused."""
        asked_for_more: list[bool] = []

        def once() -> Iterator[str]:
            yield taken[0]
            asked_for_more.append(True)

        try:
            row = next(csv.reader(once(), **self.options), [])
        except csv.Error:
            row = []
        escaped = f"\\{self.dialect.quote}" in taken[0] and not self.dialect.escape
        if len(taken) == 1 and not asked_for_more and not escaped and row:
            self.stray.append(start)
            return row
        reason = 'a backslash before a quote; set escape: "\\\\" if it is meant to escape it' if escaped else str(error)
        self.bad(start, f"{reason}: {some([taken[0].rstrip()])}")
        return []

    def bad(self, line: int, reason: str) -> None:
        """Refuses a line, or counts it where the dialect drops such lines."""
        if self.dialect.bad_lines == "refuse":
            raise DataError(
                f"{self.path}: line {line}: {reason}; fix the line, or set bad_lines: drop in its dialect; {ADVICE}"
            )
        self.dropped.append(line)

    def notes(self) -> list[str]:
        found = []
        if self.stray:
            found.append(
                f"{self.path}: {len(self.stray):,} lines have text behind a closing quote, such as line "
                f"{self.stray[0]}; the quotes are left out, as pandas does; if they belong to the text, set quote: '' "
                "in its dialect"
            )
        if self.dropped:
            found.append(
                f"{self.path}: {len(self.dropped):,} lines could not be read and are left out, such as line "
                f"{self.dropped[0]}"
            )
        return found


def _guess_separator(path: Path, dialect: DialectConfig, separators: str) -> str:
    """The separator that gives all rows of a sample the width of the header; the usual one where none does."""
    sample: list[str] = []
    size = 0
    source = lines(path, str(dialect.encoding))
    for line in itertools.islice(source, _SAMPLE_LINES):
        if not sample and (declared := _DECLARED.fullmatch(line)):
            return declared[1]
        sample.append(line)
        size += len(line)
        if size > _SAMPLE_CHARACTERS:
            break
    whole = next(source, None) is None
    best = (0.0, 0, separators[0])
    for separator in separators:
        options = _Reader(path, dataclasses.replace(dialect, separator=separator)).options
        try:
            widths = [len(row) for row in csv.reader(sample, **options) if row]
        except csv.Error:
            continue
        # The last row may continue behind the sample.
        widths = widths if whole or len(widths) < 2 else widths[:-1]
        if not widths or widths[0] < 2:
            continue
        share = widths.count(widths[0]) / len(widths)
        if share == 1 and separator == separators[0]:
            return separator
        best = max(best, (share, widths[0], separator), key=lambda found: found[:2])
    return best[2]


def guess_dialect(path: Path, *, separators: str) -> tuple[DialectConfig, list[str]]:
    """Tries encodings and ways of quoting until the whole file can be read.

    Returns:
      The dialect, what the file itself announces left open, and what was guessed, in words.

    Raises:
      DataError: None of them reads it; that of the usual dialect.
    """
    dialect, words = DialectConfig(), []
    encoding = marked_encoding(path) or _guess_encoding(path)
    if encoding not in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        dialect = dataclasses.replace(dialect, encoding=encoding)
        words.append(f"{path}: its encoding is taken to be {encoding}, as it is not UTF-8")
    failure: DataError | None = None
    for change, reason in (
        ({}, ""),
        ({"escape": "\\"}, "a backslash is taken to escape quotes and separators"),
        ({"quote": ""}, "quotes are taken to be text like any other"),
    ):
        tried = dataclasses.replace(dialect, **change)
        try:
            table = open_text(path, tried, separators=separators)
            rows = quoted = 0
            for row in table.rows():
                rows += 1
                quoted += tried.quote == "" and any(len(part) > 1 and part[0] == part[-1] == '"' for part in row)
        except DataError as error:
            failure = failure or error
            continue
        if quoted > 0.1 * rows:
            continue
        found = table.dialect.separator
        separator = found if found != separators[0] else None
        result = dataclasses.replace(tried, separator=separator)
        return result, [*words, *table.notes, *([f"{path}: {reason}"] if reason else [])]
    raise failure or DataError(f"{path}: not readable as a table")


def _guess_encoding(path: Path) -> str:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    decoder = codecs.getincrementaldecoder("utf-8")()
    utf8, undefined, zeros, size = True, False, [0, 0], 0
    try:
        with opener(path, "rb") as file:
            while size < _LEAST_ROOM and (piece := file.read(2**20)):
                size += len(piece)
                if utf8:
                    try:
                        decoder.decode(piece)
                    except UnicodeDecodeError:
                        utf8 = False
                # The bytes that Windows-1252 leaves undefined.
                undefined = undefined or bool(piece.translate(None, _DEFINED))
                zeros = [zeros[0] + piece[::2].count(0), zeros[1] + piece[1::2].count(0)]
    except GZIP_ERRORS as error:
        raise DataError(f"{path}: not readable: {error}; fetch or pack the file again") from error
    if sum(zeros) > 0.2 * size:
        return "utf-16-le" if zeros[1] >= zeros[0] else "utf-16-be"
    return "utf-8" if utf8 else "latin-1" if undefined else "cp1252"


_DEFINED = bytes(set(range(256)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D})
