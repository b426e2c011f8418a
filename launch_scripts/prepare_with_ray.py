#!/usr/bin/env python3
"""Writes the two Parquet tables that nqf takes, from raw tables of any size, with Ray Data.

    pip install 'ray[data]'
    python launch_scripts/prepare_with_ray.py --items raw/items.jsonl --events raw/events --output prepared \\
        --columns user=buyer item=sku time=ordered_at id=code
    nqf train ... --data.items prepared/items --data.interactions prepared/events

Raw tables are JSON lines, CSV with a header or Parquet (`.jsonl`, `.csv`, `.parquet`, the first two also `.gz`): files,
or folders of them, here or at addresses that Arrow opens (s3://, gs://, hdfs://). On a cluster, run it on the head node
(`--address auto`) and give paths that all nodes see. nqf itself needs no Ray, and this file nothing of nqf.

Written are `events` (user_id and item_id as text, timestamp as unix seconds, rating, review) and `items` (item_id and
all other columns, or those of `--keep`), every part with the same types. Events stay in the order of the source, files
by their names: nqf keeps the order of events of equal time. All is read and checked before anything is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs
import ray
import ray.data.expressions

EVENTS = {"user": "user_id", "item": "item_id", "time": "timestamp", "rating": "rating", "review": "review"}
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
TYPES = {
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "truth value": pa.bool_(),
    "time": pa.timestamp("us"),
    "list of texts": pa.list_(pa.string()),
    "list of numbers": pa.list_(pa.float64()),
}
MARK = "_prepared_with_ray.json"  # nqf passes names over that begin with _.


BROKEN = "lines as JSON objects"
# What pandas takes for nothing; as ids they are left to nqf's data.missing_words.
NOTHING = ["NaN", "nan", "NULL", "null", "None", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaT"]


class Refused(Exception):
    """Tables or options that cannot be used, in a sentence that says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the functions that run on the workers need.

    Attributes:
      names: Column of the raw table by role: those of `EVENTS`, and `id` of the items.
      per_second: Steps of times that are numbers.
      text: Item columns that are written as text whatever they are.
      keep: Item columns that are written; empty for all.
    """

    names: dict[str, str]
    per_second: int
    text: frozenset[str]
    keep: frozenset[str]


# Columns of a batch. What is there and cannot be read becomes null; `tallied` finds it by that.


def plain(batch: pa.Table, name: str) -> pa.Array:
    """A column in one piece, of Arrow's own types, blank texts and NaN as null; nulls if the batch lacks it."""
    if name not in batch.column_names:
        return pa.nulls(len(batch))
    column = batch[name].combine_chunks()
    column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column.type, pa.BaseExtensionType):
        column = tensor(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = pc.utf8_trim_whitespace(column.cast(pa.string()))
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    if pa.types.is_decimal(column.type):
        # Ids of databases are decimals without a fraction.
        whole = column.type.scale <= 0
        return column.cast(pa.string()) if whole else column.cast(pa.float64())
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    return column


def tensor(column: pa.Array) -> pa.Array:
    """Rows of Ray's or Arrow's tensors as lists; they have one axis, or are left for `kind_of` to refuse."""
    shape = getattr(column.type, "shape", None)
    if shape is not None and len(shape) == 1:
        stored = column.storage
        return stored.cast(pa.list_(pa.float64())) if is_number(stored.type.value_type) else stored
    return column


def is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view()


def is_number(dtype: pa.DataType) -> bool:
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype)


def ids(column: pa.Array) -> pa.Array:
    """Ids as text. Whole floats, as a column with gaps makes them, are integers; those that lost digits are no ids."""
    if is_text(column.type) or pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type):
        known = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
        return pc.if_else(known, column, pa.scalar(None, pa.float64())).cast(pa.int64()).cast(pa.string())
    return pa.nulls(len(column), pa.string())


