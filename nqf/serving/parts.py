"""Recommendations for every user as parts of a folder, which any number of processes make together.

A part is the same to the byte whoever makes it, as the batches in it are. So a process that is ended costs the part it
was at, and where a file system has no locks, two may do the same work and harm nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from nqf import files
from nqf.serving.recommender import Recommender
from nqf.stages.graph import served
from nqf.stages.records import StageError

USERS = 8_192
"""Users of a part: a multiple of the largest batch."""
_RECORD = "parts.json"


def recommend_parts(recommender: Recommender, folder: Path, *, k: int) -> Iterator[str]:
    """Makes those parts `part-00000.parquet`, ... that are not there and that no other process is at.

    Args:
      recommender: What recommends.
      folder: The folder, which is made if missing; parts.json in it says what the parts are of.
      k: Items of each user.

    Yields:
      What was done, in words.

    Raises:
      StageError: The folder holds something else, or parts of another run, of what the run was before, or of another k.
    """
    users, stage = recommender.user_ids, recommender.stage
    record = {
        "run": _version(recommender.folder, stage),
        "stage": stage,
        "k": k,
        "users": len(users),
        "users_of_a_part": USERS,
    }
    parts = [folder / f"part-{number:05d}.parquet" for number in range(-(-len(users) // USERS))]
    with files.locked(folder, wait=True):
        # The lock itself is in the folder.
        if (folder / _RECORD).exists():
            if (found := files.read_json(folder / _RECORD)) != record:
                different = [name for name, value in record.items() if found.get(name) != value]
                raise StageError(f"{folder}: holds parts of another {' and '.join(different)}; name a new folder")
        elif names := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock")):
            raise StageError(f"{folder}: holds what is none of its parts, such as {names[0]!r}; name a new folder")
        else:
            files.write_json(folder / _RECORD, record)
    for number, part in enumerate(parts):
        with files.claimed(part) as mine:
            if mine and not part.exists():
                frames = recommender.recommend_all(k=k, users=users[number * USERS : (number + 1) * USERS])
                with files.whole(part) as file:
                    pl.concat(frames).write_parquet(file)
                yield f"wrote {part}"
    left = [part.name for part in parts if not part.exists()]
    yield (
        f"{len(left)} of {len(parts)} parts are with other processes; where one of them was ended, run the same again"
        if left
        else f"{folder}: all {len(parts)} parts are there"
    )


def _version(run: Path, stage: str) -> str:
    """What the run's configuration, records and changed items are now, SHA-256."""
    records = [run / one.name / "stage.json" for one in served(stage, run)]
    digest = hashlib.sha256()
    for path in (run / "config.yaml", *records, run / "items" / "items.json"):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()
