"""The reference's candidate embedding JSON: `{item id: [floats]}`.

Its item dictionaries and samples are tables, which `data.format: unirec` reads (`nqf.data.unirec`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nqf.data.errors import DataError
from nqf.data.readers import read_json


def read_candidate_embeddings(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Reads candidate embeddings.

    Args:
      path: The JSON file; it is read whole.

    Returns:
      The item ids, and their vectors as float32 [items, width].

    Raises:
      DataError: Not such a file; a vector that is empty, of another width, or not of finite numbers. Names the item.
    """
    path = Path(path)
    tree = read_json(path, dict)
    vectors: list[np.ndarray] = []
    for item_id, values in tree.items():
        try:
            vector = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: item '{item_id}': not a list of numbers: {error}") from error
        width = len(vectors[0]) if vectors else vector.size
        if vector.shape != (width,) or not width:
            raise DataError(f"{path}: item '{item_id}': expected {width or 'some'} numbers, found {vector.shape}")
        if not np.isfinite(vector).all():
            raise DataError(f"{path}: item '{item_id}': not all numbers are finite")
        vectors.append(vector)
    if not vectors:
        raise DataError(f"{path}: there is no embedding in it")
    return list(tree), np.stack(vectors)


def catalogue_embeddings(path: str | Path, item_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Candidate embeddings in the order of a catalogue: float32 [I, width], zero where missing, and bool [I].

    Raises:
      DataError: As `read_candidate_embeddings`, or no item of the catalogue is in the file.
    """
    known, vectors = read_candidate_embeddings(path)
    row_of = {item_id: row for row, item_id in enumerate(known)}
    rows = np.array([row_of.get(item_id, -1) for item_id in item_ids], np.int64)
    if not (rows >= 0).any():
        raise DataError(f"{path}: it has '{known[0]}', but none of the catalogue's items, such as '{item_ids[0]}'")
    return np.where(rows[:, None] >= 0, vectors[rows], 0), rows >= 0


def write_candidate_embeddings(path: str | Path, item_ids: Iterable[str], vectors: np.ndarray) -> None:
    """Writes candidate embeddings, float [items, width], as the reference reads them."""
    # Row by row: as one tree of Python floats a catalogue would take thirty times the room.
    with Path(path).open("w", encoding="utf-8") as file:
        for row, (item_id, vector) in enumerate(zip(item_ids, vectors, strict=True)):
            file.write(f"{',' if row else '{'}\n{json.dumps(item_id)}: {json.dumps(vector.tolist())}")
        file.write("\n}\n")
