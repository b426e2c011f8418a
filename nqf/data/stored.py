"""What columns of Parquet files are, whoever wrote them: extension types, and parts that differ in their types.

Polars has no common type of its own for some of what parts hold and a wrong one for others: times beside numbers become
numbers in the unit of the times. Ray decides the types block by block, so that parts of one table do differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from nqf.data.errors import STRUCTURE_ERRORS, DataError
from nqf.data.schema import some

# Of Ray Data (ray.data._internal.tensor_extensions.arrow) and of Arrow
# (https://arrow.apache.org/docs/format/CanonicalExtensions.html).
_TENSORS = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "arrow.fixed_shape_tensor")
_RAGGED = "ray.data.arrow_variable_shaped_tensor"
_AS_STORED = ("arrow.json", "arrow.bool8")
# Folders and files of Ray and Spark carry a name of the write and a number of the part.
_WRITES = (
    re.compile(r"(?P<write>.*[0-9a-f]{32})_(?P<number>\d{6}(_\d{6})?-\d+)\."),
    re.compile(r"part-(?P<number>\d{5})-(?P<write>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})"),
)
LOGS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""Folders in a folder of parts that say which of them count."""


def plain_columns(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, dict[str, str]]:
    """Columns of extension types as the lists, texts and numbers that they are.

    Args:
      frame: A scan of one file.

    Returns:
      The scan, and why a column cannot be read, by its name; in the scan such a column is null.
    """
    changed, unreadable = {}, {}
    for name, dtype in frame.collect_schema().items():
        if isinstance(dtype, pl.Extension):
            try:
                changed[name], problem = _plain(name, dtype)
            except (*STRUCTURE_ERRORS, ValueError):
                changed[name], problem = pl.lit(None), f"says of its type '{dtype.ext_name()}' what cannot be read"
            if problem:
                unreadable[name] = f"column '{some([name])}' {problem}"
        elif isinstance(dtype, (pl.Categorical, pl.Enum)):
            # Categories of one part are unknown in another.
            changed[name] = pl.col(name).cast(pl.String)
    return frame.with_columns(**changed), unreadable


def _plain(name: str, dtype: Any) -> tuple[pl.Expr, str]:
    kind, stored, column = dtype.ext_name(), dtype.ext_storage(), pl.col(name).ext.storage()
    if kind in _TENSORS:
        axes = _shape(dtype.ext_metadata())
    elif kind == _RAGGED:
        axes, stored = int(dtype.ext_metadata() or 1) * ["any"], dict(stored)["data"]
        column = column.struct.field("data")
    elif kind in _AS_STORED:
        return column, ""
    else:
        return pl.lit(None), (
            f"has the type '{kind}', which only the program that wrote it can read; write it as numbers, texts or "
            "lists of them"
        )
    if len(axes) != 1:
        return pl.lit(None), (
            f"holds arrays of {len(axes)} axes ({' x '.join(map(str, axes))}), and a list has one; write it with "
            "array.reshape(len(array), -1) where all numbers of an array belong to one vector"
        )
    return (_texts(column) if stored.inner == pl.Binary else column), ""


def _shape(metadata: str | None) -> list[int]:
    tree = json.loads(metadata or "[]")
    return tree["shape"] if isinstance(tree, dict) else tree


def _texts(column: pl.Expr) -> pl.Expr:
    """Texts of a tensor, which are the bytes that numpy has of them: four for each character, filled up by zeros."""

    def convert(values: pl.Series) -> pl.Series:
        rows = [None if row is None else [_text(cell) for cell in row] for row in values.to_list()]
        return pl.Series(values.name, rows, dtype=pl.List(pl.String))

    return column.map_batches(convert, return_dtype=pl.List(pl.String), is_elementwise=True)


def _text(cell: bytes | None) -> str | None:
    if cell is None:
        return None
    try:
        return cell.decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError:
        return cell.decode("utf-8", errors="replace").rstrip("\0")


def joined(path: Path, scans: Mapping[Path, pl.LazyFrame]) -> tuple[pl.LazyFrame, list[str], dict[str, str]]:
    """Parts as one scan, in their order; a column that a part lacks is null there.

    Args:
      path: The folder, named in errors and notes.
      scans: Of every part.

    Returns:
      The scan; what is strange about the parts, in words; and why a column cannot be read, by its name: it has values
      of different kinds in different parts, and is null in the scan.

    Raises:
      DataError: The parts have no common types.
    """
    types: dict[str, dict[Path, pl.DataType]] = {}
    for part, scan in scans.items():
        for name, dtype in scan.collect_schema().items():
            types.setdefault(name, {})[part] = dtype
    notes, unreadable, naive = _absent(path, scans, types), {}, []
    for name, found in types.items():
        if problem := _clash(name, found):
            unreadable[name] = problem
            continue
        different = set(found.values())
        if pl.Float32 in different and any(dtype.is_numeric() for dtype in different - {pl.Float32()}):
            notes.append(
                f"{path}: '{some([name])}' is Float32 in some parts and another number in others; of whole numbers "
                "beyond 2^24 the former have lost the last digits"
            )
        if len({dtype.time_zone for dtype in different if isinstance(dtype, pl.Datetime)}) > 1:
            naive.append(name)
    nothing = [pl.lit(None).alias(name) for name in unreadable]
    fitting = [scan.with_columns(*_utc(scan, naive), *nothing) for scan in scans.values()]
    try:
        frame = pl.concat(fitting, how="diagonal_relaxed")
        frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: its parts do not fit together: {str(error)[:300]}") from error
    return frame, notes, unreadable