def seconds(column: pa.Array, per_second: int) -> pa.Array:
    """Times as unix seconds, int64; fractions are cut off towards the past, and times without a zone are UTC."""
    dtype = column.type
    if pa.types.is_date(dtype) or pa.types.is_timestamp(dtype):
        column = column.cast(pa.timestamp("us", getattr(dtype, "tz", None)), safe=False)
        return pc.floor_temporal(column, unit="second").cast(pa.timestamp("s", column.type.tz)).cast(pa.int64())
    if pa.types.is_integer(dtype):
        values = [None if value is None else value // per_second for value in column.to_pylist()]
        return pa.array(values, pa.int64())
    if pa.types.is_floating(dtype):
        fits = pc.less(pc.abs(column), 2.0**63)
        column = pc.if_else(fits, column, pa.scalar(None, pa.float64()))
        return pc.floor(pc.divide(column, float(per_second))).cast(pa.int64())
    if not is_text(dtype):
        return pa.nulls(len(column), pa.int64())
    if column.null_count == len(column):
        return pa.nulls(len(column), pa.int64())
    whole = pa.array([None if value is None else split_number(value, per_second) for value in column.to_pylist()])
    texts = pc.if_else(whole.is_valid(), pa.scalar(None, pa.string()), column).to_pandas()
    dated = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce").dt.floor("s")
    dated = (dated - pd.Timestamp(0, tz="UTC")) // pd.Timedelta(seconds=1)
    return pc.coalesce(whole.cast(pa.int64()), pa.array(dated, from_pandas=True).cast(pa.int64()))


def split_number(value: str, per_second: int) -> int | None:
    """Floor of a number over `per_second`, with all its digits; None if the text is none."""
    if not re.fullmatch(r"-?\d{1,30}(\.\d*)?", value):
        return None
    whole, _, fraction = value.partition(".")
    result = (int(whole) - (value.startswith("-") and int(fraction or 0) > 0)) // per_second
    return result if abs(result) < 2**63 else None


def number(column: pa.Array) -> pa.Array:
    """Numbers as float64."""
    if is_number(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.float64(), safe=False)
    if not is_text(column.type):
        return pa.nulls(len(column), pa.float64())
    return pa.array(pd.to_numeric(column.to_pandas(), errors="coerce"), pa.float64(), from_pandas=True)


def text(column: pa.Array) -> pa.Array:
    """Texts; lists and objects as JSON, which nqf takes apart."""
    if is_text(column.type) or pa.types.is_integer(column.type):
        return column.cast(pa.string())
    return pa.array(
        [None if value is None else written(value) for value in column.to_pylist(maps_as_pydicts="lossy")], pa.string()
    )


def written(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def kind_of(dtype: pa.DataType) -> str | None:
    """What a type is written as: a key of `TYPES`, None of a column of nulls, or the type's name if it is refused."""
    if pa.types.is_null(dtype):
        return None
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype):
        if pa.types.is_null(dtype.value_type):
            return None
        inner = kind_of(dtype.value_type)
        return {"text": "list of texts", "integer": "list of numbers", "number": "list of numbers"}.get(
            inner, "text" if inner in TYPES else inner
        )
    if pa.types.is_struct(dtype) or pa.types.is_map(dtype):
        return "text"
    tests = {
        "text": is_text, "integer": pa.types.is_integer, "number": is_number, "truth value": pa.types.is_boolean,
        "time": lambda dtype: pa.types.is_timestamp(dtype) or pa.types.is_date(dtype),
    }  # fmt: skip
    return next((kind for kind, test in tests.items() if test(dtype)), str(dtype))


def as_kind(column: pa.Array, kind: str) -> pa.Array:
    if kind == "text":
        return text(column)
    if kind == "time" and getattr(column.type, "tz", None):
        column = column.cast(pa.timestamp("us", "UTC"), safe=False)
    return column.cast(TYPES[kind], safe=kind == "integer")


# Batches.


def read_lines(batch: pa.Table) -> pa.Table:
    """Rows of JSON lines. Objects and lists of other things than numbers and texts stay JSON."""
    rows = list(map(parsed, batch["text"].to_pylist()))
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: array([row.get(name) for row in rows]) for name in names}) if names else pa.table({})


def parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else {BROKEN: line}


def array(values: list[Any]) -> pa.Array:
    def flat(value: Any) -> bool:
        return not isinstance(value, dict) and not (
            isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value)
        )

    try:
        return pa.array([value if flat(value) else json.dumps(value, ensure_ascii=False) for value in values])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # Of several types, or too large for a number.
        return pa.array([None if value is None else written(value) for value in values], pa.string())


