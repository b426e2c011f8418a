"""Readers of plain tables, as lazy frames in bounded memory: text, JSON, Parquet, Excel, and folders of parts."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from nqf import files
from nqf.config import DialectConfig
from nqf.data.errors import DataError
from nqf.data.nested import Parted, parse_json, parse_python, plain, unpacked
from nqf.data.parquet import checked
from nqf.data.schema import USUAL_SEPARATOR, Field, nearest, some
from nqf.data.stored import check_plain, joined, plain_columns, several_writes
from nqf.data.text import MOST_COLUMNS, PLAIN, lines, marked_encoding, name_unnamed, open_text

Columns = Mapping[str, Field | None]
"""Columns to read, each with the field that it belongs to; None for ids, times, ratings and reviews."""
Rows = Iterator[Sequence[Any]]

_BATCH = 20_000
TEXTS = {".csv": ",;\t|", ".tsv": "\t,;|", ".inter": "\t,;| ", ".item": "\t,;| "}
"""Separators of each kind of delimited text, the usual one first."""
TYPES = ("token", "token_seq", "float", "float_seq")
"""Types in the headers of RecBole's files (https://recbole.io/docs/user_guide/data/atomic_files.html)."""
_KNOWN = ".csv, .tsv, .json, .jsonl, .ndjson, .inter, .item (each also .gz), .parquet, .xlsx, and folders of such parts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose columns are known and whose rows have not been read.

    Attributes:
      path: The file or folder.
      names: Its columns.
      rows: Iterates over the rows, as values of some columns.
      notes: What was guessed or left out, in words; complete when the rows were read.
      parquet: The rows as a scan, where the file has types of its own.
      sequences: Columns that are taken apart at blanks, RecBole's way.
      unreadable: Why a column cannot be read, by its name; in `rows` and `parquet` it is null.
    """

    path: Path
    names: list[str]
    rows: Callable[[Sequence[str]], Rows]
    notes: list[str]
    parquet: pl.LazyFrame | None = None
    sequences: frozenset[str] = frozenset()
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, columns: Columns, scratch: Path, optional: Collection[str] = ()) -> pl.LazyFrame:
        """Some columns as a lazy frame. Texts stay texts: an id such as 007 is what it is.

        Args:
          columns: Columns to read.
          scratch: Folder for temporary files, which must stay until the frame was collected.
          optional: Those of them that may be absent; then they are null.

        Raises:
          DataError: A missing column (with the nearest one that is there), or rows that cannot be read.
        """
        for name in columns:
            if name not in self.names and name not in optional:
                raise DataError(f"{self.path}: no column '{some([name])}'{nearest(name, self.names)}")
            if name in self.unreadable:
                raise DataError(f"{self.path}: {self.unreadable[name]}")
        there = [name for name in columns if name in self.names]
        if self.parquet is None:
            return spool(self._noting_commas(self.rows(there), there, columns), columns, scratch, there)
        frame = self.parquet.select(_unpacked(name, self.parquet, columns[name]) for name in there)
        return frame.with_columns(pl.lit(None, dtype=pl.String).alias(name) for name in columns if name not in there)

    def _noting_commas(self, rows: Rows, names: Sequence[str], columns: Columns) -> Rows:
        watched = {
            place: name
            for place, name in enumerate(names)
            if name in self.sequences and (field := columns[name]) and field.modality == "category"
            if not (field.multi_valued and field.separator != USUAL_SEPARATOR)
        }
        commas = dict.fromkeys(watched, 0)
        for row in rows:
            for place in watched:
                commas[place] += isinstance(row[place], Parted) and ", " in row[place].text
            yield row
        for place, count in commas.items():
            if count:
                self.notes.append(
                    f"{self.path}: {count:,} sequences of {some([watched[place]])} have commas in them and are taken "
                    "apart at blanks, as RecBole does; if that is wrong, give the field multi_valued: true and "
                    'separator: ", "'
                )

    def records(self) -> Iterator[dict[str, Any]]:
        """The rows as dictionaries."""
        for row in self.rows(self.names):
            yield dict(zip(self.names, row, strict=True))


def read_table(
    path: Path,
    scratch: Path,
    columns: Columns,
    optional: Collection[str] = (),
    dialect: DialectConfig = PLAIN,
) -> pl.LazyFrame:
    """`open_table` and `Table.read` in one.

    Raises:
      DataError: As they do.
    """
    return open_table(path, dialect).read(columns, scratch, optional)


def open_table(path: Path, dialect: DialectConfig = PLAIN, kind: str | None = None) -> Table:
    """Finds out the columns of a table.

    Text is read as Python's csv module does; a JSONL line is an object; .json is JSON lines, an array of objects, a
    dictionary of them, or what pandas writes; of an Excel file the first sheet is read; a folder's files are parts.

    Args:
      path: The name's ending says what it is; its characters are never a pattern.
      dialect: How delimited text is written.
      kind: The ending that it is read as; None for its own.

    Raises:
      DataError: No such file, unknown kind, not readable, or a duplicate column.
    """
    if path.is_dir():
        parts = parts_of(path)
        table = join(path, [open_table(part, dialect, kind_of(path)) for part in parts])
        table.notes[:0] = several_writes(path, [part.name for part in parts])
        return table
    if not path.is_file():
        raise _absent(path)
    kind = kind or kind_of(path)
    if kind in TEXTS:
        return _open_text(path, dialect, kind)
    if dialect != DialectConfig(encoding=dialect.encoding if "json" in kind else None):
        raise DataError(f"{path}: a dialect belongs to delimited text; remove it from the data section")
    if kind in (".jsonl", ".ndjson", ".json"):
        return _open_json(path, dialect.encoding, lined=kind != ".json")
    if kind == ".parquet":
        return _open_parquet(path)
    if kind == ".xlsx":
        return _open_excel(path)
    advice = "; save it as .xlsx or .csv" if kind in (".xls", ".xlsb", ".ods") else ""
    raise DataError(f"{path}: unknown kind of table; known: {_KNOWN}{advice}")


def kind_of(path: Path) -> str:
    """The ending that says what a file is, in lower case, without .gz; of a folder that of its parts."""
    if path.is_dir() and (kind := kind_of(parts_of(path)[0])):
        return kind
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if zipped else suffixes)[-1:])
    return f"{kind}.gz" if zipped and kind in (".parquet", ".xlsx") else kind


def parts_of(folder: Path) -> list[Path]:
    """The files of a folder that Spark, pandas or polars wrote, without their notes (`is_part`); of a file itself."""
    if not folder.is_dir():
        return [folder]
    entries = sorted(folder.iterdir())
    check_plain(folder, [entry.name for entry in entries])
    entries = [entry for entry in entries if is_part(entry.name)]
    if inner := [entry for entry in entries if entry.is_dir()]:
        raise DataError(
            f"{folder}: has folders in it, such as {some([inner[0].name])}; columns that are names of folders are not "
            "read, write the table without partitions"
        )
    if not entries:
        raise DataError(f"{folder}: the folder has no files in it")
    # A part without rows may be empty.
    return [entry for entry in entries if entry.stat().st_size] or entries[:1]


def is_part(name: str) -> bool:
    """Whether a name in a folder of parts is that of a part: no note such as `_SUCCESS`, checksum or hidden file."""
    return name[0] not in "._" and not name.endswith(".crc")


def join(path: Path, tables: Sequence[Table]) -> Table:
    """Tables of the same columns as one, in their order. Where columns have names in every row, some may lack some.

    Raises:
      DataError: Parts of other kinds, or other columns.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    for table in tables:
        if set(table.names) != set(tables[0].names) and kind_of(table.path) in (*TEXTS, ".xlsx"):
            other = sorted(set(table.names) ^ set(tables[0].names))
            raise DataError(f"{table.path}: other columns than {tables[0].path.name}: {some(other)}")
    notes = [note for table in tables for note in table.notes]
    scans = {table.path: table.parquet for table in tables if table.parquet is not None}
    frame, unreadable = None, {}
    if scans:
        frame, strange, unreadable = joined(path, scans)
        notes += [*strange, *(f"{path}: {problem}; it is not read" for problem in unreadable.values())]
    for table in tables:
        unreadable |= table.unreadable

    def rows(wanted: Sequence[str]) -> Rows:
        for table in tables:
            there, known = [name for name in wanted if name in table.names], len(table.notes)
            for row in table.rows(there):
                values = dict(zip(there, row, strict=True))
                yield [values.get(name) for name in wanted]
            notes.extend(table.notes[known:])

    sequences = tables[0].sequences
    return Table(
        path=path, names=names, rows=rows, notes=notes, parquet=frame, sequences=sequences, unreadable=unreadable
    )


