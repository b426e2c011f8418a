"""Records of finished stages: fingerprints of what made them, digests of what they wrote, and whether both hold."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import polars as pl

from nqf import __version__, files
from nqf.config import DATA_PATHS, Config, to_tree
from nqf.data import addresses
from nqf.data.errors import DataError
from nqf.data.parquet import checked
from nqf.data.recbole import benchmark_files
from nqf.data.schema import load_schema
from nqf.data.unirec import test_file
from nqf.stages.records import RECORD, StageError, check_files, fingerprint, read_artifact, read_record
from nqf.stages.stage import Stage
from nqf.training.checkpoint import restore_params

CODE_FORMAT = 4
"""Version of what the stages write; raise it when an old artifact must not be reused."""

STARTED = "started.json"
# Parts that records of before version 0.2 lack.
_LATER = ("pictures", "test samples")
_SOURCES = ("data files", *_LATER)
VERSION = "version of data."
"""Head of the parts that tell the versions of tables at addresses."""
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def source_digest(config: Config) -> str | None:
    """SHA-256 of the local source files' contents; None where all are gone, that of nothing where there are none."""
    data, digest = config.data, hashlib.sha256()
    names = [name for key in DATA_PATHS if (name := getattr(data, key)) and not files.is_address(name)]
    # A missing file is reported by the reader, with advice.
    found = [path for name in names for path in _source_files(name)]
    for path in found:
        digest.update(bytes.fromhex(files.sha256(path)))
    return digest.hexdigest() if found or not names else None


def _source_files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in benchmark_files(path) if file.is_file()]


def _test_samples(config: Config) -> str | None:
    """SHA-256 of UniRec's test samples, which the reader takes from beside the training samples."""
    name = config.data.interactions
    if config.data.format != "unirec" or not name or files.is_address(name):
        return None
    train = Path(name)
    test = test_file(train)
    return None if test == train else files.sha256(test)


def pictures_digest(run: Path) -> str | None:
    """SHA-256 over the local pictures that the run's catalogue names; None where it names none.

    A picture that is replaced in place changes it: the field cache knows pictures by their content.

    Raises:
      StageError: The catalogue cannot be read.
    """
    items, schema = run / "data" / "items.parquet", run / "data" / "schema.yaml"
    if not items.is_file() or not schema.is_file():
        return None
    names = [field.name for field in load_schema(schema).fields if field.modality == "image"]
    if not names:
        return None
    try:
        columns = [name for name in names if name in pl.read_parquet_schema(checked(items))]
        table = pl.read_parquet(items, columns=columns, glob=False)
    except (pl.exceptions.PolarsError, DataError, OSError) as error:
        raise StageError(
            f"{items}: damaged ({str(error).strip().splitlines()[0][:200]}); delete it and {run / 'fields' / RECORD}, "
            f"and run python -m nqf.train --run {run} --stage all"
        ) from error
    digest, found = hashlib.sha256(), False
    for path in table.unpivot()["value"].drop_nulls().unique().sort() if columns else []:
        if not path.startswith(("http://", "https://")) and Path(path).is_file():
            digest.update(f"{path}|{files.sha256(path)}|".encode())
            found = True
    return digest.hexdigest() if found else None


def model_digest(name: str) -> str | None:
    """SHA-256 over the names and contents of a local model folder's files; None for anything else."""
    folder = Path(name)
    if not name or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(
        path for suffix in ("json", "safetensors", "txt", "bin") for path in folder.rglob(f"*.{suffix}")
    ):
        digest.update(f"{path.relative_to(folder)}|{files.sha256(path)}|".encode())
    return digest.hexdigest()


def parts_of(config: Config, stage: Stage, run: Path, *, ask: bool = True) -> dict[str, Any]:
    """What a stage depends on: its configuration, its inputs' fingerprints, the data and the code format.

    Args:
      config: The configuration.
      stage: The stage.
      run: Run folder.
      ask: Whether addresses are asked for the versions of their tables; without, these are left out.
    """
    parts: dict[str, Any] = {"code_format": CODE_FORMAT, "stage": stage.name}
    for key in stage.reads:
        parts[key] = to_tree(_value(config, key))
    for name in stage.after:
        artifact = read_artifact(run, name)
        parts[f"input {name}"] = artifact.fingerprint if artifact else None
    if not stage.after:
        sources = {
            "data files": source_digest(config),
            "pictures": pictures_digest(run),
            "test samples": _test_samples(config),
        }
        parts |= {key: found for key, found in sources.items() if found is not None}
        parts |= {VERSION + key: found for key, found in addresses.versions(config.data).items()} if ask else {}
    for key in stage.model_folders:
        digest = model_digest(_value(config, key))
        if digest is not None:
            parts[f"weights of {key}"] = digest
    return parts


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def write_artifact(run: Path, stage: Stage, parts: dict[str, Any], result: dict[str, Any]) -> None:
    """Marks a stage as finished. The file is the last thing that a stage writes, and appears whole or not at all."""
    tree = {"fingerprint": fingerprint(parts), "parts": parts, "result": result, "versions": versions()}
    # As it reads in the file, where all keys are strings.
    tree = json.loads(json.dumps(tree | {"files": _digests(run, stage, result)}))
    files.write_json(run / stage.name / RECORD, tree | {"sha256": fingerprint(tree)})


