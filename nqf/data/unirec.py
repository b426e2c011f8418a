"""JSON files of the reference system as tables: the item dictionary and the train and test samples.

Formats: REFERENCE system UniRec (github.com/ulab-uiuc/UniRec), `All_Beauty_item_dict.json`,
`All_Beauty_item_triplet_dict.json` and `*_{train,test}_LRanker.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nqf.data.amazon import flatten
from nqf.data.errors import DataError
from nqf.data.readers import Columns, pick, read_json, spool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One entry of a sample file.

    Attributes:
      user_id: The user.
      history: Item ids, oldest first.
      candidates: Item ids that the reference ranks, the target among them.
      ground_truth: The item after the history.
    """

    user_id: str
    history: tuple[str, ...]
    candidates: tuple[str, ...]
    ground_truth: str


def read_items(path: Path, scratch: Path, columns: Columns) -> pl.LazyFrame:
    """Opens an item dictionary `{item id: metadata}`, raw or reduced to the reference's fourteen fields.

    Args:
      path: The JSON file; it is read whole.
      scratch: Folder for temporary files, which must stay until the frame was collected.
      columns: Columns as `nqf.data.amazon.flatten` names them.

    Raises:
      DataError: Not such a file.
    """
    tree = read_json(path, dict)
    for item_id, row in tree.items():
        if not isinstance(row, dict):
            raise DataError(f"{path}: item '{item_id}': expected an object, found {type(row).__name__}")
    rows = (flatten(row, item_id, columns) for item_id, row in tree.items())
    return spool(pick(rows, list(columns)), columns, scratch, list(columns))


def read_samples(path: Path) -> list[Sample]:
    """Reads a sample file.

    Raises:
      DataError: Not such a file; names the entry and the key.
    """
    return [_sample(path, number, entry) for number, entry in enumerate(read_json(path, list))]


def read_interactions(path: Path, scratch: Path, columns: Columns) -> pl.LazyFrame:
    """Puts the sequences of a train file, and of the test file beside it, together again.

    The samples of a user overlap: each is appended to what is known of the user without the part that is there
    already. There are no times; the order is that of the samples.

    Args:
      path: A sample file. If `_train` is in its name and there is a file with `_test` instead, both are read.
      scratch: As in `read_items`.
      columns: user_id, item_id and columns that stay null.

    Raises:
      DataError: Not such a file.
    """
    samples = read_samples(path)
    test = path.with_name(path.name.replace("_train", "_test"))
    if test != path and test.is_file():
        samples += read_samples(test)
    sequences: dict[str, list[str]] = {}
    for sample in samples:
        sequence = sequences.setdefault(sample.user_id, [])
        if append(sequence, new := [*sample.history, sample.ground_truth]) is None:
            sequence += new
    return spool(_rows(sequences), columns, scratch, ("user_id", "item_id"))


def _sample(path: Path, number: int, entry: Any) -> Sample:
    expected = {"user_id": (str, int), "history": list, "candidate": list, "ground_truth": (str, int)}
    for key, kind in expected.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise DataError(f"{path}: entry {number}: '{key}' is missing or of the wrong type")
    return Sample(
        user_id=str(entry["user_id"]),
        history=tuple(map(str, entry["history"])),
        candidates=tuple(map(str, entry["candidate"])),
        ground_truth=str(entry["ground_truth"]),
    )


def append(known: list[str], new: list[str]) -> int | None:
    """Appends what goes beyond the longest overlap of the end of one sequence with the start of the other.

    Returns:
      Where the new sequence starts in the known one; None where nothing overlaps, and then nothing is appended.
    """
    for size in range(min(len(known), len(new)), 0, -1):
        if known[-size:] == new[:size]:
            known += new[size:]
            return len(known) - len(new)
    if not known:
        known += new
        return 0
    return None


def _rows(sequences: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    for user_id, sequence in sequences.items():
        for item_id in sequence:
            yield user_id, item_id
