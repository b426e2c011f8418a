"""New values of a table, encoded as parts that any number of processes make together and that outlive their makers.

A part is what the encoder is given at a time: as batches are formed within it, its bytes are the same whoever makes it
and however many do, on devices of one kind. The folder's name tells what its parts are of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from nqf import files
from nqf.data.errors import NPY_ERRORS, STRUCTURE_ERRORS
from nqf.fields.cache import encode_column
from nqf.fields.encoder import CacheError, FieldEncoder
from nqf.fields.tables import slug

PARTS = "parts"
"""Name of the folder of a cache in which tables have their folders of parts."""
_LOG = logging.getLogger(__name__)
# Stands in a folder of parts as long as some may be made. It comes first and goes first: where it stands and a part
# does not, somebody waits for that part.
_OPEN = "parts.json"
# What nqf leaves in a folder of parts: that, parts, claims to them, and what a killed process was writing.
_OURS = re.compile(
    rf"{re.escape(_OPEN)}|part-\d+\.npz|\.part-\d+\.npz\.lock|\.(part-|{_OPEN}).+{re.escape(files.PARTIAL)}"
)

# Values in chunks, each with the number of rows that were read so far.
Chunks = Callable[[], Iterator[tuple[int, pl.Series]]]


class Part(NamedTuple):
    """A part that was come to: rows of the table read so far, its file, its number of values, and who made it."""

    done: int
    path: Path
    size: int
    made: bool


def parts_folder(directory: Path, name: str, recipe: dict[str, Any], rows: np.ndarray, keys: np.ndarray) -> Path:
    """The folder of the parts of a table's new values, which need not exist.

    Args:
      directory: Folder of the cache.
      name: Name of the table.
      recipe: All that vectors depend on beside their values, and how the rows are cut into chunks; JSON-able.
      rows: int64 [n], the rows of the new values.
      keys: uint64 [n, 2], their keys.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for array in (rows, keys):
        digest.update(f"|{array.dtype.str}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return directory / PARTS / f"{slug(name)}-{digest.hexdigest()[:16]}"


def opened(directory: Path, name: str = "*") -> list[Path]:
    """The folders of parts of a table, or of all tables, that a build has opened."""
    return [path for path in _folders(directory, name) if (path / _OPEN).is_file()]


def _folders(directory: Path, name: str = "*") -> list[Path]:
    found = (directory / PARTS).glob(f"{slug(name) if name != '*' else name}-{'[0-9a-f]' * 16}")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def make_all(folder: Path, encoder: FieldEncoder, chunks: Chunks, progress: Callable[[int], None]) -> list[Part]:
    """Makes all parts together with whoever else is at them; returns when all are there.

    Those that another process is at are waited for, and made here should it end. What an earlier start could not read
    is tried again.

    Args:
      folder: From `parts_folder`; made if missing.
      encoder: What encodes.
      chunks: Reads the values.
      progress: Called after each part with the rows of the table that were read so far.

    Raises:
      CacheError: The folder holds what is none of its parts; it is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if strange := sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)):
        raise CacheError(f"{folder}: holds what is none of its parts, such as {strange[0]!r}; move it away")
    files.write_json(folder / _OPEN, {"parts of": "values that are being encoded; nqf deletes them"})
    earlier = {path.name for path in folder.iterdir()}
    told = False
    while True:
        parts = []
        for part in make_free(folder, encoder, chunks(), again=earlier):
            parts.append(part)
            progress(part.done)
        earlier = set()
        left = [part.path for part in parts if not part.path.exists()]
        if left and not told:
            _LOG.info("%s: %d parts are with other processes, which are waited for", folder, len(left))
            told = True
        if not files.abandoned(left):
            return parts


def make_free(
    folder: Path, encoder: FieldEncoder, chunks: Iterator[tuple[int, pl.Series]], *, again: Collection[str] = ()
) -> Iterator[Part]:
    """Makes those parts that are not there and that no other process is at.

    Args:
      folder: A folder of parts; when it is closed, as its table has been made, there is nothing left to do.
      encoder: What encodes.
      chunks: The values.
      again: Names of parts whose unreadable values are tried again.

    Yields:
      Each part, also if another process makes or made it.

    Raises:
      CacheError: What should be a part of `again` is none; it is kept.
    """
    for number, (done, values) in enumerate(chunks):
        path, made = folder / f"part-{number:05d}.npz", False
        if not (folder / _OPEN).exists():
            return
        with files.claimed(path) as mine:
            before = read_part(path, len(values), encoder.width) if path.name in again else None
            missing = not path.exists() if before is None else not before[1].all()
            if mine and missing and (folder / _OPEN).exists():
                vectors, ok = _encoded(encoder, values, before)
                # Of another table than the one that was made meanwhile.
                if (folder / _OPEN).exists():
                    with files.whole(path) as file:
                        np.savez(file, vectors=vectors, ok=ok)
                    made = True
        if not (folder / _OPEN).exists():
            # A claim makes the folder that it is in, which may just have gone.
            _remove_empty(folder)
            return
        yield Part(done, path, len(values), made)


def _encoded(
    encoder: FieldEncoder, values: pl.Series, before: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and which of them are ones; of a part that was made before, what could not be read then."""
    if before is None:
        return encode_column(encoder, values)
    vectors, ok = before
    unread = ~ok
    vectors[unread], ok[unread] = encode_column(encoder, values.filter(pl.Series(unread)))
    return vectors, ok


def read_part(path: Path, size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a part, float16 [size, width], and bool [size], which of its values could be read.

    Raises:
      CacheError: It is not what `make_free` wrote.
    """
    try:
        arrays = files.read_arrays(path)
        vectors, ok = arrays["vectors"], arrays["ok"]
        if (vectors.dtype, vectors.shape) != (np.float16, (size, width)) or (ok.dtype, ok.shape) != (bool, (size,)):
            raise ValueError(f"{vectors.dtype} {list(vectors.shape)} in place of float16 [{size}, {width}]")
    except (*NPY_ERRORS, *STRUCTURE_ERRORS) as error:
        raise CacheError(f"{path}: not a part of encoded values ({error}); move it away") from error
    return vectors, ok


def remove_parts(directory: Path) -> None:
    """Deletes the parts of a cache whose tables have been made; what nqf did not write there stays."""
    for folder in _folders(directory):
        (folder / _OPEN).unlink(missing_ok=True)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    # A foreign file keeps its folder.
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
