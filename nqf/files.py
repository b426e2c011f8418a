"""Whole files and locks: under a name stands what was there before or what is there now, never a part of it.

Only this file replaces files and locks folders (Orbax's checkpoints apart, which have their own whole writes).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

PARTIAL = ".nqf-partial"
"""End of the name of a file that is being written; a killed process leaves it, and the next writer removes it."""


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What may be a credential in an address: a user with a password (in which some leave a slash as it is), any user of a
# website, and queries. `host:9000/`, `[::1]:80` and Azure's `container@account` are none.
_CREDENTIALS = (
    (re.compile(r"(https?://)[^\s/]*@", re.I), r"\1***@"),
    (re.compile(r"([a-z][a-z0-9+.-]+://)[^\s/@:\[]*:(?!\d*/)[^\s@]*@(?:[^\s/@]*@)*", re.I), r"\1***@"),
    (re.compile(r"(https?://[^\s?#'\"]*[?#])[^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))", re.I), r"\1***"),
    (re.compile(r"([a-z][a-z0-9+.-]+://[^\s?'\"]*\?)(?=[^\s]*=)[^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))", re.I), r"\1***"),
)
# A file that changed a moment ago may change again within the tick of the file system's clock.
_SETTLED_NS = 2_000_000_000
_digests_lock = threading.RLock()


class InUseError(RuntimeError):
    """A folder that another process works on, or whose file system has no locks; the message says which."""


def shipped() -> Path:
    """The folder of the configurations that come with nqf: a wheel has it inside the package, a checkout beside it."""
    package = Path(__file__).parent
    return next(root for root in (package / "configs", package.parent / "configs") if root.is_dir())


def is_address(path: str) -> bool:
    """Whether a path is an address, as `gs://bucket/items.parquet`. Neither `C:/x` nor `gs:/x` is one."""
    return _ADDRESS.match(path) is not None


def masked(text: str) -> str:
    """A text with `***` in place of what may be credentials in its addresses: passwords, keys, signatures."""
    for pattern, place in _CREDENTIALS if "://" in text else ():
        text = pattern.sub(place, text)
    return text


@contextlib.contextmanager
def whole(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file to be written; it takes its place when the block ends well, also if the power fails.

    A link in its place is replaced, not followed. Text is UTF-8. Missing folders above it are made.

    Args:
      path: The file.
      mode: `wb` or `w`.

    Raises:
      OSError: Not writable, or the disk is full; names the file. What was there stays, and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(path)
    try:
        with temporary.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
        publish(temporary, path)
    except Exception as error:
        # Polars tells the system's errors in words of its own: "... (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            raise _named(error, path) from error
        if code is None:
            raise
        raise _named(OSError(int(code[1]), os.strerror(int(code[1]))), path) from error
    finally:
        temporary.unlink(missing_ok=True)


def partial(path: str | Path) -> Path:
    """Where this process writes a file or folder before `publish` puts it in its place.

    What an earlier process of this machine left behind for the same file, and can not be writing any more, is removed.
    """
    path = Path(path)
    head = f".{path.name[:150]}.{socket.gethostname()[:50]}-"
    for left in path.parent.glob(f"{_literal(head)}*{PARTIAL}"):
        process = left.name[len(head) : -len(PARTIAL)]
        if process.isdecimal() and (int(process) == os.getpid() or not Path(f"/proc/{process}").exists()):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{head}{os.getpid()}{PARTIAL}")


def publish(temporary: str | Path, path: str | Path) -> None:
    """Puts a finished file (or a folder, where none is) in its place, on the same file system, and on the disk."""
    temporary, path = Path(temporary), Path(path)
    if temporary.is_file():
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The name is on the disk only when its folder is. Some file systems cannot do that for folders.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole: see `whole`."""
    with whole(path, "w") as file:
        file.write(text)


