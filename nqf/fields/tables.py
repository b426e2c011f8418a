"""Files of the field cache: appended .npy tables, content-addressed names, checksums and atomic publication."""

from __future__ import annotations

import dataclasses
import mmap
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from nqf import files
from nqf.data.errors import NPY_ERRORS
from nqf.fields.encoder import CacheError

# Tables beyond this size do not stay in the process's resident memory after a read.
_MAPPED_BYTES = 1 << 30


def release(array: np.ndarray) -> None:
    """Unmaps the pages of a memory map that were read; the kernel keeps them, and the next read maps them again."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldTable:
    """Frozen vectors of one field, each distinct value once.

    Attributes:
      values: float16 memory map [unique, width].
      rows: int32 memory map [items] (of reviews: [events]), row in `values`; -1 where missing.
      modality: Modality of the field.
    """

    values: np.memmap
    rows: np.memmap
    modality: str

    def gather(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of some items: float32 [n, width], zero where missing, and bool [n], True where present."""
        rows = np.asarray(self.rows[at])
        present = rows >= 0
        vectors = np.asarray(self.values[np.maximum(rows, 0)], np.float32)
        vectors[~present] = 0
        if self.values.nbytes > _MAPPED_BYTES:
            release(self.values)
        return vectors, present

    def __reduce__(self) -> tuple:
        # A pickled memory map is a copy of its data, once per loader worker.
        return open_table, (self.values.filename, self.rows.filename, self.modality)


def open_table(values: str | Path, rows: str | Path, modality: str) -> FieldTable:
    """Maps a table's two files."""
    return FieldTable(values=np.load(values, mmap_mode="r"), rows=np.load(rows, mmap_mode="r"), modality=modality)


class TableWriter:
    """Appends rows to an .npy file without mapping it, so that what is written never counts as resident memory."""

    def __init__(self, path: Path, dtype: np.dtype | type, width: int):
        self._file: BinaryIO = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._width = width
        self.rows = 0
        self._write_header()

    def append(self, rows_NxW: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows_NxW, self._dtype).tobytes())
        self.rows += len(rows_NxW)

    def close(self) -> None:
        """Writes the final shape; NumPy pads headers so that the first axis can grow in place."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        shape = (self.rows, self._width)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)


def publish(temporary: Path, root: Path, name: str) -> dict[str, Any]:
    """Moves a finished file to its place in the cache.

    Args:
      temporary: The file, on the same file system.
      root: Folder of the cache.
      name: Path in the cache. "{hash}" in it stands for the content's hash; a file that is there already then
        has this content.

    Returns:
      Manifest record: `file` (relative to `root`), `bytes` and `sha256`.
    """
    record = {"bytes": temporary.stat().st_size, "sha256": files.sha256(temporary)}
    name = name.replace("{hash}", record["sha256"][:16])
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    files.publish(temporary, root / name)
    return {"file": name, **record}


def slug(name: str) -> str:
    """A field's name as part of a file name; distinct names may share one, as the content's hash follows it."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)[:40]


def inside(root: Path, name: str) -> Path:
    """The path of a file or folder that a manifest names.

    Raises:
      CacheError: It is not in the manifest's own folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CacheError(f"{root}: altered, it names {name} outside of itself; delete the cache")
    return root / name


def check_file(root: Path, record: dict[str, Any], shape: tuple[int, ...] | None, *, verify: bool) -> None:
    """Checks that a file is what the manifest says.

    Args:
      root: Folder of the cache.
      record: As `publish` returned.
      shape: Shape of the .npy array that it must be; None for other files.
      verify: Also compare its checksum, for which a version of the file is read once.

    Raises:
      CacheError: With the reason.
    """
    path = inside(root, record["file"])
    if not path.is_file():
        raise CacheError(f"{path}: missing from the cache; run the fields stage again")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise CacheError(f"{path}: truncated or altered ({size} bytes, expected {record['bytes']}); delete the cache")
    if shape is not None:
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False).shape
        except NPY_ERRORS as error:
            raise CacheError(f"{path}: altered, no readable .npy header ({error}); delete the cache") from error
        if found != shape:
            raise CacheError(f"{path}: altered, shape {found}, expected {shape}; delete the cache")
    if verify and files.sha256(path) != record["sha256"]:
        raise CacheError(f"{path}: altered, its checksum differs from the manifest's; delete the cache")
