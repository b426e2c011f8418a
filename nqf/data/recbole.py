"""RecBole's atomic files: tab-separated, with a header of `name:type` (https://recbole.io/docs/user_guide/data)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import polars as pl

from nqf.data.errors import DataError
from nqf.data.readers import Columns, check_columns, read_header, scan_text, unzipped, with_all

TYPES = ("token", "token_seq", "float", "float_seq")


def read_atomic(path: Path, scratch: Path, columns: Columns, optional: Collection[str] = ()) -> pl.LazyFrame:
    """Opens an .inter or .item file, gzipped or not.

    Args:
      path: The file.
      scratch: Folder for temporary files, which must stay until the frame was collected.
      columns: Columns to read, by name without type. Sequences become lists.
      optional: Those of them that may be absent; then they are null.

    Raises:
      DataError: No such file, a header without types, or a missing or duplicate column.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; mend the path in the data section of the configuration")
    plain = unzipped(path, scratch) if path.suffix == ".gz" else path
    header = read_header(plain, "\t", quoted=False, where=path)
    types = {}
    for entry in header:
        name, _, kind = entry.rpartition(":")
        if not name or kind not in TYPES:
            raise DataError(f"{path}: column '{entry}' is not of the form name:type with type {', '.join(TYPES)}")
        if name in types:
            raise DataError(f"{path}: duplicate column '{name}'; rename or remove one of them")
        types[name] = kind
    check_columns(path, columns, list(types), optional)
    selected = []
    for name, kind in types.items():
        value = pl.col(f"{name}:{kind}")
        if name in columns:
            selected.append((value.str.split(" ") if kind.endswith("_seq") else value).alias(name))
    return with_all(scan_text(plain, "\t", quoted=False).select(selected), columns)
