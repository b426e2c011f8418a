"""Records of finished stages, and whether what they speak of is still what it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nqf import files

RECORD = "stage.json"
PARTS = "parts.json"
"""Name of the record of a folder of parts: what they are of."""


class StageError(RuntimeError):
    """A stage that cannot run; the message says what is missing or stale and which command fixes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished stage.

    Attributes:
      fingerprint: SHA-256 over inputs, configuration and code format.
      result: What the stage reports: best step, metrics, shapes, wall time.
    """

    fingerprint: str
    result: dict[str, Any]


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_artifact(run: Path, stage: str) -> Artifact | None:
    """The finished stage of a name, or None if it has not been finished."""
    tree = read_record(run / stage)
    return None if tree is None else Artifact(fingerprint=tree["fingerprint"], result=tree["result"])


def read_record(folder: Path) -> dict[str, Any] | None:
    """The whole record in a finished stage's folder, or None if there is none.

    Raises:
      StageError: It is not readable, or was altered.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    advice = f"delete {path} and run stage '{folder.name}' again"
    try:
        tree = files.read_json(path)
    except ValueError as error:
        raise StageError(f"{error}; {advice}") from error
    kinds = {"fingerprint": str, "parts": dict, "result": dict}
    if any(not isinstance(tree.get(key), kind) for key, kind in kinds.items()):
        raise StageError(f"{path}: not the record of a finished stage; {advice}")
    # Records of before checksums have none; their fingerprint covers the parts alone.
    rest = {key: value for key, value in tree.items() if key != "sha256"}
    if tree["fingerprint"] != fingerprint(tree["parts"]) or tree.get("sha256", fingerprint(rest)) != fingerprint(rest):
        raise StageError(f"{path}: altered, its own checksum differs; {advice}")
    return tree


def check_files(run: Path, stage: str) -> None:
    """Compares what a finished stage wrote with what its record says; a file is read once per version of it.

    Raises:
      StageError: A file is missing or was altered.
    """
    if name := altered_file(run, read_record(run / stage) or {}):
        raise StageError(
            f"{run / name}: missing or altered since stage '{stage}' finished; delete {run / stage / RECORD} "
            f"and run python -m nqf.train --run {run} --stage all"
        )


def altered_file(run: Path, record: dict[str, Any]) -> str | None:
    """The first file of a run that is not what a stage's record says; None if all are."""
    for name, digest in (record.get("files") or {}).items():
        if not (run / name).is_file() or files.sha256(run / name) != digest:
            return name
    return None


def check_parts(folder: Path, record: dict[str, Any]) -> None:
    """Makes a folder that processes share to make parts in, or checks that it is one of the same parts.

    Args:
      folder: The folder; parts.json in it says what the parts are of.
      record: What they are of, as JSON gives it back.

    Raises:
      StageError: The folder holds something else, or parts of something else.
    """
    with files.locked(folder, wait=True):
        # The lock itself is in the folder.
        if (folder / PARTS).exists():
            if (found := files.read_json(folder / PARTS)) != record:
                different = [name for name, value in record.items() if found.get(name) != value]
                raise StageError(f"{folder}: holds parts of another {' and '.join(different)}; name a new folder")
        elif names := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock")):
            raise StageError(f"{folder}: holds what is none of its parts, such as {names[0]!r}; name a new folder")
        else:
            files.write_json(folder / PARTS, record)


def run_version(run: Path, stages: Iterable[str]) -> str:
    """What a run's configuration, the records of some stages and its changed items are now, SHA-256."""
    digest = hashlib.sha256()
    for path in (run / "config.yaml", *(run / name / RECORD for name in stages), run / "items" / "items.json"):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()