def read_events(batch: pa.Table, options: Options, columns: dict[str, pa.Array] | None = None) -> pa.Table:
    """The events of a batch as they are written; `columns` takes up what they were read from."""
    raw = {role: plain(batch, options.names[role]) for role in EVENTS}
    for role in ("time", "rating"):
        if is_text(raw[role].type):
            words = pc.is_in(raw[role], pa.array(NOTHING))
            raw[role] = pc.if_else(words, pa.scalar(None, pa.string()), raw[role])
    if columns is not None:
        columns.update({EVENTS[role]: column for role, column in raw.items()})
    read: dict[str, Callable[[pa.Array], pa.Array]] = {
        "user": ids, "item": ids, "rating": number, "review": text,
        "time": lambda column: seconds(column, options.per_second),
    }  # fmt: skip
    return pa.table({target: read[role](raw[role]) for role, target in EVENTS.items()})


def tally_events(batch: pa.Table, options: Options) -> pa.Table:
    raw: dict[str, pa.Array] = {}
    return tallied(batch, raw, read_events(batch, options, raw), {})


def tally_items(batch: pa.Table, options: Options) -> pa.Table:
    raw = {"item_id": plain(batch, options.names["id"])}
    kinds = {name: kind_of(plain(batch, name).type) for name in item_columns(batch.column_names, options)}
    return tallied(batch, raw, pa.table({"item_id": ids(raw["item_id"])}), kinds)


def item_columns(names: Iterable[str], options: Options) -> list[str]:
    others = [name for name in names if name not in (options.names["id"], "item_id")]
    return [name for name in others if not options.keep or name in options.keep]


def tallied(batch: pa.Table, raw: dict[str, pa.Array], read: pa.Table, kinds: dict[str, str | None]) -> pa.Table:
    """One row: what there is in a batch, as JSON."""
    unreadable = {}
    for name, column in raw.items():
        wrong = pc.and_(column.is_valid(), read[name].combine_chunks().is_null())
        if count := pc.sum(wrong).as_py():
            unreadable[name] = [count, repr(column.filter(wrong)[0].as_py())[:60]]
    if BROKEN in batch.column_names:
        column = batch[BROKEN].drop_null()
        unreadable[BROKEN] = [len(column), repr(column[0].as_py())[:60]]
    missing = {name: column.null_count for name, column in raw.items() if name.endswith("_id")}
    either = pa.nulls(len(batch), pa.bool_()).fill_null(False)
    for name in missing:
        either = pc.or_(either, raw[name].is_null())
    tally = {
        "rows": len(batch), "columns": batch.column_names, "kinds": kinds, "unreadable": unreadable,
        "missing": missing, "without": pc.sum(either).as_py() or 0,
    }  # fmt: skip
    return pa.table({"tally": [json.dumps(tally)]})


def with_ids(table: pa.Table) -> pa.Table:
    known = [table[name].is_valid() for name in ("user_id", "item_id") if name in table.column_names]
    return table.filter(known[0] if len(known) == 1 else pc.and_(*known))


def write_events(batch: pa.Table, options: Options) -> pa.Table:
    return with_ids(read_events(batch, options))


def write_items(batch: pa.Table, options: Options, kinds: dict[str, str]) -> pa.Table:
    found = {"item_id": ids(plain(batch, options.names["id"]))}
    return with_ids(pa.table(found | {name: as_kind(plain(batch, name), kind) for name, kind in kinds.items()}))


def newest(group: pa.Table, column: str) -> pa.Table:
    """One row of an item: that with the largest value of a column, then the one whose JSON is last in the alphabet."""

    def key(row: dict[str, Any]) -> tuple:
        value = row[column] if column else None
        return (value is not None, value if value is not None else 0, json.dumps(row, sort_keys=True, default=str))

    rows = group.to_pylist()
    best = max(range(len(rows)), key=lambda at: key(rows[at]))
    return group.slice(best, 1)


# The driver.


