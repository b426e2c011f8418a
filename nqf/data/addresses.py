"""Tables at addresses (`gs://`, `s3://` and whatever else fsspec opens): brought here whole before anything reads them.

What is read is a local copy, so that every check of a local file holds for it, and messages name the address. A run
remembers the version of an address that it was made of, by which a changed table is noticed without its bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from nqf import files
from nqf.config import DATA_PATHS, DataConfig
from nqf.data.errors import DataError
from nqf.data.readers import is_part
from nqf.data.recbole import benchmark_names
from nqf.data.stored import LOGS
from nqf.data.unirec import test_name

_LOG = logging.getLogger(__name__)
# What file systems call that which another version of a file has another of; what is of its content comes first.
_VERSIONS = (
    *("md5Hash", "Content-MD5", "content_md5", "blob_id", "sha", "ETag", "etag", "Last-Modified", "LastModified"),
    *("last_modified", "updated", "modificationTime", "mtime", "modify", "created"),
)
ONE_AT_A_TIME = threading.RLock()
"""Implementations share what they must not, as memory:// does the place where a file is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A file, or a folder inside a folder.

    Attributes:
      name: Where its copy is put, below the folder of the copies.
      path: As its file system has it.
      size: Bytes; None if that is not told, as of folders.
      version: Changes with the content; None if nothing tells it.
      folder: Whether it is a folder.
    """

    name: str
    path: str
    size: int | None
    version: str | None
    folder: bool


@contextlib.contextmanager
def local(
    given: Mapping[str, str | None], scratch: Path, kind: str = ""
) -> Iterator[tuple[dict[str, Any], Callable[[str], str]]]:
    """Local copies of what is at addresses.

    A `DataError` that is raised in the block names the addresses, without credentials, where it named the copies.

    Args:
      given: Paths and addresses by any names.
      scratch: Folder for the copies, which must stay as long as they are read.
      kind: `data.format`, where it is known; it says which files belong together.

    Yields:
      The same names with paths of local files, and a function that puts the addresses back into a text.

    Raises:
      DataError: An address that cannot be read; names it and says why.
    """
    paths: dict[str, Any] = dict(given)
    names: dict[str, str] = {}
    for key, value in given.items():
        if value is not None and files.is_address(value):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            paths[key] = str(folder / _bring(value, folder, kind))
            name = files.masked(value).rstrip("/")
            # What lies beside it, as RecBole's other files and pictures with relative paths, is of the same place.
            names |= {paths[key]: name, str(folder): re.split(r"[?#]\*\*\*", name)[0].rpartition("/")[0]}

    def told(text: str) -> str:
        for path, name in names.items():
            text = text.replace(path, name)
        return text

    try:
        yield paths, told
    except DataError as error:
        raise DataError(told(str(error))) from error


def beside(path: Path, told: Callable[[str], str]) -> Path | str:
    """Where relative paths in a table start: its folder, or the text before the last name of its address."""
    folder = told(str(path.parent))
    return path.parent if folder == str(path.parent) else folder


def versions(config: DataConfig) -> dict[str, str]:
    """What tells the versions of the files at addresses, by their keys in the data section.

    Every address is asked once until `forget`. One that is gone or does not answer is left out, with a warning.
    """
    given = {key: getattr(config, key) for key in DATA_PATHS}
    asked = {key: _version(value, config.format) for key, value in given.items() if value and files.is_address(value)}
    return {key: version for key, version in asked.items() if version is not None}


def forget() -> None:
    """Lets `versions` ask again: at the start of a command, and when the tables were read."""
    _version.cache_clear()


@functools.lru_cache(maxsize=64)
def _version(address: str, kind: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with as_data_error(address):
            system, path = open_system(address)
            for part in _look(system, path, kind):
                version = part.version or _content(system, part, address)
                digest.update(f"{part.name}|{part.size}|{version}|".encode())
    except DataError as error:
        _LOG.warning("%s; what was read of it before counts as unchanged", error)
        return None
    return digest.hexdigest()


def _content(system: Any, part: _Part, address: str) -> str:
    """The digest of a file that nothing tells the version of; nothing of a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        _copy(system, [part], Path(scratch), address)
        return "" if part.folder else files.sha256(Path(scratch) / part.name)


def _bring(address: str, folder: Path, kind: str) -> str:
    """Brings what is at an address, and the files that belong to it, into a folder; the name of its copy there."""
    with as_data_error(address):
        system, path = open_system(address)
        parts = _look(system, path, kind)
        _LOG.info("%s: %s bytes are copied here", files.masked(address), f"{sum(part.size or 0 for part in parts):,}")
        _copy(system, parts, folder, address)
        system.invalidate_cache()
        if _look(system, path, kind) != parts:
            raise DataError(f"{files.masked(address)}: changed while it was read; run the command again")
        return _name(path)


