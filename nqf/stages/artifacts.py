"""Stage folders: fingerprints of what made them, and whether they are missing, stale or fresh."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from nqf.config import Config, to_tree

CODE_FORMAT = 4
"""Version of what the stages write; raise it when an old artefact must not be reused."""

STARTED = "started.json"
STAGES = ("fields", "item", "tokens", "user", "joint")

_CONFIG_OF = {
    "fields": ("data", "fields"),
    "item": ("seed", "item"),
    "tokens": ("candidates.text_width",),
    "user": ("seed", "candidates", "user", "joint.prompt.history_items"),
    "joint": ("seed", "joint"),
}
_MODELS_OF = {"fields": ("fields.text_encoder", "fields.image_encoder"), "joint": ("joint.backbone.path",)}
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
    """SHA-256 of the source files' contents; that of nothing for the synthetic catalogue."""
    digest = hashlib.sha256()
    for name in (config.data.items, config.data.interactions, config.data.schema):
        # A missing file is reported by the reader, with advice.
        if name is not None and Path(name).is_file():
            digest.update(_file_digest(Path(name)))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    # Every stage asks for those of the stages before.
    status = path.stat()
    return _read_digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _read_digest(path: Path, size: int, changed: int) -> bytes:
    # Size and time are there to make the cached digest of a changed file another one.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def model_digest(name: str) -> str | None:
    """Of a local model folder: SHA-256 over names, sizes and first bytes of its files; None for anything else.

    The first mebibyte holds a weight file's index and the start of its tensors; reading gigabytes at every start
    would cost more than it tells.
    """
    folder = Path(name)
    if not name or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for suffix in ("json", "safetensors", "txt") for path in folder.glob(f"*.{suffix}")):
        with path.open("rb") as file:
            digest.update(f"{path.name}|{path.stat().st_size}|".encode() + file.read(2**20))
    return digest.hexdigest()


def parts_of(config: Config, stage: str, run: Path) -> dict[str, Any]:
    """What a stage depends on: its configuration, its inputs' fingerprints, the data and the code format."""
    parts: dict[str, Any] = {"code_format": CODE_FORMAT, "stage": stage}
    for key in _CONFIG_OF[stage]:
        parts[key] = to_tree(_value(config, key))
    for name in _INPUTS_OF[stage]:
        artifact = read_artifact(run, name)
        parts[f"input {name}"] = artifact.fingerprint if artifact else None
    if stage == "fields":
        parts["data files"] = source_digest(config)
    for model in _MODELS_OF.get(stage, ()):
        digest = model_digest(_value(config, model))
        if digest is not None:
            parts[f"files of {model}"] = digest
    return parts


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_artifact(run: Path, stage: str) -> Artifact | None:
    """The finished stage, or None if it has not been finished."""
    tree = _read_stage(run, stage)
    return None if tree is None else Artifact(fingerprint=tree["fingerprint"], result=tree["result"])


def _read_stage(run: Path, stage: str) -> dict[str, Any] | None:
    path = run / stage / "stage.json"
    if not path.is_file():
        return None
    advice = f"delete {path} and run stage '{stage}' again"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path}: not readable as JSON ({error}); {advice}") from error
    kinds = {"fingerprint": str, "parts": dict, "result": dict}
    if not isinstance(tree, dict) or any(not isinstance(tree.get(key), kind) for key, kind in kinds.items()):
        raise StageError(f"{path}: not the record of a finished stage; {advice}")
    # Records of before checksums have none; their fingerprint covers the parts alone.
    rest = {key: value for key, value in tree.items() if key != "sha256"}
    if tree["fingerprint"] != fingerprint(tree["parts"]) or tree.get("sha256", fingerprint(rest)) != fingerprint(rest):
        raise StageError(f"{path}: altered, its own checksum differs; {advice}")
    return tree


def write_artifact(run: Path, stage: str, parts: dict[str, Any], result: dict[str, Any]) -> None:
    """Marks a stage as finished. The file is the last thing that a stage writes, and appears whole or not at all."""
    tree = {"fingerprint": fingerprint(parts), "parts": parts, "result": result, "files": _digests(run, stage)}
    # As it reads in the file, where all keys are strings.
    tree = json.loads(json.dumps(tree))
    write_json(run / stage / "stage.json", tree | {"sha256": fingerprint(tree)})


def _digests(run: Path, stage: str) -> dict[str, str]:
    """SHA-256 of the files that later commands read of a stage and that have no checksums of their own."""
    patterns = {"fields": "data/*.*", "tokens": "tokens/*.np?", "joint": "joint/t*/*.*"}
    paths = sorted(run.glob(patterns[stage])) if stage in patterns else []
    return {str(path.relative_to(run)): _file_digest(path).hex() for path in paths if path.is_file()}


def check_files(run: Path, stage: str) -> None:
    """Compares what a finished stage wrote with what its record says.

    Raises:
      StageError: A file is missing or was altered.
    """
    for name, digest in ((_read_stage(run, stage) or {}).get("files") or {}).items():
        if not (run / name).is_file() or _file_digest(run / name).hex() != digest:
            raise StageError(
                f"{run / name}: missing or altered since stage '{stage}' finished; delete {run / stage / 'stage.json'} "
                f"and run python -m nqf.train --run {run} --stage all"
            )


def started(parts: dict[str, Any]) -> dict[str, Any]:
    """What a stage that is cut off must find again to go on: its parts, and the library that orders its data."""
    return {**parts, "data order": f"grain {importlib.metadata.version('grain')}"}


def cut_off(run: Path, stage: str) -> dict[str, Any] | None:
    """What `started` was of a stage that began and has not finished; None if there is no such record."""
    path = run / stage / STARTED
    if (run / stage / "stage.json").exists() or not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _comparable(tree, stage) if isinstance(tree, dict) else None


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON atomically, also if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(tree, indent=2))


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically, also if the power fails; a link in its place is replaced, not followed."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def status(config: Config, stage: str, run: Path) -> str:
    """Empty if the stage is finished and fresh; else the reason why it has to run."""
    stored = _read_stage(run, stage)
    if stored is None:
        return "it has not been run"
    reasons = differences(_comparable(stored["parts"], stage), parts_of(config, stage, run))
    return "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")


def made_from(run: Path, stage: str, parts: dict[str, Any]) -> bool:
    """Whether a stage is finished and was made from these parts."""
    stored = _read_stage(run, stage)
    return stored is not None and not differences(_comparable(stored["parts"], stage), parts)


def _comparable(stored: dict[str, Any], stage: str) -> dict[str, Any]:
    # The number of workers was once a part; it changes nothing.
    stored = {key: value for key, value in stored.items() if key != "workers"}
    return _with_defaults(stored, {key: to_tree(_value(Config(), key)) for key in _CONFIG_OF[stage]})


def _with_defaults(stored: Any, defaults: Any) -> Any:
    """Stored settings with the keys that the configuration has got since then, at their defaults.

    A default is what the code did before there was the key; where it is not, `CODE_FORMAT` has to be raised.
    """
    if not isinstance(stored, dict) or not isinstance(defaults, dict):
        return stored
    return defaults | {key: _with_defaults(value, defaults.get(key)) for key, value in stored.items()}


def differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain values, as readable lines."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        lines = []
        for key in sorted(stored.keys() | wanted.keys()):
            lines += differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        return lines
    if stored == wanted:
        return []
    if path.startswith(("input ", "files of ")) or path == "data files":
        return [f"{path} changed"]
    return [f"{path} was {stored!r} and is {wanted!r}"]
