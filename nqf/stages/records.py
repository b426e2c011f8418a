"""Records of finished stages, and whether what they speak of is still what it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from nqf import files

RECORD = "stage.json"


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
    for name, digest in ((read_record(run / stage) or {}).get("files") or {}).items():
        if not (run / name).is_file() or files.sha256(run / name) != digest:
            raise StageError(
                f"{run / name}: missing or altered since stage '{stage}' finished; delete {run / stage / RECORD} "
                f"and run python -m nqf.train --run {run} --stage all"
            )
