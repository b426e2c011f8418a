"""Items added, updated or removed after training: an overlay beside the catalogue, which stays as it was.

    items.json               what is current: files with sizes and checksums, removed ids, encoders
    rows-<hash>.parquet      canonical rows of the added and updated items
    encoded-<hash>.npz       their fields, encoded by the frozen encoders of the field cache

The trained stages read the catalogue and never the overlay, so none of them is stale afterwards. `items.json` is
replaced last: whoever opens the folder, at any moment, sees the old state or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from nqf import files
from nqf.data.catalogue import Catalogue, canonical_items
from nqf.data.errors import DataError
from nqf.data.parquet import checked
from nqf.data.schema import Schema, nearest
from nqf.fields.cache import FieldCache, encode_items
from nqf.fields.encoder import CacheError
from nqf.fields.tables import check_file, publish

FORMAT_VERSION = 1

Encoded = dict[str, tuple[np.ndarray, np.ndarray]]
"""Field name (and "_candidate") to float32 [n, width] and bool [n], as `encode_items` returns."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Overlay:
    """What differs from the catalogue.

    Attributes:
      frame: Canonical rows of added items and, in place of the catalogue's, of updated ones.
      encoded: Their encoded fields.
      removed: Ids of items that must not be recommended any longer; they stay known in histories.
    """

    frame: pl.DataFrame
    encoded: Encoded
    removed: frozenset[str]


def read_overlay(directory: Path, catalogue: Catalogue, cache: FieldCache) -> Overlay:
    """Opens the overlay; an empty one if there is none.

    If the fields stage has made other encoders since, the rows are encoded again, in memory.

    Raises:
      CacheError: Damaged files, or rows of another schema.
    """
    directory = Path(directory)
    empty = pl.scan_parquet(catalogue.path, glob=False).head(0).collect()
    path = directory / "items.json"
    if not path.is_file():
        return Overlay(frame=empty, encoded=encode_items(cache, empty), removed=frozenset())
    advice = f"delete {directory} and add the items again"
    try:
        manifest = files.read_json(path)
    except ValueError as error:
        raise CacheError(f"{error}; {advice}") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CacheError(f"{path}: format version {manifest.get('format_version')} is not known here; {advice}")
    for file in manifest["files"].values():
        check_file(directory, file, None, verify=True)
    frame = pl.read_parquet(checked(directory / manifest["files"]["rows"]["file"]), glob=False)
    if frame.schema != empty.schema:
        raise CacheError(f"{path}: the run's schema has changed since these items were added; {advice}")
    if manifest["encoders"] == _encoders(cache):
        arrays = files.read_arrays(directory / manifest["files"]["encoded"]["file"])
        encoded = {
            name: (arrays[f"values {name}"].astype(np.float32), arrays[f"present {name}"])
            for name in manifest["encoders"]
        }
    else:
        encoded = encode_items(cache, frame)
    return Overlay(frame=frame, encoded=encoded, removed=frozenset(manifest["removed"]))


def write_overlay(directory: Path, overlay: Overlay, cache: FieldCache) -> None:
    """Replaces the overlay, whole or not at all.

    Raises:
      OSError: Not writable, or the disk is full; what was there stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _write_files(directory, overlay, cache)
    except OSError as error:
        message = f"{error.strerror or error}; the items stay as they were"
        raise OSError(error.errno, message, str(directory / "items.json")) from error
    finally:
        # Also what a killed process left.
        current = (directory / "items.json").read_text(encoding="utf-8") if (directory / "items.json").exists() else ""
        for path in [*directory.glob("rows-*"), *directory.glob("encoded-*")]:
            if path.name not in current:
                path.unlink()
        for path in directory.glob("writing-*"):
            shutil.rmtree(path)


def _write_files(directory: Path, overlay: Overlay, cache: FieldCache) -> None:
    with tempfile.TemporaryDirectory(prefix="writing-", dir=directory) as temporary:
        rows, encoded = Path(temporary) / "rows", Path(temporary) / "encoded"
        with files.whole(rows) as file:
            overlay.frame.write_parquet(file)
        arrays = {}
        for name, (values, present) in overlay.encoded.items():
            arrays |= {f"values {name}": values.astype(np.float16), f"present {name}": present}
        with files.whole(encoded) as file:
            np.savez(file, **arrays)
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {
                "rows": publish(rows, directory, "rows-{hash}.parquet"),
                "encoded": publish(encoded, directory, "encoded-{hash}.npz"),
            },
            "encoders": _encoders(cache),
            "removed": sorted(overlay.removed),
        }
        files.write_text(directory / "items.json", json.dumps(manifest, indent=1))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from changing the overlay between reading and writing it."""
    with files.locked(directory, wait=True):
        yield


