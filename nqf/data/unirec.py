"""JSON files of the reference system as tables: the item and review dictionaries and the train and test samples.

Formats: REFERENCE system UniRec (github.com/ulab-uiuc/UniRec), `All_Beauty_item_dict.json`,
`All_Beauty_item_triplet_dict.json`, `All_Beauty_review_dict.json` and `*_{train,test}_LRanker.json`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf.data.amazon import flatten, review_text
from nqf.data.errors import DataError
from nqf.data.interactions import Interactions
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


def test_file(path: Path) -> Path:
    """The test samples beside training samples; the same path where there are none."""
    test = path.with_name(test_name(path.name))
    return test if test.is_file() else path


def test_name(name: str) -> str:
    """The name of the test samples that belong to a name of training samples; any other name as it is."""
    return name.replace("_train", "_test")


def read_interactions(
    path: Path,
    scratch: Path,
    columns: Columns,
    *,
    inter: pl.LazyFrame | None = None,
    reviews: Path | None = None,
    notes: list[str] | None = None,
) -> pl.LazyFrame:
    """Puts the sequences of a train file, and of the test file beside it, together again.

    The samples of a user overlap: each is appended to what is known of the user without the part that is there
    already. The samples themselves have no times; the order is theirs.

    Args:
      path: A sample file. If `_train` is in its name and there is a file with `_test` instead, both are read.
      scratch: As in `read_items`.
      columns: user_id, item_id, timestamp, rating and review.
      inter: The same columns of every interaction, of which ratings and times are taken. The samples' sequence of a
        user is a part of the user's interactions in the order of time: the part that has most of its items.
      reviews: A review dictionary, `{"user|item": review}`; it also gives the ratings and times that `inter` lacks.
      notes: What was not found is told here.

    Raises:
      DataError: Not such a file.
    """
    samples = read_samples(path)
    if (test := test_file(path)) != path:
        samples += read_samples(test)
    sequences: dict[str, list[str]] = {}
    for sample in samples:
        sequence = sequences.setdefault(sample.user_id, [])
        if append(sequence, new := [*sample.history, sample.ground_truth]) is None:
            sequence += new
    told = _told(inter, sequences) if inter is not None else {}
    dictionary = read_json(reviews, dict) if reviews is not None else {}
    rows, unknown = [], Counter()
    for user_id, sequence in sequences.items():
        events, newest = _aligned(sequence, told.get(user_id, [])), {item: at for at, item in enumerate(sequence)}
        of_user: list[list[Any]] = []
        for at, (item_id, (time, rating)) in enumerate(zip(sequence, events, strict=True)):
            review = dictionary.get(key := f"{user_id}|{item_id}", {})
            if not isinstance(review, dict):
                raise DataError(f"{reviews}: '{key}': expected an object, found {type(review).__name__}")
            unknown["inter"] += inter is not None and time is None
            unknown["reviews"] += reviews is not None and not review
            # The dictionary holds the last review of an item alone.
            review = review if newest[item_id] == at else {}
            time = review.get("timestamp") if time is None else time
            rating = review.get("rating") if rating is None else rating
            of_user.append([user_id, item_id, time, rating, review_text(review)])
        _drop_later(of_user)
        rows += of_user
    for key, count in unknown.items():
        if count and notes is not None:
            notes.append(f"{path}: {count} of {len(rows)} interactions of the samples are not in data.{key}")
    return spool(rows, columns, scratch, ("user_id", "item_id", "timestamp", "rating", "review"))


def _drop_later(events: list[list[Any]]) -> None:
    """Makes times unknown that are after the time of a later event: the review was of another purchase."""
    upper = float("inf")
    for event in reversed(events):
        time = pl.Series([event[2]], dtype=pl.String, strict=False).cast(pl.Float64, strict=False)[0]
        if time is not None and time > upper:
            event[2] = None
        upper = upper if time is None else min(upper, time)


def _told(inter: pl.LazyFrame, users: Mapping[str, Any]) -> dict[str, list[tuple[str, Any, Any]]]:
    """(item, time, rating) of some users' interactions, in the order of time and then of the file."""
    kept = inter.filter(pl.col("user_id").is_in(list(users))).collect()
    ordered = kept.sort(pl.col("timestamp").cast(pl.Float64, strict=False), maintain_order=True)
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for user_id, *event in ordered.select("user_id", "item_id", "timestamp", "rating").iter_rows():
        found.setdefault(user_id, []).append((event[0], event[1], event[2]))
    return found


def _aligned(sequence: Sequence[str], told: Sequence[tuple[str, Any, Any]]) -> list[tuple[Any, Any]]:
    """Time and rating of each item of a sequence; None where they are not known.

    Interactions of one time may stand in another order in the sequence than in the file, so the items count first, and
    their places where several parts have the same items.
    """
    size, wanted = len(sequence), Counter(sequence)

    def likeness(start: int) -> tuple[int, int]:
        part = [item for item, *_ in told[start : start + size]]
        return (Counter(part) & wanted).total(), sum(map(str.__eq__, part, sequence))

    start = max(range(max(1, len(told) - size + 1)), key=likeness)
    left: dict[str, list[tuple[Any, Any]]] = {}
    for item, *rest in told[start : start + size]:
        left.setdefault(item, []).append((rest[0], rest[1]))
    return [left[item].pop(0) if left.get(item) else (None, None) for item in sequence]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Samples among the interactions; those that are not there are left out.

    Attributes:
      starts: int64 [samples], the event that a sample's history begins with.
      targets: int64 [samples], the event of its ground truth.
      given: int32 [samples, C], rows of the other candidates in the order of the file, -1 in padding.
      missing: How many were left out.
    """

    starts: np.ndarray
    targets: np.ndarray
    given: np.ndarray
    missing: int


def find_samples(path: Path, interactions: Interactions, rows: Mapping[str, int]) -> Found:
    """Where the samples of a file are among the interactions.

    Args:
      path: The sample file.
      interactions: Made of this file, and perhaps of others.
      rows: Row of every item by its id.
    """
    samples, spans, given = read_samples(path), [], []
    for sample in samples:
        wanted = [rows[item] for item in sample.history if item in rows]
        user, target = interactions.find(sample.user_id), rows.get(sample.ground_truth)
        if user is None or target is None:
            continue
        wanted.append(target)
        first, last = interactions.offsets[user], interactions.offsets[user + 1]
        events = interactions.items[first:last].tolist()
        # The newest place, should the same items stand there twice.
        at = next(
            (at for at in range(len(events) - len(wanted), -1, -1) if events[at : at + len(wanted)] == wanted), None
        )
        if at is not None:
            spans.append((first + at, first + at + len(wanted) - 1))
            given.append([rows[item] for item in sample.candidates if item in rows and rows[item] != target])
    most = max(map(len, given), default=0)
    starts, targets = np.array(spans, np.int64).reshape(-1, 2).T
    padded = np.array([[*row, *[-1] * (most - len(row))] for row in given], np.int32).reshape(len(given), most)
    return Found(starts=starts, targets=targets, given=padded, missing=len(samples) - len(spans))


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