def located(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(path if "://" in path else os.path.abspath(path))


def files_of(path: str) -> list[str]:
    """The files of a path in the order of their names, without hidden ones and notes, as Ray takes them."""
    system, inside = located(path)
    kind = system.get_file_info(inside).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise Refused(f"{path}: no such file or folder; fix the path")
    if kind == pyarrow.fs.FileType.File:
        return [path if "://" in path else inside]
    found = system.get_file_info(pyarrow.fs.FileSelector(inside, recursive=True))
    names = sorted(info.path for info in found if info.type == pyarrow.fs.FileType.File and info.size)
    base = inside.rstrip("/")
    names = [name for name in names if not re.search(r"(^|/)[._]|\.crc$", name[len(base) + 1 :])]
    if not names:
        raise Refused(f"{path}: there is no file with rows in it")
    return [f"{path.rstrip('/')}/{name[len(base) + 1 :]}" for name in names]


def read_raw(path: str, needed: list[str]) -> ray.data.Dataset:
    """A raw table, its rows in the order of its files.

    Raises:
      Refused: No such table, another kind, or a CSV file without a column that is needed.
    """
    names = files_of(path)
    endings = {re.sub(r"\.gz$", "", name.lower()).rpartition(".")[2] for name in names}
    if endings <= {"jsonl", "ndjson", "json"}:
        lines = ray.data.read_text(names, drop_empty_lines=True)
        return lines.map_batches(read_lines, batch_format="pyarrow", batch_size=None)
    if endings == {"csv"}:
        # As texts: 007 is no 7, and nqf reads numbers and times of texts itself.
        headers = {name: header_of(name) for name in names}
        for name, found in headers.items():
            # Ray fills such a column with nulls.
            check_columns(name, needed, found)
        header = dict.fromkeys((column for found in headers.values() for column in found), pa.string())
        return ray.data.read_csv(
            names,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=header),
        )
    if endings in ({"parquet"}, {"pq"}):
        return ray.data.read_parquet(names)
    raise Refused(f"{path}: has files of {', '.join(sorted(endings))}; give .jsonl, .csv or .parquet, of one kind")


def header_of(name: str) -> list[str]:
    system, inside = located(name)
    with system.open_input_stream(inside) as stream, pyarrow.csv.open_csv(stream) as rows:
        return rows.schema.names


def check_columns(path: str, needed: list[str], found: list[str]) -> None:
    if lacking := [name for name in needed if name not in found]:
        raise Refused(
            f"{path}: no column {', '.join(lacking)} in some or all of it; there is {', '.join(found)}; name the "
            "columns that are meant with --columns, as user=buyer"
        )


def tally(path: str, raw: ray.data.Dataset, count: Callable, needed: list[str], options: Options) -> dict[str, Any]:
    """What there is in a whole table.

    Raises:
      Refused: No rows, a column that is not there, or values that cannot be read.
    """
    counted = raw.map_batches(count, fn_args=(options,), batch_format="pyarrow", batch_size=None)
    batches = [json.loads(row["tally"]) for row in counted.take_all()]
    batches = [batch for batch in batches if batch["rows"]]
    if not batches:
        raise Refused(f"{path}: there is no row in it")
    if found := [batch["unreadable"][BROKEN] for batch in batches if BROKEN in batch["unreadable"]]:
        raise Refused(f"{path}: {sum(count for count, _ in found)} lines are no JSON objects, such as {found[0][1]}")
    for batch in batches:
        check_columns(path, needed, batch["columns"])
    for batch in batches:
        for name, (_, example) in batch["unreadable"].items():
            total = sum(other["unreadable"].get(name, [0])[0] for other in batches)
            raise Refused(f"{path}: {total} values of {name} cannot be read, such as {example}; fix them")
    kinds: dict[str, set[str]] = {}
    for batch in batches:
        for name, kind in batch["kinds"].items():
            kinds.setdefault(name, set()).update([kind] if kind else [])
    missing = {name: sum(batch["missing"][name] for batch in batches) for name in batches[0]["missing"]}
    return {
        "rows": sum(batch["rows"] for batch in batches), "kinds": kinds, "missing": missing,
        "without": sum(batch["without"] for batch in batches),
    }  # fmt: skip


