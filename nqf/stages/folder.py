"""Whose a run folder is: it is marked, what nqf makes in it is recorded, and nothing else is replaced or deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from nqf import __version__, files
from nqf.stages.records import StageError

MARK = ".nqf.json"
"""The mark of a run folder: which nqf made it, and the names in it that are nqf's."""
PREVIOUS = "previous"
"""Where a finished stage waits while another version of it is made."""
# What is in a folder from the first moment, whoever comes first.
_LOCKS = (".lock", ".lock-owner")


def check_run_folder(folder: Path) -> None:
    """Refuses a folder that is neither empty nor a run folder.

    Raises:
      StageError: It holds something that nqf did not make.
    """
    if folder.exists() and not folder.is_dir():
        raise StageError(f"{folder}: a file, not a run folder; name another with --run")
    if not folder.is_dir() or (folder / MARK).is_file() or _made_before_marks(folder):
        return
    # A kill while the mark was written leaves a part of it.
    names = sorted(name for name in os.listdir(folder) if not name.endswith(files.PARTIAL))
    strange = [name for name in names if name not in _LOCKS]
    if strange:
        raise StageError(
            f"{folder}: not a run folder and not empty (it holds {', '.join(strange[:3])}"
            f"{', …' if len(strange) > 3 else ''}); nothing was changed. Name a new folder with --run"
        )


def mark_run_folder(folder: Path) -> None:
    """Makes and marks a run folder; one of before marks gets a mark with all that it holds."""
    if (folder / MARK).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(set(os.listdir(folder)) - set(_LOCKS)) if _made_before_marks(folder) else []
    files.write_json(folder / MARK, {"made by": f"nqf {__version__}", "names": old})


def _made_before_marks(folder: Path) -> bool:
    """Whether this is a run folder of before version 0.2: a configuration and a record that only a stage writes."""
    records = [folder / name / record for name in ("fields", "item") for record in ("stage.json", "started.json")]
    if not (folder / "config.yaml").is_file():
        return False
    for path in records:
        try:
            tree = files.read_json(path)
            if "code_format" in tree or "code_format" in tree["parts"]:
                return True
        except (ValueError, TypeError, KeyError):
            continue
    return False


def owned(folder: Path) -> list[str]:
    """The names in a run folder that are nqf's."""
    try:
        return list(files.read_json(folder / MARK)["names"])
    except (ValueError, TypeError, KeyError):
        return []


def claim(folder: Path, *names: str) -> None:
    """Records that some names in a run folder are nqf's from now on, before anything is written under them.

    Raises:
      StageError: Something is there that nqf did not make, or a link, which would lead out of the folder.
    """
    check_run_folder(folder)
    mark_run_folder(folder)
    known = owned(folder)
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise StageError(f"{path}: a link, which nqf does not write through; put a folder in its place")
        if name not in known and path.exists():
            raise StageError(f"{path}: not made by nqf; move it away, or use another run folder. Nothing was changed")
    if new := [name for name in names if name not in known]:
        tree = files.read_json(folder / MARK)
        files.write_json(folder / MARK, tree | {"names": [*known, *new]})


def set_aside(run: Path, name: str, writes: Sequence[str]) -> None:
    """Moves a finished stage's folder to `previous/`, in place of an older version."""
    claim(run, PREVIOUS)
    target = run / PREVIOUS / name
    remove_stage(target, writes)
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        # Somebody put files of their own beside an older version.
        raise StageError(f"{target}: holds files that nqf did not make; move them away")
    files.publish(run / name, target)


def copy(source: Path, target: Path) -> None:
    """Copies a folder in place of another, whole or not at all."""
    parts = files.partial(target)
    shutil.rmtree(parts, ignore_errors=True)
    shutil.copytree(source, parts)
    if target.exists():
        shutil.rmtree(target)
    files.publish(parts, target)


def bring_back(run: Path, name: str, usable: Callable[[Path], bool]) -> bool:
    """Exchanges a stage's folder with its previous version, if that is usable; returns whether it was."""
    current, previous, between = run / name, run / PREVIOUS / name, run / PREVIOUS / f"{name}.other"
    if between.is_dir() and not previous.exists():
        # A kill came between two of the moves below.
        files.publish(between, previous)
    if not previous.is_dir() or previous.is_symlink() or current.is_symlink() or not usable(previous):
        return False
    if current.exists():
        files.publish(current, between)
    files.publish(previous, current)
    if between.exists():
        files.publish(between, previous)
    return True


def remove_stage(folder: Path, writes: Sequence[str]) -> None:
    """Deletes what a stage wrote in its folder, records first, and the folder if nothing else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    # In this order, so that a kill in between leaves neither what looks finished nor what could be resumed from.
    for pattern in ("started.json", "stage.json", *writes, f".*{files.PARTIAL}"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
        if folder.parent.name == PREVIOUS and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
