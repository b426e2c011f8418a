"""Recommendations for every user as parts of a folder, which any number of processes make together.

A part is the same to the byte whoever makes it, as the batches in it are. So a process that is ended costs the part it
was at, and where a file system has no locks, two may do the same work and harm nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from nqf import files
from nqf.serving.recommender import Recommender
from nqf.stages.graph import served
from nqf.stages.records import check_parts, run_version

USERS = 8_192
"""Users of a part: a multiple of the largest batch."""


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
        "run": run_version(recommender.folder, [one.name for one in served(stage, recommender.folder)]),
        "stage": stage,
        "k": k,
        "users": len(users),
        "users_of_a_part": USERS,
    }
    parts = [folder / f"part-{number:05d}.parquet" for number in range(-(-len(users) // USERS))]
    check_parts(folder, record)
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