def decided(path: str, kinds: dict[str, set[str]], options: Options) -> dict[str, str]:
    """One kind for every item column.

    Raises:
      Refused: Values of several kinds, or of one that nqf does not read.
    """
    if lacking := (options.text | options.keep) - kinds.keys():
        raise Refused(f"{path}: no column {', '.join(sorted(lacking))}; fix --keep and --text")
    result = {}
    for name, found in kinds.items():
        found = {"number"} if found == {"integer", "number"} else found
        if strange := found - TYPES.keys():
            raise Refused(
                f"{path}: {name} is of the type {strange.pop()}; leave it out with --keep, or make it text before"
            )
        if name in options.text:
            found = {"text"}
        if len(found) > 1:
            raise Refused(
                f"{path}: {name} is {' in some rows and '.join(sorted(found))} in others; make it one of them, or have "
                f"it written as text with --text {name}"
            )
        result[name] = next(iter(found), "text")
    return result


def check_ids(path: str, found: dict[str, Any], drop: bool) -> None:
    if found["without"] and not drop:
        counts = " and ".join(f"{count} rows have no {name}" for name, count in found["missing"].items() if count)
        raise Refused(f"{path}: {counts}; fix them, or leave them out with --drop-missing-ids")
    if found["without"] == found["rows"]:
        raise Refused(f"{path}: no row has its ids; name the columns that are meant with --columns")
    print(f"{path}: {found['rows']:,} rows, of which {found['without']:,} without ids are left out")


def single(
    path: str, items: ray.data.Dataset, rows: int, arguments: argparse.Namespace, names: Iterable[str]
) -> ray.data.Dataset:
    """The items, each once; `rows` is their number, by which they are spread.

    Raises:
      Refused: Some are there more than once, and it was not asked for one of each.
    """
    # Ray's default is 200, a task each, however few there are.
    spread = max(int(ray.cluster_resources().get("CPU", 1)), rows // 10**6)
    if arguments.deduplicate:
        if arguments.newest and arguments.newest not in names:
            raise Refused(f"{path}: no column {arguments.newest} to tell the newest row by; fix --newest")
        chosen = items.groupby("item_id", num_partitions=spread).map_groups(
            newest, fn_args=(arguments.newest,), batch_format="pyarrow"
        )
        # Groups come in any order.
        return chosen.sort("item_id")
    counts = items.select_columns(["item_id"]).groupby("item_id", num_partitions=spread).count()
    if first := counts.filter(expr=ray.data.expressions.col("count()") > 1).take(1):
        raise Refused(
            f"{path}: item '{first[0]['item_id']}' is there {first[0]['count()']} times; keep one row per item, or "
            "have it done with --deduplicate"
        )
    return items


def open_output(arguments: argparse.Namespace) -> tuple[pyarrow.fs.FileSystem, str, list[str]]:
    """The folder to write, and what is in it.

    Raises:
      Refused: It holds something else, was made earlier and is not to be replaced, or holds a raw table.
    """
    output = arguments.output
    system, folder = located(output)
    for raw in (arguments.items, arguments.events):
        other, inside = located(raw)
        if other.equals(system) and f"{inside}/".startswith(f"{folder.rstrip('/')}/"):
            raise Refused(f"{output}: holds the raw table {raw}; give another folder")
    there = system.get_file_info(folder)
    if there.type == pyarrow.fs.FileType.File:
        raise Refused(f"{output}: is a file; give a folder")
    entries = []
    if there.type == pyarrow.fs.FileType.Directory:
        entries = [info.base_name for info in system.get_file_info(pyarrow.fs.FileSelector(folder))]
    if entries and MARK not in entries:
        raise Refused(f"{output}: holds what this program did not make; give another folder")
    if entries and not arguments.replace:
        raise Refused(f"{output}: was made earlier; --replace makes it again")
    return system, folder, entries


def note(system: pyarrow.fs.FileSystem, folder: str, tree: dict[str, Any]) -> None:
    with system.open_output_stream(f"{folder}/{MARK}") as stream:
        stream.write(json.dumps({"made by": "launch_scripts/prepare_with_ray.py", **tree}, indent=1).encode())


def write(tables: dict[str, ray.data.Dataset], arguments: argparse.Namespace) -> dict[str, int]:
    """Writes both tables; local folders get their names when both are whole. Returns the rows of each."""
    system, folder, entries = open_output(arguments)
    base = arguments.output.rstrip("/") if "://" in arguments.output else folder
    # Stores of objects have no renaming; there the note tells that it is whole.
    local = isinstance(system, pyarrow.fs.LocalFileSystem)
    for name in {"_unfinished", *([] if local else tables)} & set(entries):
        system.delete_dir(f"{folder}/{name}")
    system.create_dir(folder, recursive=True)
    note(system, folder, {"finished": None})
    for name, table in tables.items():
        table.write_parquet(f"{base}/_unfinished/{name}" if local else f"{base}/{name}")
    for name in tables if local else ():
        if name in entries:
            system.delete_dir(f"{folder}/{name}")
        system.move(f"{folder}/_unfinished/{name}", f"{folder}/{name}")
    if local:
        system.delete_dir(f"{folder}/_unfinished")
    counts = {name: pyarrow.dataset.dataset(f"{folder}/{name}", filesystem=system).count_rows() for name in tables}
    note(system, folder, {"finished": datetime.datetime.now(datetime.UTC).isoformat(), "rows": counts})
    return counts


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", required=True, help="raw table of the items")
    parser.add_argument("--events", required=True, help="raw table of the events")
    parser.add_argument("--output", required=True, help="folder to make, with folders items and events")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help=f"of {', '.join(EVENTS)}, and id of the items"
    )
    parser.add_argument("--time-unit", choices=UNITS, default="seconds", help="of times that are numbers")
    parser.add_argument("--keep", nargs="+", default=[], help="item columns to write; all by default")
    parser.add_argument("--text", nargs="+", default=[], help="item columns to write as text")
    parser.add_argument("--deduplicate", action="store_true", help="keep one row of an item")
    parser.add_argument("--newest", default="", metavar="COLUMN", help="which one: that with its largest value")
    parser.add_argument("--drop-missing-ids", action="store_true", help="leave rows without ids out, and count them")
    parser.add_argument("--replace", action="store_true", help="make a folder again that this program made")
    parser.add_argument("--address", help="Ray cluster to join, as auto; by default Ray runs on this machine")
    parser.add_argument("--cpus", type=int, help="cores for Ray on this machine; all by default")
    return parser.parse_args(words)


