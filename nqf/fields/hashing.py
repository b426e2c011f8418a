"""Keys of raw values: 128 bits that are equal exactly where two values are the same to the encoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

# Two uint64 columns; rows of strings and bytes are BLAKE2b digests, rows of numbers hold the number itself.
KEY_WORDS = 2


def mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of uint64 that looks random (Steele et al., OOPSLA 2014)."""
    z = bits.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def digests(values: Iterable[bytes]) -> np.ndarray:
    """BLAKE2b-128 digests, uint64 [n, 2]."""
    blake2b = hashlib.blake2b
    joined = b"".join(blake2b(value, digest_size=16).digest() for value in values)
    return np.frombuffer(joined, "<u8").reshape(-1, KEY_WORDS)


def string_keys(values: Iterable[str]) -> np.ndarray:
    """Digests of strings, uint64 [n, 2]."""
    return digests(value.encode() for value in values)


def present_values(values: pl.Series, modality: str) -> pl.Series:
    """Whether each value of a canonical column is there: not null, and not an empty list."""
    if modality in ("category", "vector", "geo") and values.dtype.is_nested():
        return (values.list.len() > 0).fill_null(False)
    return values.is_not_null()


def value_keys(values: pl.Series, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys of one chunk of a canonical column.

    Args:
      values: Canonical column of the modality; null where missing.
      modality: Decides what makes two values the same: categories are sets, images are their file's bytes (so a
        replaced picture is encoded again), a URL is its text.

    Returns:
      bool [n], whether a value is present, and the uint64 [present, 2] keys of those that are. An image whose
      file cannot be opened has the key of its path.
    """
    present = present_values(values, modality)
    found = values.filter(present)
    if not len(found):
        return present.to_numpy(), np.zeros((0, KEY_WORDS), np.uint64)
    if modality in ("number", "time"):
        # Adding zero turns -0.0 into 0.0.
        bits = (found.to_numpy() + (0.0 if modality == "number" else 0)).view(np.uint64)
        keys = np.stack([mix(bits), bits], axis=1)
    elif modality == "geo":
        lat, lon = ((found.list.get(i).to_numpy() + 0.0).view(np.uint64) for i in range(2))
        keys = np.stack([mix(lat ^ mix(lon)), lon], axis=1)
    elif modality == "vector":
        rows = found.cast(pl.List(pl.Float32)).to_list()
        keys = digests(np.asarray(row, "<f4").tobytes() for row in rows)
    else:
        if modality == "category":
            # Netstrings, so that no separator inside a value can make two sets look the same.
            element = pl.element().unique().sort()
            netstring = element.str.len_bytes().cast(pl.String) + ":" + element
            found = found.to_frame("v").select(pl.col("v").list.eval(netstring).list.join("")).to_series()
        # Repeats inside the chunk are hashed once.
        distinct = found.unique(maintain_order=True)
        numbered = distinct.to_frame("v").with_row_index("at")
        at = found.to_frame("v").join(numbered, on="v", how="left", maintain_order="left")["at"].to_numpy()
        names = distinct.to_list()
        keys = (_file_keys(names) if modality == "image" else string_keys(names))[at]
    return present.to_numpy(), keys


def _file_keys(paths: list[str]) -> np.ndarray:
    keys = string_keys(paths).copy()
    for row, path in enumerate(paths):
        # A pipe would never open, and a device never end.
        if is_url(path) or not os.path.isfile(path):
            continue
        try:
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        except (OSError, ValueError):
            continue
        keys[row] = np.frombuffer(digest, "<u8")
    return keys


def is_url(path: str) -> bool:
    """Whether an image value is a URL rather than a path."""
    return path.startswith(("http://", "https://"))


def group_keys(keys_NxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups equal keys.

    Returns:
      int64 [groups], the first row of each group, ascending; and int64 [n], the group of each row.
    """
    order = np.lexsort((keys_NxK[:, 1], keys_NxK[:, 0]))
    ordered = keys_NxK[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    # lexsort is stable, so the first of a group is its smallest row.
    first = order[new]
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    group = np.empty(len(order), np.int64)
    group[order] = rank[np.cumsum(new) - 1]
    return np.sort(first), group


def sample_rows(keys_NxK: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """At most `size` of the rows, ascending: those with the smallest mixed keys.

    Keys look random, so this is an even sample of the values that does not depend on their order (bottom-k
    sampling, Cohen and Kaplan, PODC 2007).
    """
    if len(rows) <= size:
        return rows
    chosen = np.argpartition(mix(keys_NxK[rows, 0]), size)[:size]
    return np.sort(rows[chosen])