def _open_text(path: Path, dialect: DialectConfig, kind: str) -> Table:
    text = open_text(path, dialect, separators=TEXTS[kind])
    names, types = text.header, [""] * len(text.header)
    if kind in (".inter", ".item"):
        names, types = _typed(path, text.header)

    def rows(wanted: Sequence[str]) -> Rows:
        places = [names.index(name) for name in wanted]
        chosen = [(place, types[place].endswith("_seq")) for place in places]
        for row in text.rows():
            yield [_sequence(row[place]) if parted else row[place] for place, parted in chosen]

    sequences = frozenset(name for name, kind in zip(names, types, strict=True) if kind.endswith("_seq"))
    return Table(path=path, names=names, rows=rows, notes=text.notes, sequences=sequences)


def _sequence(text: str) -> Any:
    found = unpacked(text)
    if not isinstance(found, str):
        return found
    result = Parted(part for part in text.split(" ") if part)
    result.text = text
    return result


def _typed(path: Path, header: Sequence[str]) -> tuple[list[str], list[str]]:
    names, types = [], []
    for entry in header:
        name, _, kind = entry.strip().rpartition(":")
        if not name or kind not in TYPES:
            raise DataError(
                f"{path}: column '{some([entry])}' is not of the form name:type with type {', '.join(TYPES)}"
            )
        if name in names:
            raise DataError(f"{path}: duplicate column '{some([name])}'; rename or remove one of them")
        names.append(name)
        types.append(kind)
    return names, types


