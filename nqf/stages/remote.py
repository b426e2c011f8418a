"""Run folders at addresses (`gs://`, `s3://`, ...): a command works on a copy here, and what it makes is taken there.

At its address a run lies as in a local folder, beside a list of its files with their digests (`LIST`). What is new is
put beside the run first (`STAGED`); then the list is replaced, by which all of it belongs to the run at one moment; and
then it is copied to its names, and what is no more is deleted. Whoever reads finds the run as it was or as it is, and
an upload that breaks off at any point leaves one of both. Of two writers, the second finds another list than the one
that it began with, and changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nqf import __version__, files
from nqf.data import addresses
from nqf.data.errors import DataError
from nqf.stages.folder import MARK
from nqf.stages.records import RECORD, StageError

LIST = ".nqf-files.json"
"""At the address: names, sizes and digests of the run's files."""
STAGED = ".nqf-new"
"""At the address: contents that are on their way to their names, by their digests."""
_LOG = logging.getLogger(__name__)
# Who writes is faster than who reads only so often.
_TRIES = 3
_NOT_OF_THE_RUN = re.compile(rf"(.*/)?(\.lock|\.lock-owner|.*{re.escape(files.PARTIAL)}|{re.escape(LIST)})|{STAGED}/.*")
# What Orbax has not finished.
_UNFINISHED = ".orbax-checkpoint-tmp"

Files = dict[str, dict[str, Any]]
"""Names to `size` and `sha256`, or `version` of what the list does not name; `staged` where only STAGED has it."""


