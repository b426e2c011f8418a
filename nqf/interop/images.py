"""Images by path or URL: concurrent downloads with timeout, retry, size bound and an on-disk cache."""

from __future__ import annotations

import dataclasses
import hashlib
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image

from nqf import files
from nqf.fields.image import open_picture
from nqf.files import whole
from nqf.net import open_url, read_chunks

T = TypeVar("T")
# Answers that may differ the next time; all others are final.
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


def cache_folder() -> Path:
    """Where downloads are kept: `$NQF_CACHE/images`, or `images` in the user's cache folder for nqf."""
    return files.cache_folder() / "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Reads images; a failure is reported, never replaced by an empty picture.

    Attributes:
      cache: Folder of downloaded files, named by the SHA-256 of their URL.
      threads: Downloads and decodes at a time.
      timeout: Longest wait for a connection or for further bytes, in seconds.
      longest: Longest time for one download, in seconds.
      attempts: Tries per URL when the failure may pass.
      pause: Wait before the second try, in seconds; it doubles for each further one.
      max_bytes: Largest file.
    """

    cache: Path = dataclasses.field(default_factory=cache_folder)
    threads: int = 16
    timeout: float = 10.0
    longest: float = 120.0
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
                if not value.startswith(("http://", "https://")):
                    return self._open(Path(value), prepare)
                try:
                    return self._open(self.fetch(value), prepare)
                except (OSError, SyntaxError, EOFError):
                    # A body without a length that was cut off shows only here; what is in the cache may be old, too.
                    path = self._cached(value)
                    if not path.is_file():
                        raise
                    path.unlink()
                try:
                    return self._open(self.fetch(value), prepare)
                except (OSError, SyntaxError, EOFError):
                    self._cached(value).unlink(missing_ok=True)
                    raise
            except Exception as error:
                # A damaged file may raise anything that a decoder of forty formats can.
                return error

        with ThreadPoolExecutor(self.threads) as pool:
            yield from zip(values, pool.map(one, values), strict=True)

    def _open(self, path: Path, prepare: Callable[[Image.Image], T]) -> T:
        with open_picture(path) as image:
            if path.stat().st_size > self.max_bytes:
                raise ValueError(f"larger than {self.max_bytes} bytes")
            return prepare(image)

    def _cached(self, url: str) -> Path:
        return self.cache / hashlib.sha256(url.encode()).hexdigest()

    def fetch(self, url: str) -> Path:
        """The local copy of a URL, downloaded if it is not in the cache.

        Raises:
          OSError, ValueError: It is unavailable, refused (see `nqf.net.open_url`), or larger than `max_bytes`.
        """
        path = self._cached(url)
        if path.is_file():
            return path
        for attempt in range(self.attempts):
            try:
                return self._download(url, path)
            except OSError as error:
                # Time-outs, refused and broken connections, and answers of a busy server.
                final = isinstance(error, urllib.error.HTTPError) and error.code not in _TRANSIENT
                if final or attempt == self.attempts - 1:
                    raise
            time.sleep(self.pause * 2**attempt)
        raise ValueError("attempts must be at least 1")

    def _download(self, url: str, path: Path) -> Path:
        with open_url(url, timeout=self.timeout) as response, whole(path) as file:
            for chunk in read_chunks(response, limit=self.max_bytes, seconds=self.longest):
                file.write(chunk)
        return path
