"""Downloads that go on where they broke off, and archives unpacked with bounds; nothing but the standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from nqf.data.errors import DataError

RECORD = "downloads.json"
"""What was downloaded: file name to url, bytes, sha256, etag, last_modified and fetched (unix seconds)."""
UNPACKED_LIMIT = 1 << 30
"""Most bytes that a member of an archive may have; the largest that is asked for has 25 MB."""
_CHUNK = 1 << 20
# Answers that may differ the next time; all others are final.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_MAGIC = {".gz": b"\x1f\x8b", ".zip": b"PK"}

# Called with the bytes that are there and the bytes of the whole file, None if the server does not say.
Progress = Callable[[int, int | None], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """When a download is given up.

    Attributes:
      attempts: Tries in a row that bring no further byte.
      pause: Wait before the second of them, in seconds; it doubles for each further one.
      timeout: Longest wait for a connection or for further bytes, in seconds.
    """

    attempts: int = 5
    pause: float = 1.0
    timeout: float = 30.0


PATIENCE = Patience()


def download(
    url: str, path: Path, *, patience: Patience = PATIENCE, progress: Progress | None = None
) -> dict[str, Any]:
    """Downloads a file, or goes on with a download that broke off, and records its SHA-256 in `downloads.json`.

    What is not complete stands in `<path>.part`. A complete file that still is what the record says is kept.

    Args:
      url: Its address.
      path: Where it goes.
      patience: Tries and waits.
      progress: Called after each chunk.

    Returns:
      The record.

    Raises:
      DataError: It cannot be had, is not what its name says, or does not fit on the disk.
    """
    record = _records(path.parent).get(path.name)
    if record and record["url"] == url and path.is_file() and path.stat().st_size == record["bytes"]:
        if _sha256(path) == record["sha256"]:
            if progress:
                progress(record["bytes"], record["bytes"])
            return record
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    longest = part.stat().st_size if part.is_file() else 0
    while True:
        try:
            headers = _attempt(url, part, patience.timeout, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code not in _TRANSIENT:
                raise DataError(
                    f"{url}: HTTP {error.code} {error.reason}; see whether the publisher moved the file"
                ) from None
            reason = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            # Refused, reset and stalled connections, and bodies that end early.
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        size = part.stat().st_size if part.is_file() else 0
        # Beyond the longest so far: a server that announces too much would otherwise be asked for ever.
        failures = 1 if size > longest else failures + 1
        longest = max(longest, size)
        if failures >= patience.attempts:
            raise DataError(
                f"{url}: gave up after {failures} tries without a further byte ({reason}); {size:,} bytes are kept, "
                "and the same command goes on from there"
            )
        time.sleep(patience.pause * 2 ** (failures - 1))
    _check_kind(part, path, url)
    record = {"url": url, "bytes": part.stat().st_size, "sha256": _sha256(part), **headers, "fetched": int(time.time())}
    os.replace(part, path)
    part.with_suffix(".json").unlink(missing_ok=True)
    _write_json(path.parent / RECORD, {**_records(path.parent), path.name: record})
    return record


def _attempt(url: str, part: Path, timeout: float, progress: Progress | None) -> dict[str, str | None]:
    """One connection; returns the validators of a file that is now complete."""
    notes = part.with_suffix(".json")
    known = json.loads(notes.read_text()) if notes.is_file() else {}
    start = part.stat().st_size if part.is_file() and known.get("url") == url else 0
    # Shops and universities refuse urllib's own name; a compressed transfer could not be resumed.
    request = urllib.request.Request(url, headers={"User-Agent": "nqf/0.1", "Accept-Encoding": "identity"})
    validator = known.get("etag") or known.get("last_modified")
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator and not validator.startswith("W/"):
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            # The file is not that long any longer.
            part.unlink()
            raise ConnectionError("the file changed while it was downloaded; starting again") from error
        raise
    with response:
        headers = {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}
        length = response.headers.get("Content-Length")
        total = int(length) if length is not None else None
        if response.status == 206:
            first, total = _content_range(response.headers.get("Content-Range", ""))
            changed = known.get("total") not in (None, total) or known.get("etag") != headers["etag"]
            if first != start or changed:
                part.unlink()
                raise ConnectionError("the file changed while it was downloaded; starting again")
        else:
            start = 0
        if total is not None and total - start > shutil.disk_usage(part.parent).free:
            raise DataError(f"{url}: {total - start:,} bytes do not fit on the disk of {part.parent}")
        _write_json(notes, {"url": url, "total": total, **headers})
        with part.open("ab" if start else "wb") as file:
            size = start
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                size += len(chunk)
                if progress:
                    progress(size, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size < total:
        raise ConnectionError(f"the connection broke off after {size:,} of {total:,} bytes")
    return headers


def _content_range(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
    if match is None:
        raise ConnectionError(f"not a usable Content-Range: {text!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _check_kind(part: Path, path: Path, url: str) -> None:
    magic = _MAGIC.get(path.suffix)
    with part.open("rb") as file:
        start = file.read(16)
    if magic and not start.startswith(magic):
        part.unlink()
        raise DataError(f"{url}: not a {path.suffix} file, it starts with {start!r}; a page of a proxy or of an error?")


def unpack(archive: Path, members: Sequence[str], folder: Path, *, limit: int = UNPACKED_LIMIT) -> None:
    """Unpacks some members of a zip file into a folder, by their last name.

    Raises:
      DataError: A damaged archive, a path in it that leads out of it, a member that is not there or too large.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            for name in names:
                if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or ":" in name:
                    raise DataError(
                        f"{archive}: unsafe path '{name}' in the archive; it is not what its publisher made"
                    )
            for name in members:
                if name not in names:
                    raise DataError(f"{archive}: there is no '{name}' in it; the publisher has changed the archive")
                target = folder / PurePosixPath(name).name
                temporary = target.with_name(target.name + ".tmp")
                # The size that the archive states may be a lie; what comes out is counted.
                size = 0
                with file.open(name) as packed, temporary.open("wb") as plain:
                    while chunk := packed.read(_CHUNK):
                        size += len(chunk)
                        if size > limit:
                            raise DataError(f"{archive}: '{name}' is larger than {limit:,} bytes; it is not unpacked")
                        plain.write(chunk)
                os.replace(temporary, target)
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{archive}: damaged: {error}; delete it and fetch again") from error
    finally:
        for path in folder.glob("*.tmp"):
            path.unlink()


def _records(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, tree: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