class RunChangedError(DataError):
    """A run at an address is not what it was when its copy was made; nothing was changed there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """A run folder at an address.

    Attributes:
      address: As it was given.
      name: The same without credentials.
      system: Its file system.
      root: Its path there.
      home: Here: the folder of the copy, of what is known of it, and of its locks.
    """

    address: str
    name: str
    system: Any
    root: str
    home: Path

    @property
    def copy(self) -> Path:
        """The run folder that commands work on."""
        return self.home / "copy" / (re.sub(r"[^\w.-]", "-", self.name.rpartition("/")[2]).strip(".") or "run")

    def path(self, name: str, entry: dict[str, Any] | None = None) -> str:
        """Where a file is at the address."""
        return f"{self.root}/{STAGED}/{entry['sha256']}" if entry and entry.get("staged") else f"{self.root}/{name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _There:
    """What is at an address.

    Attributes:
      id: Digest of the list; None without one.
      listed: Files that it names.
      beside: Files that it does not name: somebody's own, or all those of a run that was copied there by hand.
      gone: Names that are no more of the run, and may still have to be deleted.
      staged: Sizes in STAGED.
    """

    id: str | None
    listed: Files
    beside: Files
    gone: list[str]
    staged: dict[str, int]


@contextlib.contextmanager
def local_run(run: str | Path, *, writes: bool = False) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """The local folder of a run: itself, or a copy of what is at an address.

    A copy is kept in the user's cache folder, where the next command brings only what differs. What a command that
    writes made is taken to the address when the block ends, also by an error. While one works, others of this machine
    that only read take its copy as it is.

    Args:
      run: Run folder, or its address, as text.
      writes: Whether the block changes the run; it then holds the copy.

    Yields:
      The folder, and what takes it to the address before the end of the block; None where there is nothing to take.

    Raises:
      DataError: An address that cannot be read or written; names it and says why.
      RunChangedError: Somebody else changed the run meanwhile; says where the copy is, which stays.
      StageError: What is there is no run folder.
      InUseError: Another process of this machine writes to it.
    """
    if not files.is_address(str(run)):
        if files.is_address(str(run).replace(":/", "://", 1)) and not Path(run).exists():
            raise StageError(f"{run}: no such folder; an address is text with two slashes, of which Path makes one")
        yield Path(run), None
        return
    place = _place(str(run))
    with contextlib.ExitStack() as held:
        with files.locked(place.home, wait=True), contextlib.ExitStack() as brief:
            try:
                (held if writes else brief).enter_context(files.locked(place.home / "writer"))
            except files.InUseError as error:
                # Whoever writes has brought it, and nobody else may change its copy.
                if writes:
                    raise files.InUseError(str(error).replace(str(place.home / "writer"), place.name)) from None
            else:
                _bring(place, writes)
        try:
            yield place.copy, functools.partial(_save, place) if writes else None
        except RunChangedError:
            raise
        except Exception as error:
            if writes:
                _save(place, last=True, ends=())
            if len(error.args) == 1 and isinstance(error.args[0], str):
                # Where a message names the copy or says what to do with it, the address is meant.
                error.args = (error.args[0].replace(str(place.copy), place.name),)
            raise
        if writes:
            try:
                _take(place, last=True)
            except DataError as error:
                if isinstance(error, RunChangedError):
                    raise
                left = f"what was made is in {place.copy}, and the next command that writes there takes it along"
                raise DataError(f"{error}; {left}") from None


def _save(place: _Place, *, last: bool = False, ends: type[DataError] | tuple[()] = RunChangedError) -> None:
    """Takes what was made so far to the address; what does not end the command by that is told, as the copy has it."""
    try:
        _take(place, last=last)
    except ends:
        raise
    except DataError as error:
        _LOG.warning("%s; what was made so far is in %s and has not been taken there yet", error, place.copy)


def _place(address: str) -> _Place:
    name = files.masked(address).rstrip("/")
    if re.match(r"https?://", address, re.I):
        raise DataError(f"{name}: a website, which has no folders; copy the run here and give that path")
    with addresses.as_data_error(address):
        system, root = addresses.open_system(address)
    # Not of the credentials: whose they are changes nothing, as what is here is compared with what is there.
    home = files.cache_folder() / "runs" / hashlib.sha256(name.encode()).hexdigest()[:16]
    return _Place(address=address, name=name, system=system, root=root.rstrip("/"), home=home)


def _look(place: _Place) -> _There:
    """What is at the address now.

    Raises:
      DataError: A file, or a list that is none.
    """
    from fsspec.spec import AbstractFileSystem

    place.system.invalidate_cache()
    # What a walk cannot look into it would leave out; stores, which have no folders, list otherwise.
    strict = {"on_error": "raise"} if type(place.system).find is AbstractFileSystem.find else {}
    try:
        found = place.system.find(place.root, detail=True, **strict)
    except FileNotFoundError:
        if place.system.exists(place.root):
            raise
        found = {}
    # Some stores keep an empty object of a folder's own name.
    found = {path.removeprefix(place.root).lstrip("/"): entry for path, entry in found.items() if path[-1:] != "/"}
    if list(found) == [""]:
        raise DataError(f"{place.name}: a file, not a run folder")
    identity, tree = _list(place) if LIST in found else (None, {"files": {}, "gone": []})
    listed, gone = tree["files"], tree["gone"]
    beside = {
        name: {"size": int(entry["size"]), "version": addresses.version_of(entry)}
        for name, entry in found.items()
        if name and name not in listed and name not in gone and not _NOT_OF_THE_RUN.fullmatch(name)
    }
    if strange := [name for name in (*listed, *beside) if {"", "..", "."} & set(name.split("/"))]:
        raise DataError(f"{place.name}: a file is called {strange[0]!r}, which no run folder holds")
    head = f"{STAGED}/"
    staged = {name.removeprefix(head): entry["size"] for name, entry in found.items() if name.startswith(head)}
    return _There(id=identity, listed=listed, beside=beside, gone=gone, staged=staged)


def _list(place: _Place) -> tuple[str, dict[str, Any]]:
    text = place.system.cat_file(place.path(LIST))
    try:
        tree = json.loads(text)
        for entry in tree["files"].values():
            if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or not isinstance(entry["size"], int):
                raise ValueError
        list(map(str.lower, tree["gone"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{place.name}: {LIST} is not a list of files; delete it there to take the folder as it lies"
        ) from None
    return hashlib.sha256(text).hexdigest(), tree


def _check_owner(place: _Place, there: _There) -> None:
    """Refuses what is not empty and no run folder before anything of it is copied here."""
    names = sorted({name.split("/")[0] for name in there.beside})
    # Which `nqf.stages.folder` looks into when it is here.
    before_marks = {f"{stage}/{record}" for stage in ("fields", "item") for record in (RECORD, "started.json")}
    if there.id is None and names and MARK not in names and not before_marks & there.beside.keys():
        raise StageError(
            f"{place.name}: not a run folder and not empty (it holds {', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}); nothing was changed. Name a new folder with --run"
        )


def _bring(place: _Place, writes: bool) -> None:
    """Makes the copy what is at the address, unless it is ahead of it because who worked on it was cut off."""
    state = _read_state(place)
    ahead = state["open"] and place.copy.is_dir()
    for attempt in range(_TRIES):
        with addresses.as_data_error(place.address):
            there = _look(place)
        if ahead and there.id not in state["ids"] and _names(place.copy) == state["files"].keys():
            # Whoever was cut off had taken everything there.
            ahead = any(_entry(place.copy / name) != _plain(entry) for name, entry in state["files"].items())
        if ahead and there.id not in state["ids"]:
            raise RunChangedError(
                f"{place.name}: changed since work on its copy began, which holds what was not taken there; nothing "
                f"was changed. Keep {place.copy} under another name or delete it, then run the command again"
            )
        if ahead:
            return
        _check_owner(place, there)
        problem = _fetch(place, there, state["files"])
        if not problem:
            break
        if attempt == _TRIES - 1:
            raise DataError(
                f"{place.name}: {problem}. Somebody is writing to it, so run the command again, or changed it by hand: "
                f"then delete {LIST} there to take the folder as it lies"
            )
    brought = {name: entry | _entry(place.copy / name) for name, entry in (there.listed | there.beside).items()}
    _write_state(place, {"address": place.name, "ids": [there.id], "open": writes, "files": brought})


def _fetch(place: _Place, there: _There, known: Files) -> str:
    """Brings what the copy lacks, whole or not at all; what was not as it should be, or nothing."""
    wanted = there.listed | there.beside
    lacking = {name: entry for name, entry in wanted.items() if not _is_here(place.copy / name, entry, known.get(name))}
    incoming = place.home / "incoming"
    # What a killed process left.
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=incoming) as folder:
        scratch = Path(folder)
        for name in lacking:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        if lacking:
            size = sum(entry["size"] for entry in lacking.values())
            _LOG.info("%s: %s bytes of %d files are copied here", place.name, f"{size:,}", len(lacking))
        with addresses.as_data_error(place.address), addresses.ONE_AT_A_TIME:
            paths = [place.path(name, entry) for name, entry in lacking.items()]
            try:
                place.system.get(paths, [str(scratch / name) for name in lacking])
            except FileNotFoundError as error:
                return f"a file of it is not there any more ({PurePosixPath(str(error.args[-1])).name})"
            if any("sha256" not in entry for entry in lacking.values()) and _look(place).beside != there.beside:
                return "it changed while it was read"
        for name, entry in lacking.items():
            found = _entry(scratch / name)
            if found["size"] != entry["size"] or entry.get("sha256") not in (None, found["sha256"]):
                return f"{name} has {found['size']:,} of {entry['size']:,} bytes, or others than were written"
        for name in _names(place.copy) - wanted.keys():
            (place.copy / name).unlink()
            _remove_empty(place.copy, name)
        for name in sorted(lacking, key=_last):
            (place.copy / name).parent.mkdir(parents=True, exist_ok=True)
            files.publish(scratch / name, place.copy / name)
    return ""


def _is_here(path: Path, entry: dict[str, Any], known: dict[str, Any] | None) -> bool:
    if not path.is_file():
        return False
    if "sha256" not in entry:
        # By what the file system said when it was brought.
        same = known and entry["version"] and all(known.get(key) == value for key, value in entry.items())
        return bool(same) and known is not None and files.sha256(path) == known["sha256"]
    return files.sha256(path) == entry["sha256"]


def _take(place: _Place, *, last: bool = False) -> None:
    """Makes the address what the copy is; the last time, work on the copy ends with it."""
    with addresses.as_data_error(place.address, "write"):
        state, there = _read_state(place), _look(place)
        _refuse_change(place, there.id in state["ids"])
        known: Files = state["files"] | there.listed
        here = {name: _entry(place.copy / name) for name in _names(place.copy)}
        seen = {name: {"size": entry["size"], "version": entry.get("version")} for name, entry in known.items()}
        strange = {name for name, entry in there.beside.items() if entry != seen.get(name)}
        changed = {name for name, entry in here.items() if known.get(name, {}).get("sha256") != entry["sha256"]}
        _refuse_change(place, not strange & changed and not (there.id is None and strange))
        gone = sorted({*there.gone, *(known.keys() - strange)} - here.keys())
        if changed or gone or any(entry.get("staged") for entry in there.listed.values()):
            _put(place, state, there, changed, gone)
        if last:
            _write_state(place, state | {"open": False})


def _put(place: _Place, state: dict[str, Any], there: _There, changed: set[str], gone: list[str]) -> None:
    """Puts what changed at the address, and makes it part of the run."""
    staged = _stage(place, changed)
    kept = _names(place.copy) - changed
    listed = {name: entry for name, entry in there.listed.items() if name in kept}
    listed |= {name: entry | {"staged": True} for name, entry in staged.items()}
    # With what went meanwhile.
    gone = sorted({*gone, *(there.listed.keys() - listed.keys())})
    again = _look(place)
    _refuse_change(place, again.id == there.id)
    for name, entry in staged.items():
        if (size := again.staged.get(entry["sha256"])) != entry["size"]:
            raise DataError(f"{place.name}: {name} broke off after {size} of {entry['size']:,} bytes")
    taken = {name: entry for name, entry in state["files"].items() if name in kept} | staged
    _write_list(place, state, listed, gone, taken)
    _settle(place, state, listed, gone, again.staged)


def _stage(place: _Place, changed: Collection[str]) -> Files:
    """Puts contents into STAGED; the names with what was put, without those that are no more."""
    done: Files = {}
    names = sorted(changed)
    for _ in range(_TRIES):
        entries = {name: _entry(place.copy / name) for name in names if (place.copy / name).is_file()}
        if entries:
            paths = [place.path(name, entry | {"staged": True}) for name, entry in entries.items()]
            place.system.makedirs(f"{place.root}/{STAGED}", exist_ok=True)
            with addresses.ONE_AT_A_TIME:
                place.system.put([str(place.copy / name) for name in entries], paths)
        done |= entries
        # What training appends to may have grown.
        names = [name for name, entry in entries.items() if _entry(place.copy / name) != entry]
        if not names:
            return done
    raise DataError(f"{place.name}: {names[0]} changes too often to be copied")


def _settle(place: _Place, state: dict[str, Any], listed: Files, gone: list[str], staged: Collection[str]) -> None:
    """Gives what the list names its names, and deletes what it does not name any more; records come last."""
    folders: set[str] = set()
    for name in sorted((name for name, entry in listed.items() if entry.get("staged")), key=_last):
        _refuse_change(place, _list(place)[0] in state["ids"])
        source, target = place.path(name, listed[name]), place.path(name)
        if (folder := target.rpartition("/")[0]) not in folders:
            folders.add(folder)
            place.system.makedirs(folder, exist_ok=True)
        try:
            place.system.cp_file(source, target)
        except NotImplementedError:
            place.system.put_file(str(place.copy / name), target)
    _refuse_change(place, _list(place)[0] in state["ids"])
    for name in gone:
        _delete(place, name)
    _write_list(place, state, {name: _plain(entry) for name, entry in listed.items()}, [], state["files"])
    for digest in staged:
        _delete(place, f"{STAGED}/{digest}")


def _delete(place: _Place, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        place.system.rm_file(place.path(name))
    # Folders are things of their own in some file systems, and an empty one is no checkpoint.
    place.system.invalidate_cache()
    for parent in list(PurePosixPath(name).parents)[:-1]:
        with contextlib.suppress(OSError, NotImplementedError):
            if place.system.ls(place.path(str(parent)), detail=False):
                break
            place.system.rmdir(place.path(str(parent)))


def _write_list(place: _Place, state: dict[str, Any], listed: Files, gone: list[str], taken: Files) -> None:
    """Replaces the list, and notes here that it is this process's, with what the address then has."""
    from fsspec.implementations.local import LocalFileSystem

    tree = {"made by": f"nqf {__version__}", "files": dict(sorted(listed.items())), "gone": gone}
    text, path = json.dumps(tree, indent=1), place.path(LIST)
    identity = hashlib.sha256(text.encode()).hexdigest()
    # Before, so that whoever was ended in between knows it for its own.
    _write_state(place, state | {"ids": [*state["ids"], identity]})
    if isinstance(place.system, LocalFileSystem):
        # Stores show a file when it is whole; this would show it at once.
        files.write_text(path, text)
    else:
        place.system.pipe_file(path, text.encode())
    state |= {"ids": [identity], "files": taken}
    _write_state(place, state)


