"""Stage folders: fingerprints of what made them, and whether they are missing, stale or fresh."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nqf.config import Config, to_tree

CODE_FORMAT = 1
"""Version of what the stages write; raise it when an old artefact must not be reused."""

STAGES = ("fields", "item", "tokens", "user", "joint")

_CONFIG_OF = {
    "fields": ("data", "fields"),
    "item": ("seed", "item"),
    "tokens": (),
    "user": ("seed", "candidates", "user", "joint.prompt.history_items"),
    "joint": ("seed", "joint"),
}
_INPUTS_OF = {"fields": (), "item": ("fields",), "tokens": ("item",), "user": ("tokens",), "joint": ("user",)}


class StageError(RuntimeError):
    """A stage that cannot run; the message says what is missing or stale and which command mends it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished stage.

    Attributes:
      fingerprint: SHA-256 over inputs, configuration and code format.
      result: What the stage reports: best step, metrics, shapes, wall time.
    """

    fingerprint: str
    result: dict[str, Any]


def source_digest(config: Config) -> str:
    """SHA-256 of the source files' contents; empty for the synthetic catalogue."""
    digest = hashlib.sha256()
    for name in (config.data.items, config.data.interactions, config.data.schema):
        if name is None or not Path(name).is_file():
            # A missing file is reported by the reader, with advice.
            continue
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def parts_of(config: Config, stage: str, run: Path) -> dict[str, Any]:
    """What a stage depends on: its configuration, its inputs' fingerprints, the data and the code format."""
    parts: dict[str, Any] = {"code_format": CODE_FORMAT, "stage": stage}
    for key in _CONFIG_OF[stage]:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        parts[key] = to_tree(value)
    for name in _INPUTS_OF[stage]:
        artifact = read_artifact(run, name)
        parts[f"input {name}"] = artifact.fingerprint if artifact else None
    if stage == "fields":
        parts["data files"] = source_digest(config)
    if stage in ("item", "user", "joint"):
        # The number of workers is part of the data order's checkpoint.
        parts["workers"] = config.training.workers
    return parts


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_artifact(run: Path, stage: str) -> Artifact | None:
    """The finished stage, or None if it has not been finished."""
    path = run / stage / "stage.json"
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Artifact(fingerprint=tree["fingerprint"], result=tree["result"])
    except (json.JSONDecodeError, KeyError) as error:
        raise StageError(
            f"{path}: not readable ({error!r}); delete {path.parent} and run stage '{stage}' again"
        ) from error


def write_artifact(run: Path, stage: str, parts: dict[str, Any], result: dict[str, Any]) -> None:
    """Marks a stage as finished. The file is the last thing that a stage writes, and appears whole or not at all."""
    write_json(run / stage / "stage.json", {"fingerprint": fingerprint(parts), "parts": parts, "result": result})


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(tree, indent=2), encoding="utf-8")
    os.replace(temporary, path)


def status(config: Config, stage: str, run: Path) -> str:
    """Empty if the stage is finished and fresh; else the reason why it has to run."""
    path = run / stage / "stage.json"
    if read_artifact(run, stage) is None:
        return "it has not been run"
    stored = json.loads(path.read_text(encoding="utf-8"))["parts"]
    reasons = differences(stored, parts_of(config, stage, run))
    return "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")


def differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain values, as readable lines."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted(stored.keys() | wanted.keys()):
            lines += differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        return lines
    if stored == wanted:
        return []
    if path.startswith("input ") or path == "data files":
        return [f"{path} changed"]
    return [f"{path} was {stored!r} and is {wanted!r}"]