def add(overlay: Overlay, catalogue: Catalogue, cache: FieldCache, items: pl.DataFrame, folder: Path | str) -> Overlay:
    """Adds items that are not known, or that were removed.

    Args:
      overlay: What has changed so far.
      catalogue: The run's items.
      cache: Its field cache.
      items: item_id and the schema's columns; missing columns are missing values.
      folder: Where relative image paths start.

    Raises:
      DataError: A duplicate or known item id, a column that the schema does not name or none that it does, or a value
        that does not parse.
    """
    _check_columns(items, catalogue.schema)
    frame = canonical_items(items, catalogue.schema, folder=folder)
    known = _known(frame["item_id"], overlay, catalogue)
    if taken := [item_id for item_id in frame["item_id"] if item_id in known]:
        raise DataError(f"{len(taken)} of the new items are in the catalogue already, such as item_id '{taken[0]}'")
    return _put(overlay, cache, frame)


def update(
    overlay: Overlay, catalogue: Catalogue, cache: FieldCache, items: pl.DataFrame, folder: Path | str
) -> Overlay:
    """Replaces fields of known items; a field of which no column is given stays as it is.

    Raises:
      DataError: A duplicate or unknown item id, a column that the schema does not name or none that it does, or a
        value that does not parse.
    """
    schema = catalogue.schema
    _check_columns(items, schema)
    new = canonical_items(items, schema, folder=folder)
    _check_known(new["item_id"], overlay, catalogue)
    kept = [field.name for field in schema.fields if not set(field.columns) & set(items.columns)]
    if "title" not in [field.name for field in schema.fields] or schema.title in kept:
        kept.append("title")
    changed = overlay.frame.filter(pl.col("item_id").is_in(new["item_id"].implode()))
    others = new.filter(~pl.col("item_id").is_in(changed["item_id"].implode()))["item_id"]
    stored = pl.scan_parquet(catalogue.path, glob=False).filter(pl.col("item_id").is_in(others.implode())).collect()
    old = pl.concat([changed, stored]).select("item_id", *dict.fromkeys(kept))
    merged = new.drop(old.columns[1:]).join(old, on="item_id", how="left", maintain_order="left")
    return _put(overlay, cache, merged.select(new.columns))


def remove(overlay: Overlay, catalogue: Catalogue, item_ids: Collection[str]) -> Overlay:
    """Takes items out of all recommendations. They stay known, as histories hold them.

    Raises:
      DataError: An unknown item id.
    """
    _check_known(item_ids, overlay, catalogue)
    return dataclasses.replace(overlay, removed=overlay.removed | set(item_ids))


def unreadable(overlay: Overlay, item_ids: pl.Series) -> dict[str, int]:
    """How many values of each field are there in some items, but could not be encoded."""
    among = overlay.frame["item_id"].is_in(item_ids.implode())
    counts = {}
    for field, (_, present) in overlay.encoded.items():
        if field in overlay.frame.columns:
            there = overlay.frame[field].is_not_null() & among
            counts[field] = int((there.to_numpy() & ~present).sum())
    return {field: count for field, count in counts.items() if count}


def _put(overlay: Overlay, cache: FieldCache, frame: pl.DataFrame) -> Overlay:
    if cache.candidates is not None and cache.candidates.modality == "vector":
        raise DataError(
            "this run's candidate embeddings are those of data.candidates, which say nothing of new or changed items; "
            "add them to that file and to the item table, and run the stages again"
        )
    keep = ~overlay.frame["item_id"].is_in(frame["item_id"].implode())
    new, kept = encode_items(cache, frame), keep.to_numpy()
    encoded = {
        name: (np.concatenate([old[0][kept], new[name][0]]), np.concatenate([old[1][kept], new[name][1]]))
        for name, old in overlay.encoded.items()
    }
    return Overlay(
        frame=pl.concat([overlay.frame.filter(keep), frame]),
        encoded=encoded,
        removed=overlay.removed - set(frame["item_id"]),
    )


def _check_columns(items: pl.DataFrame, schema: Schema) -> None:
    known = [column for field in schema.fields for column in field.columns]
    unknown = [name for name in items.columns if name not in ("item_id", *known)]
    if unknown:
        raise DataError(
            f"the items have a column '{unknown[0]}' that the run does not know{nearest(unknown[0], known)}"
        )
    if not set(known) & set(items.columns):
        raise DataError(f"the items have none of the run's columns: {', '.join(known)}; nothing could be told of them")


def _known(item_ids: Iterable[str], overlay: Overlay, catalogue: Catalogue) -> set[str]:
    """Which of some items are there and were not removed."""
    there = catalogue.known_ids, set(overlay.frame["item_id"])
    return {item_id for item_id in item_ids if any(item_id in ids for ids in there)} - overlay.removed


def _check_known(item_ids: Collection[str], overlay: Overlay, catalogue: Catalogue) -> None:
    known = _known(item_ids, overlay, catalogue)
    unknown = [item_id for item_id in item_ids if item_id not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of the items are not in the catalogue or were removed, such as item_id '{unknown[0]}'; "
            "add them first"
        )


def _encoders(cache: FieldCache) -> dict[str, str]:
    """Table name to the folder of its encoder, whose name holds the hash of the fitted state."""
    folders = {
        record["field"]["name"]: record["encoder"]["folder"] for record in cache.manifest["tables"] if record["unique"]
    }
    names = [*cache.names, *(["_candidate"] if cache.candidates is not None else [])]
    return {name: folders[name] for name in names}