def _refuse_change(place: _Place, unchanged: bool) -> None:
    if not unchanged:
        raise RunChangedError(
            f"{place.name}: somebody else changed it since it was copied here; nothing was changed there. What was "
            f"made is in {place.copy}, a run folder: keep it under another name or delete it, then run the command "
            "again"
        )


def _names(folder: Path) -> set[str]:
    """The files of a run folder that belong to the run."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    plain = {path.relative_to(folder).as_posix() for path in found if not path.is_symlink()}
    return {name for name in plain if not _NOT_OF_THE_RUN.fullmatch(name) and _UNFINISHED not in name}


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": files.sha256(path)}


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {"size": entry["size"], "sha256": entry["sha256"]}


def _last(name: str) -> tuple[bool, str]:
    """Records come after what they speak of."""
    return PurePosixPath(name).name in (RECORD, "items.json", "config.yaml"), name


def _remove_empty(folder: Path, name: str) -> None:
    for parent in list(PurePosixPath(name).parents)[:-1]:
        with contextlib.suppress(OSError):
            (folder / parent).rmdir()


def _read_state(place: _Place) -> dict[str, Any]:
    try:
        return files.read_json(place.home / "state.json")
    except ValueError:
        return {"ids": [], "open": False, "files": {}}


def _write_state(place: _Place, state: dict[str, Any]) -> None:
    files.write_json(place.home / "state.json", state)