def _absent(
    path: Path, scans: Mapping[Path, pl.LazyFrame], types: Mapping[str, Mapping[Path, pl.DataType]]
) -> list[str]:
    """Notes on columns that parts with rows lack."""
    notes, filled = [], {}
    for name, found in types.items():
        if len(found) == len(scans):
            continue
        for part in scans.keys() - found.keys() - filled.keys():
            filled[part] = scans[part].select(pl.len()).collect().item() > 0
        lacking = [part for part in scans if part not in found and filled[part]]
        if lacking:
            notes.append(
                f"{path}: {len(lacking)} of {len(scans)} parts, such as {lacking[0].name}, have no column "
                f"'{some([name])}'; it is missing in their rows"
            )
    return notes


def _utc(scan: pl.LazyFrame, names: Sequence[str]) -> list[pl.Expr]:
    """Times with a zone as those without one are read."""
    schema = scan.collect_schema()
    zoned = [name for name in names if isinstance(dtype := schema.get(name), pl.Datetime) and dtype.time_zone]
    return [pl.col(name).dt.convert_time_zone("UTC").dt.replace_time_zone(None) for name in zoned]


def _clash(name: str, types: Mapping[Path, pl.DataType]) -> str:
    """Why a column of several types cannot be read; empty if it can."""
    seen: dict[str, Path] = {}
    for part, dtype in types.items():
        if kind := _kind(dtype):
            seen.setdefault(kind, part)
    kinds = {kind: None for kind in seen if kind != "texts"}
    # A text can be a number, a time or a truth value; lists and objects have other texts in every library.
    if len(kinds) > 1 or ("texts" in seen and kinds.keys() & {"lists", "objects", "durations"}):
        (one, first), (other, second), *_ = ((kind, seen[kind]) for kind in (kinds if len(kinds) > 1 else seen))
        return (
            f"column '{some([name])}' holds {one} in {first.name} and {other} in {second.name}; write it with one type "
            "in all parts, cast before the table is written"
        )
    inside: dict[str, dict[Path, Any]] = {}
    for part, dtype in types.items():
        if isinstance(dtype, (pl.List, pl.Array)):
            inside.setdefault(name, {})[part] = dtype.inner
        for key, value in dtype if isinstance(dtype, pl.Struct) else ():
            inside.setdefault(f"{name}.{key}", {})[part] = value
    return next(filter(None, (_clash(key, found) for key, found in inside.items())), "")


def _kind(dtype: pl.DataType) -> str | None:
    """What polars may bring to a common type without changing what it says; None for a column without values."""
    if dtype.is_numeric():
        return "numbers"
    kinds = {
        pl.Null: None, pl.String: "texts", pl.Boolean: "truth values", pl.Binary: "bytes", pl.Date: "times",
        pl.Datetime: "times", pl.Duration: "durations", pl.Time: "times of the day", pl.List: "lists",
        pl.Array: "lists", pl.Struct: "objects",
    }  # fmt: skip
    return kinds.get(dtype.base_type(), "objects")


def several_writes(path: Path, names: Sequence[str]) -> list[str]:
    """A note where the names of parts tell of more than one write into a folder: Ray adds to what is there."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        for pattern in _WRITES:
            if match := pattern.match(name):
                numbers.setdefault(match["number"], set()).add(match["write"])
    writes = max(map(len, numbers.values()), default=1)
    if writes == 1:
        return []
    return [
        f"{path}: was written to {writes} times, as the names of its parts tell, and all of them are read; if one was "
        "meant to replace another, write to an empty folder or with mode='overwrite'"
    ]


def check_plain(folder: Path, names: Sequence[str]) -> None:
    """Refuses a folder whose files are a table only together with a log, which says those that are of the past.

    Args:
      folder: Named in the error.
      names: What is in it.

    Raises:
      DataError: It has such a log.
    """
    for mark in LOGS.keys() & set(names):
        raise DataError(
            f"{folder}: is a table of {LOGS[mark]}, whose files hold rows of older versions too; write its present "
            "rows as plain Parquet"
        )