def open_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and its path there. The characters of a name are never a pattern or a chain.

    Raises:
      DataError: Its credentials were left out. And what the file system raises: see `as_data_error`.
    """
    import fsspec

    if re.search(r"://\*\*\*@|[?#]\*\*\*$", address):
        raise DataError(
            f"{address}: its credentials were not written into the run; give the configuration that has them, or leave "
            "them to the environment"
        )
    protocol = address.partition("://")[0]
    system = fsspec.get_filesystem_class(protocol)
    opened = fsspec.filesystem(protocol, **system._get_kwargs_from_urls(address))
    # What was listed earlier in this process may have changed.
    opened.invalidate_cache()
    return opened, system._strip_protocol(address)


def _look(system: Any, path: str, kind: str) -> list[_Part]:
    """The files of a path: itself with those that belong to it, or the parts of a folder."""
    name, entry = _name(path), system.info(path)
    if entry["type"] == "directory":
        # Some stores keep an empty object of a folder's own name in it.
        entries = [entry for entry in system.ls(path, detail=True) if entry["name"].strip("/") != path.strip("/")]
        parts = [_part(f"{name}/{_name(entry['name'])}", entry["name"], entry) for entry in entries]
        parts = [part for part in parts if is_part(_name(part.path)) or _name(part.path) in LOGS]
        return [_part(name, path, entry), *sorted(parts, key=lambda part: part.name)]
    found, (head, _, tail) = [_part(name, path, entry)], path.rpartition(name)
    for other in [*benchmark_names(name), *([test_name(name)] if kind in ("", "unirec") else [])]:
        if other == name:
            continue
        try:
            found.append(_part(other, f"{head}{other}{tail}", system.info(f"{head}{other}{tail}")))
        except FileNotFoundError as error:
            if not _is_absent(error, path):
                raise
    return found


def _part(name: str, path: str, entry: Mapping[str, Any]) -> _Part:
    folder = entry["type"] == "directory"
    return _Part(
        name=name, path=path, size=None if folder else entry.get("size"),
        version=None if folder else version_of(entry), folder=folder,
    )  # fmt: skip


def version_of(entry: Mapping[str, Any]) -> str | None:
    """What changes with a file's content, of what a file system says of it; None if it says nothing such."""
    return next((f"{key} {entry[key]}" for key in _VERSIONS if entry.get(key)), None)


def _name(path: str) -> str:
    """The last name of a path; those of websites are in front of a query."""
    path = re.split(r"[?#]", path)[0] if re.match(r"https?://", path, re.I) else path
    return path.rstrip("/").rpartition("/")[2] or "table"


def _copy(system: Any, parts: list[_Part], folder: Path, address: str) -> None:
    targets = {part: folder / part.name for part in parts}
    for part, target in targets.items():
        # A folder inside a folder stays empty: the reader refuses the table for it, as any other.
        (target if part.folder else target.parent).mkdir(parents=True, exist_ok=True)
    wanted = [part for part in parts if not part.folder]
    with ONE_AT_A_TIME:
        # Lists are copied as they are, and several files at a time where the file system can.
        system.get([part.path for part in wanted], [str(targets[part]) for part in wanted])
    for part in wanted:
        size = targets[part].stat().st_size
        if part.size not in (None, size):
            raise DataError(
                f"{files.masked(address)}: {_name(part.path)} broke off after {size:,} of {part.size:,} bytes; "
                "run the command again"
            )


@contextlib.contextmanager
def as_data_error(address: str, do: Literal["read", "write"] = "read") -> Iterator[None]:
    """Tells what a file system raises in the block in one sentence, without credentials.

    Raises:
      DataError: In place of all other errors.
    """
    try:
        yield
    except DataError:
        raise
    # File systems have errors of their own, of which few are OSErrors; their texts and tracebacks may hold credentials.
    except Exception as error:
        name, text = files.masked(address), _without_credentials(str(error), address)
        cause = error.__cause__ or error
        if isinstance(error, ImportError):
            problem = f"its file system needs a package that is not installed ({text})"
        elif isinstance(error, PermissionError) or getattr(cause, "status", None) in (401, 403):
            problem = f"no permission to {do} it ({text}); credentials are taken from where its package looks for them"
        elif isinstance(error, FileNotFoundError) and _is_absent(error, address):
            problem = "no such file or folder; fix the address"
        else:
            text = f"{type(cause).__name__}: {_without_credentials(str(cause), address)}"[:500]
            done = "read" if do == "read" else "written"
            problem = f"could not be {done} ({text}); see whether it is right, or copy it here and give the path"
        raise DataError(f"{name}: {problem}") from None


def _is_absent(error: FileNotFoundError, path: str) -> bool:
    """Whether there is no such file. fsspec's websites say so of all that fails, with the reason as the cause."""
    if error.__cause__ is None or not re.match(r"https?://", path, re.I):
        return True
    return getattr(error.__cause__, "status", None) in (404, 410)


def _without_credentials(text: str, address: str) -> str:
    words = re.compile(r"[^\w+%.~-]+")
    kept = set(words.split(files.masked(address)))
    for word in sorted(set(words.split(address)) - kept, key=len, reverse=True):
        text = text.replace(word, "***") if len(word) > 3 else text
    return files.masked(text)
