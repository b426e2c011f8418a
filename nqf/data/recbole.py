"""RecBole's interactions: benchmark files that belong together, and rows that hold a history (https://recbole.io)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nqf.config import ColumnsConfig, DialectConfig
from nqf.data.columns import identify
from nqf.data.errors import DataError
from nqf.data.nested import scalar
from nqf.data.readers import Rows, Table, join, open_table
from nqf.data.schema import some
from nqf.data.unirec import append

_BENCHMARK = re.compile(r"(.*\.)(train|valid|test)(\.inter(\.gz)?)", re.I)
_LIST = "_list"


def open_interactions(path: Path, dialect: DialectConfig, columns: ColumnsConfig) -> Table:
    """Opens an .inter file and, of the benchmark form, its train, valid and test files as one.

    Rows with a list of earlier items (`item_id_list`) are put together into one sequence per user.

    Args:
      path: The file.
      dialect: How it is written.
      columns: Names of its columns.

    Raises:
      DataError: Not such a file, or the histories of a user that contradict each other.
    """
    paths = benchmark_files(path)
    table = join(path, [open_table(part, dialect, ".inter") for part in paths])
    if len(paths) > 1:
        table.notes.append(
            f"{path}: {some([part.name for part in paths])} are read together; data.split decides what is held out"
        )
    found, _ = identify(path, table.names, ("user", "item"), columns)
    if found["item"] + _LIST not in table.names:
        return table
    found, _ = identify(path, table.names, ("user", "item", "time", "rating"), columns)
    table.notes.append(f"{path}: {found['item']}{_LIST} is read as what the user did before")
    names = [found[role] for role in ("user", "item", "time", "rating") if role in found]
    kept = [name for name in names[2:] if name + _LIST in table.names]
    read = {*names, *(name + _LIST for name in (found["item"], *kept))}
    if unused := [name for name in table.names if name not in read]:
        table.notes.append(f"{path}: columns that are not used: {some(unused)}")

    def rows(wanted: Sequence[str]) -> Rows:
        events = _events(table, names, kept)
        places = [names.index(name) for name in wanted]
        return ([event[place] for place in places] for event in events)

    return Table(path=path, names=names, rows=rows, notes=table.notes)


def benchmark_files(path: Path) -> list[Path]:
    """The train, valid and test files that belong to one of them; any other file alone."""
    parts = [path.with_name(name) for name in benchmark_names(path.name)]
    return [part for part in parts if part.is_file()] or [path]


def benchmark_names(name: str) -> list[str]:
    """The names of the train, valid and test files that belong to one of them; none of any other file."""
    match = _BENCHMARK.fullmatch(name)
    return [f"{match[1]}{part}{match[3]}" for part in ("train", "valid", "test")] if match else []


def _events(table: Table, names: Sequence[str], listed: Sequence[str]) -> Iterator[list[Any]]:
    """The events of all users in order; values that only targets have are missing where no row has the event as one."""
    user, item, *others = names
    samples: dict[str, list[tuple[list[str], list[list[Any]]]]] = {}
    for row in table.rows([*names, *(name + _LIST for name in (item, *listed))]):
        values = dict(zip([*names, *(name + _LIST for name in (item, *listed))], row, strict=True))
        history = [scalar(element) for element in values[item + _LIST] or ()]
        columns = [
            [*(values[name + _LIST] if name in listed else [None] * len(history)), values[name]] for name in others
        ]
        if any(len(column) != len(history) + 1 for column in columns):
            raise DataError(f"{table.path}: user {some([values[user]])!r}: lists of different lengths")
        samples.setdefault(values[user], []).append(([*history, values[item]], columns))
    for user_id, rows in samples.items():
        sequence: list[str] = []
        known: dict[int, list[Any]] = {}
        for items, columns in sorted(rows, key=lambda sample: len(sample[0])):
            start = append(sequence, items)
            if start is None:
                raise DataError(
                    f"{table.path}: the histories of user {some([user_id])!r} do not continue each other; give the "
                    "interactions as one row each instead"
                )
            for place in range(len(items)):
                old = known.setdefault(start + place, [None] * len(others))
                new = [column[place] for column in columns]
                known[start + place] = [a if a is not None else b for a, b in zip(old, new, strict=True)]
        for place, item_id in enumerate(sequence):
            yield [user_id, item_id, *known[place]]