def versions() -> dict[str, str]:
    """Versions of nqf, Python and the libraries that can change a number."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"nqf": __version__, "python": platform.python_version(), **found}


def _digests(run: Path, stage: Stage, result: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that later commands read of a stage."""
    patterns = [pattern.replace("BEST", str(result.get("best_step"))) for pattern in stage.checked]
    paths = sorted({path for pattern in patterns for path in run.glob(pattern) if path.is_file()})
    return {str(path.relative_to(run)): files.sha256(path) for path in paths}


def restore_best(run: Path, stage: str, init: Callable[[], Any], *, zero: Collection[str] = ()) -> Any:
    """The best parameters of a finished training stage, after its files have been checked.

    Args:
      run: Run folder.
      stage: Name of the stage.
      init: Makes parameters of the same shapes; only traced.
      zero: As in `restore_params`.

    Raises:
      StageError: The stage is not finished, or a file of it was altered.
      CheckpointError: The checkpoint does not fit the shapes.
    """
    import jax

    check_files(run, stage)
    artifact = read_artifact(run, stage)
    if artifact is None:
        raise StageError(f"{run / stage}: this stage has not been run; run python -m nqf.train --run {run} --stage all")
    return restore_params(run / stage / "checkpoints", artifact.result["best_step"], jax.eval_shape(init), zero=zero)


def started(parts: dict[str, Any]) -> dict[str, Any]:
    """What a stage that is cut off must find again to resume: its parts, and the library that orders its data."""
    return {**parts, "data order": f"grain {importlib.metadata.version('grain')}"}


def cut_off(folder: Path) -> dict[str, Any] | None:
    """What was written when the stage in a folder began, if it has not finished; None if there is no such record."""
    path = folder / STARTED
    if (folder / RECORD).exists() or not path.is_file():
        return None
    try:
        return files.read_json(path)
    except ValueError:
        return None


def status(config: Config, stage: Stage, run: Path, *, ask: bool = True) -> str:
    """Empty if the stage is finished and fresh; else the reason why it has to run. `ask` is that of `parts_of`."""
    reasons = stale(read_record(run / stage.name), parts_of(config, stage, run, ask=ask), stage)
    return "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")


def stale(record: dict[str, Any] | None, parts: dict[str, Any], stage: Stage) -> list[str]:
    """Why a record does not stand for what these parts would make; empty if it does."""
    if record is None:
        return ["it has not been run"]
    return differences(comparable(record["parts"], stage, parts), parts)


def comparable(stored: dict[str, Any], stage: Stage, wanted: dict[str, Any]) -> dict[str, Any]:
    """Stored parts with what later versions of nqf have added to them.

    Keys of the configuration that did not exist stand at their defaults: a default is what the code did before there
    was the key; where it is not, `CODE_FORMAT` has to be raised.
    """
    # The number of workers was once a part and changes nothing; of model folders, the first bytes of files were.
    stored = {key: value for key, value in stored.items() if key != "workers" and not key.startswith("files of ")}
    # A run is served without the tables, pictures and models that it was made of, also on another machine.
    heads = ("weights of ", VERSION)
    gone = [key for key in stored.keys() - wanted.keys() if key in _SOURCES or key.startswith(heads)]
    stored = {key: value for key, value in stored.items() if key not in gone}
    for key in wanted:
        if key not in stored and (key in _LATER or key.startswith("weights of ")):
            stored[key] = wanted[key]
    stored = _with_defaults(stored, {key: to_tree(_value(Config(), key)) for key in stage.reads})
    # Tables and models that were moved are the same ones where they keep their names, which say how they are read.
    keys = [f"data.{key}" for key in DATA_PATHS] if "data files" in wanted else []
    digests = dict.fromkeys(keys, "data files") | {key: f"weights of {key}" for key in stage.model_folders}
    for key, digest in digests.items():
        was, now = _at(stored, key), _at(wanted, key)
        if was and now and Path(was).name == Path(now).name and stored.get(digest, "") == wanted.get(digest):
            stored = _with_value(stored, key.split("."), now)
    return stored


def _at(tree: Any, key: str) -> Any:
    return functools.reduce(lambda part, name: (part or {}).get(name), key.split("."), tree)


def _with_value(tree: dict[str, Any], names: list[str], value: Any) -> dict[str, Any]:
    return tree | {names[0]: value if len(names) == 1 else _with_value(tree[names[0]], names[1:], value)}


def _with_defaults(stored: Any, defaults: Any) -> Any:
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
    if path.startswith(("input ", "weights of ", VERSION)) or path in _SOURCES:
        return [f"{path} changed"]
    return [f"{path} was {stored!r} and is {wanted!r}"]