def named(arguments: argparse.Namespace) -> dict[str, str]:
    given = dict(entry.partition("=")[::2] for entry in arguments.columns)
    if wrong := [role for role in given if role not in (*EVENTS, "id") or not given[role]]:
        raise Refused(f"--columns: {', '.join(wrong)}: write ROLE=COLUMN, with ROLE of {', '.join(EVENTS)} and id")
    return EVENTS | {"id": "item_id"} | given


def run(arguments: argparse.Namespace) -> None:
    names = named(arguments)
    open_output(arguments)
    options = Options(
        names=names,
        per_second=UNITS[arguments.time_unit],
        text=frozenset(arguments.text),
        keep=frozenset(arguments.keep),
    )
    given = [entry.partition("=")[0] for entry in arguments.columns]
    needed = [names[role] for role in EVENTS if role in ("user", "item") or role in given]
    raw_items, raw_events = read_raw(arguments.items, [names["id"]]), read_raw(arguments.events, needed)
    found_items = tally(arguments.items, raw_items, tally_items, [names["id"]], options)
    found_events = tally(arguments.events, raw_events, tally_events, needed, options)
    check_ids(arguments.items, found_items, arguments.drop_missing_ids)
    check_ids(arguments.events, found_events, arguments.drop_missing_ids)
    kinds = decided(arguments.items, found_items["kinds"], options)
    batches = {"batch_format": "pyarrow", "batch_size": None}
    items = raw_items.map_batches(write_items, fn_args=(options, kinds), **batches)
    items = single(arguments.items, items, found_items["rows"], arguments, kinds)
    events = raw_events.map_batches(write_events, fn_args=(options,), **batches)
    counts = write({"items": items, "events": events}, arguments)
    print(f"{arguments.output}: {counts['items']:,} items, {counts['events']:,} events")


def main(words: list[str]) -> int:
    """Runs the program; returns its exit code."""
    arguments = parse(words)
    ray.init(
        address=arguments.address, num_cpus=arguments.cpus, log_to_driver=False, include_dashboard=False,
        logging_level=logging.WARNING,
    )  # fmt: skip
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    # Blocks are written in the order in which they were read, not in that in which they are ready.
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    try:
        run(arguments)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
