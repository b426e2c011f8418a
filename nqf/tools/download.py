"""Downloads by pooch, which continue where they broke off, and archives unpacked with bounds."""

from __future__ import annotations

import dataclasses
import errno
import http.client
import json
import logging
import re
import shutil
import time
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pooch

from nqf.data.errors import DataError
from nqf.files import publish, sha256, whole, write_json
from nqf.net import RefusedError, open_url

RECORD = "downloads.json"
"""What was downloaded: file name to url, etag, last_modified, total, and once it is whole bytes, sha256 and fetched."""
UNPACKED_LIMIT = 1 << 30
"""Most bytes that a member of an archive may have; the largest that is asked for has 25 MB."""
UNSTATED_LIMIT = 1 << 30
"""Most bytes of a file whose server does not say how many it has; all sets that are known here come with a size."""
_CHUNK = 1 << 20
# Answers that may differ the next time; all others are final.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# Of the disk, not of the network.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
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
    url: str,
    path: Path,
    *,
    patience: Patience = PATIENCE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Downloads a file that is not there, or resumes a download that broke off, and records its SHA-256.

    What is not complete stands in `<path>.part`. Once recorded in `downloads.json`, a file has to be the same one
    whenever it is downloaded again, from wherever. One that is there without a record is used as it is.

    Args:
      url: Its address.
      path: Where it goes.
      patience: Tries and waits.
      progress: Called after each chunk.

    Returns:
      The record.

    Raises:
      DataError: It is unavailable, is not what its name or its record says, or does not fit on the disk.
    """
    known = read_records(path.parent).get(path.name, {}).get("sha256")
    pooch.get_logger().setLevel(logging.WARNING)
    part = _Part(url=url, path=path, patience=patience, progress=progress)
    try:
        pooch.retrieve(
            url,
            known_hash=f"sha256:{known}" if known else None,
            fname=path.name,
            path=path.parent,
            # Its protocol names the arguments otherwise; they are given by place.
            downloader=cast(Any, part.download),
        )
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{url}: not the file that {path.parent / RECORD} records (SHA-256 {known}). If its publisher has changed "
            f"it, delete {path.parent} to take the new one"
        ) from error
    size = path.stat().st_size
    if progress:
        progress(size, size)
    if known is None:
        _check_kind(path, path, url)
        record = {"url": url, "bytes": size, "sha256": sha256(path), "fetched": int(time.time())}
        _note(path, read_records(path.parent).get(path.name, {}) | record)
    return read_records(path.parent)[path.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A file while it is downloaded; its validators stand in the record of downloads."""

    url: str
    path: Path
    patience: Patience
    progress: Progress | None

    @property
    def file(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def size(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    def download(self, url: str, output: str, _: Any) -> None:
        """What pooch calls: tries until the file is whole, and puts it where pooch checks it."""
        failures, longest = 0, self.size()
        while True:
            try:
                self.attempt()
                break
            except urllib.error.HTTPError as error:
                if error.code not in _TRANSIENT:
                    raise DataError(
                        f"{url}: HTTP {error.code} {error.reason}; see whether the publisher moved the file"
                    ) from None
                reason = f"HTTP {error.code} {error.reason}"
            except RefusedError as error:
                raise DataError(f"{url}: {error}") from None
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                    raise OSError(error.errno, error.strerror, str(self.file)) from error
                # Refused, reset and stalled connections, and bodies that end early.
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            size = self.size()
            # Beyond the longest so far: a server that announces too much would otherwise be asked for ever.
            failures = 1 if size > longest else failures + 1
            longest = max(longest, size)
            if failures >= self.patience.attempts:
                raise DataError(
                    f"{url}: gave up after {failures} tries without a further byte ({reason}); {size:,} bytes are "
                    "kept, and the same command resumes there"
                )
            time.sleep(self.patience.pause * 2 ** (failures - 1))
        _check_kind(self.file, self.path, url)
        publish(self.file, output)

    def attempt(self) -> None:
        """One connection; returns if the file is now complete."""
        known = read_records(self.path.parent).get(self.path.name, {})
        start = self.size() if known.get("url") == self.url else 0
        if start and start == known.get("total"):
            return
        # A compressed transfer could not be resumed.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            validator = known.get("etag") or known.get("last_modified")
            if validator and not validator.startswith("W/"):
                headers["If-Range"] = validator
        try:
            response = open_url(self.url, timeout=self.patience.timeout, headers=headers)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                self.begin_again("it is not that long any longer")
            raise
        with response:
            found = {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and length.isdecimal() else None
            if response.status == 206:
                first, total = _content_range(response.headers.get("Content-Range", ""))
                if first != start or known.get("total") not in (None, total) or known.get("etag") != found["etag"]:
                    self.begin_again("another length or validator")
            else:
                start = 0
            if total is not None and total - start > shutil.disk_usage(self.path.parent).free:
                raise DataError(f"{self.url}: {total - start:,} bytes do not fit on the disk of {self.path.parent}")
            _note(self.path, {"url": self.url, "total": total, **found})
            self.receive(response, start, total)

    def begin_again(self, why: str) -> None:
        self.file.unlink()
        raise ConnectionError(f"the file changed while it was downloaded: {why}; starting again")

    def receive(self, response: Any, start: int, total: int | None) -> None:
        size = start
        with self.file.open("ab" if start else "wb") as file:
            while chunk := response.read(_CHUNK):
                size += len(chunk)
                if size > (UNSTATED_LIMIT if total is None else total):
                    raise DataError(
                        f"{self.url}: the server does not say how many bytes it has, and there are more than "
                        f"{UNSTATED_LIMIT:,}"
                        if total is None
                        else f"{self.url}: more than the {total:,} bytes that the server stated"
                    )
                file.write(chunk)
                if self.progress:
                    self.progress(size, total)
        if total is not None and size < total:
            raise ConnectionError(f"the connection broke off after {size:,} of {total:,} bytes")


def _content_range(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
    if match is None:
        raise ConnectionError(f"not a usable Content-Range: {text!r}")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _check_kind(file: Path, path: Path, url: str) -> None:
    magic = _MAGIC.get(path.suffix)
    with file.open("rb") as opened:
        start = opened.read(16)
    if magic and not start.startswith(magic):
        if file != path:
            file.unlink()
        raise DataError(
            f"{path if file == path else url}: not a {path.suffix} file, it starts with {start!r}; a page of a proxy "
            "or of an error?"
        )


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What was downloaded into a folder.

    Raises:
      DataError: The record is damaged; names it.
    """
    path = folder / RECORD
    advice = "delete it, and the files beside it that you do not trust"
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}; {advice}") from error
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise DataError(f"{path}: not a record of downloads; {advice}")
    return records


def _note(path: Path, record: dict[str, Any]) -> None:
    write_json(path.parent / RECORD, {**read_records(path.parent), path.name: record})


def unpack(archive: Path, members: Sequence[str], folder: Path, *, limit: int = UNPACKED_LIMIT) -> None:
    """Unpacks some members of a zip file into a folder, by their last name.

    Raises:
      DataError: A damaged archive, a path in it that leads out of it, a member that is not there or too large.
      OSError: A file cannot be written.
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
                # The size that the archive states may be a lie; what comes out is counted.
                size = 0
                with file.open(name) as packed, whole(folder / PurePosixPath(name).name) as plain:
                    while chunk := packed.read(_CHUNK):
                        size += len(chunk)
                        if size > limit:
                            raise DataError(f"{archive}: '{name}' is larger than {limit:,} bytes; it is not unpacked")
                        plain.write(chunk)
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive}: damaged: {error}; delete it and fetch again") from error