def write_json(path: str | Path, tree: Any) -> None:
    """Writes JSON whole: see `whole`."""
    write_text(path, json.dumps(tree, indent=2))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: Missing, malformed or something else than an object; names the file.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected an object, found {type(tree).__name__}")
    return tree


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `numpy.savez` wrote; nothing is unpickled, and no more comes out than the file holds.

    Raises:
      ValueError: Packed or overlapping arrays, which hold more than the file; and `nqf.data.errors.NPY_ERRORS`.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > Path(path).stat().st_size:
            raise ValueError("it unpacks to more than its size")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    It is read once per version of the file (device, inode, size and times of change): digests are remembered in
    `$NQF_CACHE/digests.sqlite`, by default in the user's cache folder, and in the process where that cannot be written.
    """
    path = os.path.abspath(path)
    status = os.stat(path)
    version = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    return _sha256(path, version, abs(time.time_ns() - status.st_ctime_ns) > _SETTLED_NS)


@functools.lru_cache(maxsize=65_536)
def _sha256(path: str, version: str, settled: bool) -> str:
    if found := _remembered(path, version):
        return found
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _remembered(path, version, digest)
    return digest


def _remembered(path: str, version: str, digest: str | None = None) -> str | None:
    """The remembered digest of a version of a file, after `digest` has been remembered where that is given."""
    try:
        with _digests_lock, _open_digests(str(cache_folder() / "digests.sqlite")) as known:
            if digest:
                known.execute("insert or replace into digests values (?, ?, ?)", (path, version, digest))
            select = "select digest from digests where path = ? and version = ?"
            row = known.execute(select, (path, version)).fetchone()
    except (sqlite3.Error, OSError):
        # Nothing depends on it: what is not remembered is read again.
        return None
    return row[0] if row else None


@functools.lru_cache(maxsize=4)
def _open_digests(path: str) -> sqlite3.Connection:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=2, check_same_thread=False)
    connection.execute("create table if not exists digests (path text primary key, version text, digest text)")
    return connection


def cache_folder() -> Path:
    """Where nqf keeps what it can make again: `$NQF_CACHE`, by default `nqf` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NQF_CACHE") or Path(base) / "nqf")


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a folder, which is made if missing, for this process. The lock is the kernel's and goes with its owner.

    `NQF_LOCKS=off` in the environment leaves locks out, for file systems that have none.

    Args:
      folder: The folder; `.lock` in it is the lock, and `.lock-owner` says whose it is.
      wait: Wait until it is free; otherwise refuse at once.

    Raises:
      InUseError: Another process holds it, or the file system has no locks.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("NQF_LOCKS") == "off":
        yield
        return
    owner = folder / ".lock-owner"
    lock = filelock.FileLock(folder / ".lock", timeout=-1 if wait else 0, is_singleton=False)
    try:
        error = _acquire(lock)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            named = " ".join(owner.read_text(encoding="utf-8", errors="replace")[:1_000].split())
            raise InUseError(
                f"{folder}: in use by {named or 'another process'}; wait until it has finished, or end it. Its lock "
                "goes with it"
            ) from None
        raise InUseError(f"{folder}: in use by another process; wait until it has finished, or end it") from None
    if error is not None:
        raise InUseError(
            f"{folder / '.lock'}: its file system has no locks ({error}); make sure that nothing else works on "
            f"{folder} and set NQF_LOCKS=off in the environment, or use a folder on a local disk"
        ) from error
    try:
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()} ({masked(' '.join(sys.orig_argv))})"[:900])
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[bool]:
    """Whether this process is the one that may make a file; the claim is the kernel's and goes with its owner.

    Where there are no locks (`locked`) everybody may: for files that are the same whoever makes them.
    """
    if os.environ.get("NQF_LOCKS") == "off":
        yield True
        return
    path = Path(path)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0, is_singleton=False)
    try:
        lacking = _acquire(lock) is not None
    except filelock.Timeout:
        yield False
        return
    if lacking:
        yield True
        return
    try:
        yield True
    finally:
        # Who has opened it meanwhile finds the file made.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def abandoned(paths: Sequence[Path], *, seconds: float = 0.5) -> bool:
    """Waits for files that other processes have claimed (`claimed`).

    Args:
      paths: The files.
      seconds: How often they are looked at.

    Returns:
      False when all are there, True as soon as one is not and may be claimed, as who was making it has ended.
    """
    while missing := [path for path in paths if not path.exists()]:
        for path in missing:
            with claimed(path) as mine:
                if mine and not path.exists():
                    return True
        time.sleep(seconds)
    return False


def _acquire(lock: filelock.BaseFileLock) -> Exception | None:
    """Takes a lock; where the file system has none, what it said.

    Raises:
      filelock.Timeout: Another process holds it.
      OSError: It cannot be taken for another reason.
    """
    try:
        lock.acquire()
    except NotImplementedError as error:
        return error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return error
    return None


def _literal(name: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, f"{error.strerror or error}: nothing was written", str(path))