def _open_parquet(path: Path) -> Table:
    try:
        frame = pl.scan_parquet(checked(path), glob=False)
        names = frame.collect_schema().names()
        frame, unreadable = plain_columns(frame)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {str(error)[:300]}") from error

    def rows(wanted: Sequence[str]) -> Rows:
        selected = frame.select(wanted)
        for start in itertools.count(0, _BATCH):
            try:
                batch = selected.slice(start, _BATCH).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise DataError(f"{path}: not readable as Parquet: {str(error)[:300]}") from error
            if not len(batch):
                return
            yield from batch.iter_rows()

    notes = [f"{path}: {problem}; it is not read" for problem in unreadable.values()]
    return Table(path=path, names=names, rows=rows, notes=notes, parquet=frame, unreadable=unreadable)


def _unpacked(name: str, frame: pl.LazyFrame, field: Field | None) -> pl.Expr:
    """A column of a Parquet file, with what `plain` makes of texts that hold lists, of objects and of bytes."""
    dtype, column = frame.collect_schema()[name], pl.col(name)
    texts = dtype == pl.String and field is not None and field.modality in ("category", "text", "image")
    # Lists of numbers and texts are what categories and vectors need.
    lists = isinstance(dtype, (pl.List, pl.Array)) and (field is None or getattr(dtype, "inner", dtype).is_nested())
    if not texts and not lists and not isinstance(dtype, (pl.Struct, pl.Binary, pl.Duration, pl.Map)):
        return column
    target = spooled_type(field)

    def convert(values: pl.Series) -> pl.Series:
        return pl.Series(values.name, [plain(value, field) for value in values.to_list()], dtype=target)

    return column.map_batches(convert, return_dtype=target, is_elementwise=True)


def _open_excel(path: Path) -> Table:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{path}: Excel files need the package openpyxl; install it, or save the table as CSV"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        header = next(sheet.iter_rows(values_only=True), ())
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError, OSError, TypeError, SyntaxError) as error:
        raise DataError(f"{path}: not readable as an Excel file: {str(error)[:300]}; save the table as CSV") from error
    if not any(value is not None for value in header):
        raise DataError(f"{path}: the first row is empty; it needs a header")
    names = name_unnamed("" if value is None else str(value) for value in header)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: duplicate column '{some([name])}'; rename or remove one of them")
    notes = []
    if len(book.worksheets) > 1:
        notes.append(f"{path}: of {len(book.worksheets)} sheets the first, {some([sheet.title])}, is read")

    def rows(wanted: Sequence[str]) -> Rows:
        places = [names.index(name) for name in wanted]
        for row in sheet.iter_rows(min_row=2, values_only=True):
            if any(value is not None for value in row):
                values = [row[place] if place < len(row) else None for place in places]
                yield [
                    value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value
                    for value in values
                ]

    return Table(path=path, names=names, rows=rows, notes=notes)


def _open_json(path: Path, encoding: str | None, *, lined: bool) -> Table:
    lined = lined or _is_lined(path, encoding)
    whole = [] if lined else list(_json_records(path, read_json(path, (dict, list), encoding)))

    def records() -> Iterable[Mapping[str, Any]]:
        return read_json_lines(path, encoding) if lined else whole

    names: dict[str, None] = {}
    for row in records():
        names.update(dict.fromkeys(row))
        if len(names) > MOST_COLUMNS:
            raise DataError(f"{path}: its objects have more than {MOST_COLUMNS:,} different keys")

    def rows(wanted: Sequence[str]) -> Rows:
        for row in records():
            yield [row.get(name) for name in wanted]

    return Table(path=path, names=list(names), rows=rows, notes=[])


def _is_lined(path: Path, encoding: str | None) -> bool:
    """Whether a file has an object on its first line and more below it."""
    text = (line for line in _pieces(path, encoding) if line.strip())
    first, second = next(text, ""), next(text, None)
    try:
        return second is not None and isinstance(parse_json(first), dict)
    except (ValueError, RecursionError):
        return False


