"""Images by path or URL: concurrent downloads with timeout, retry, size bound and an on-disk cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from nqf.fields.image import open_picture

T = TypeVar("T")
_CHUNK = 1 << 16
# Answers that may differ the next time; all others are final.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def cache_folder() -> Path:
    """Where downloads are kept: `$NQF_CACHE/images`, or `images` in the user's cache folder for nqf."""
    base = os.environ.get("NQF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nqf"
    return Path(base) / "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Reads images; a failure is reported, never replaced by an empty picture.

    Attributes:
      cache: Folder of downloaded files, named by the SHA-256 of their URL.
      threads: Downloads and decodes at a time.
      timeout: Longest wait for a connection or for further bytes, in seconds.
      attempts: Tries per URL when the failure may pass.
      pause: Wait before the second try, in seconds; it doubles for each further one.
      max_bytes: Largest file.
    """

    cache: Path = dataclasses.field(default_factory=cache_folder)
    threads: int = 16
    timeout: float = 10.0
    attempts: int = 3
    pause: float = 0.5
    max_bytes: int = 32 * 2**20

    def read(self, values: Sequence[str], prepare: Callable[[Image.Image], T]) -> Iterator[tuple[str, T | Exception]]:
        """Reads images and prepares each one in the thread that read it.

        Args:
          values: Paths of local files, or http(s) URLs.
          prepare: Called with the decoded image.

        Yields:
          For each value, in order: the value, and what `prepare` returned or the reason why there is nothing.
        """

        def one(value: str) -> T | Exception:
            try:
                path = self.fetch(value) if value.startswith(("http://", "https://")) else Path(value)
                with open_picture(path) as image:
                    if path.stat().st_size > self.max_bytes:
                        raise ValueError(f"larger than {self.max_bytes} bytes")
                    return prepare(image)
            except Exception as error:
                # A damaged file may raise anything that a decoder of forty formats can.
                return error

        with ThreadPoolExecutor(self.threads) as pool:
            yield from zip(values, pool.map(one, values), strict=True)

    def fetch(self, url: str) -> Path:
        """The local copy of a URL, downloaded if it is not in the cache.

        Raises:
          OSError, ValueError: It cannot be had, or is larger than `max_bytes`.
        """
        path = self.cache / hashlib.sha256(url.encode()).hexdigest()
        if path.is_file():
            return path
        for attempt in range(self.attempts):
            try:
                return self._download(url, path)
            except urllib.error.HTTPError as error:
                if error.code not in _TRANSIENT or attempt == self.attempts - 1:
                    raise
            except OSError:
                # Time-outs, refused and broken connections.
                if attempt == self.attempts - 1:
                    raise
            time.sleep(self.pause * 2**attempt)
        raise ValueError("attempts must be at least 1")

    def _download(self, url: str, path: Path) -> Path:
        # Some shops refuse urllib's own name.
        request = urllib.request.Request(url, headers={"User-Agent": "nqf/0.1 (image field encoder)"})
        self.cache.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(request, timeout=self.timeout) as response,
            tempfile.NamedTemporaryFile(dir=self.cache, delete=False) as file,
        ):
            try:
                size = 0
                while chunk := response.read(_CHUNK):
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise ValueError(f"larger than {self.max_bytes} bytes")
                    file.write(chunk)
                if response.headers.get("Content-Length") not in (None, str(size)):
                    raise ConnectionError(f"broke off after {size} bytes")
                file.close()
                # Atomic, so that another process never sees half a file.
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        return path