def _pieces(path: Path, encoding: str | None) -> Iterator[str]:
    return lines(path, encoding or marked_encoding(path) or "utf-8", endless=True)


def _json_records(path: Path, tree: Any) -> Iterator[dict[str, Any]]:
    """The objects of a JSON document, in the orientations that pandas writes and as a dictionary by id."""
    if isinstance(tree, dict) and isinstance(tree.get("data"), list) and {"schema", "columns"} & tree.keys():
        names = tree.get("columns")
        tree = [dict(zip(names, row, strict=False)) for row in tree["data"]] if names else tree["data"]
    elif isinstance(tree, dict) and tree and all(isinstance(row, dict) for row in tree.values()):
        numbers = [str(number) for number in range(len(next(iter(tree.values()))))]
        if numbers and all(list(column) == numbers for column in tree.values()):
            tree = [{name: column[number] for name, column in tree.items()} for number in numbers]
        elif list(tree) == [str(number) for number in range(len(tree))]:
            tree = list(tree.values())
        else:
            tree = [{"item_id": key, **row} for key, row in tree.items()]
    elif isinstance(tree, dict):
        # Lines of objects, of which there is one.
        tree = [tree]
    for number, row in enumerate(tree, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: entry {number}: expected an object, found {type(row).__name__}")
        yield row


def read_json(path: Path, kind: type | tuple[type, ...], encoding: str | None = None) -> Any:
    """Reads a JSON file whole.

    Args:
      path: The file, gzipped if its name ends in .gz.
      kind: dict or list, what it must hold.
      encoding: As in `DialectConfig`.

    Raises:
      DataError: No such file, not JSON, or something else in it.
    """
    if not path.is_file():
        raise _absent(path)
    try:
        value = parse_json("".join(_pieces(path, encoding)))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        expected = names[kind] if isinstance(kind, type) else "an object or a list"
        raise DataError(f"{path}: expected {expected} at the top, found {type(value).__name__}")
    return value


def read_json_lines(path: Path, encoding: str | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, gzipped if its name ends in .gz; blank lines are passed over.

    Lines that are a Python dictionary instead, as in older published files, are read as such.

    Raises:
      DataError: No such file, or a line that is not an object.
    """
    if not path.is_file():
        raise _absent(path)
    for number, line in enumerate(lines(path, encoding or marked_encoding(path) or "utf-8"), 1):
        if not line.strip():
            continue
        try:
            value = _json_line(line)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            # Not only JSONDecodeError: numbers of thousands of digits and deep nesting have errors of their own.
            raise DataError(f"{path}: line {number}: not JSON that can be read: {str(error)[:300]}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number}: expected a JSON object, found {type(value).__name__}")
        yield value


def _json_line(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        if not line.lstrip().startswith(("{'", "{u'", '{"')) or not line.rstrip().endswith("}"):
            raise
        try:
            return {str(key): value for key, value in parse_python(line.strip()).items()}
        except (ValueError, SyntaxError, AttributeError):
            pass
        raise


def spool(rows: Iterable[Sequence[Any]], columns: Columns, scratch: Path, names: Sequence[str]) -> pl.LazyFrame:
    """Writes rows into Parquet files of one type per column and scans those.

    Values become what `nqf.data.nested.plain` says.

    Args:
      rows: Values in the order of `names`.
      columns: Columns of the frame; those that `names` lacks are null.
      scratch: Folder for the Parquet files.
      names: Columns of the rows.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    rows, parts = iter(rows), []
    while (batch := list(itertools.islice(rows, _BATCH))) or not parts:
        values = dict(zip(names, zip(*batch, strict=True), strict=bool(batch)))
        frame = {
            name: pl.Series(
                [plain(value, field) for value in values.get(name, [None] * len(batch))], dtype=spooled_type(field)
            )
            for name, field in columns.items()
        }
        parts.append(folder / f"{len(parts):05d}.parquet")
        with files.whole(parts[-1]) as file:
            pl.DataFrame(frame).write_parquet(file)
        if not batch:
            break
    return pl.scan_parquet(parts, glob=False)


def pick(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Rows:
    """Values of some keys of dictionaries, for `spool`."""
    return ([row.get(name) for name in names] for row in rows)


def spooled_type(field: Field | None) -> pl.DataType:
    """The type of a column of `spool`: List(String) of categories and vectors, else String."""
    listed = field is not None and field.modality in ("category", "vector")
    return pl.List(pl.String) if listed else pl.String()


def _absent(path: Path) -> DataError:
    return DataError(
        f"{path}: no such file; fix the path in the data section of the configuration, or bring public data by "
        "nqf data fetch NAME"
    )
