"""The field cache: opened, checked and read; `nqf.fields.build` writes it.

    manifest.json                       schema, encoders, item-id hash, files with sizes and checksums
    tables/<field>-values-<hash>.npy    float16 [unique, width], each distinct readable value once
    tables/<field>-keys-<hash>.npy      uint64 [unique, 2], 128-bit keys of the raw values
    tables/<field>-rows-<hash>.npy      int32 [items], row in the values; -1 where missing
    encoders/<field>-<hash>/            the frozen encoder

Names hold the hash of the content, so a new build never touches what an open cache maps; the manifest, written
last, is the only name that is replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf import files
from nqf.config import FieldsConfig, from_tree
from nqf.data.errors import NPY_ERRORS, STRUCTURE_ERRORS
from nqf.data.schema import Field
from nqf.fields.encoder import CacheError, EncoderFactory, FieldEncoder, LightEncoder
from nqf.fields.hashing import present_values
from nqf.fields.registry import load_encoder
from nqf.fields.tables import FieldTable, check_file, inside, open_table

FORMAT = "nqf-fields"
FORMAT_VERSION = 1
# Tables that are no field: the candidate text of an item, and the reviews of the interactions.
CANDIDATE = "_candidate"
REVIEW = "_review"


class FieldCache:
    """An opened cache; arrays are memory-mapped.

    Attributes:
      directory: Folder of the cache.
      manifest: The whole manifest.
      names: Fields with at least one encoded value, in schema order.
      modalities: Field name to modality.
      widths: Field name to the width of its vectors.
      items: Number of items.
      warnings: What the build had to say: absent fields, unreadable values.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], factories: Mapping[str, EncoderFactory] | None):
        self.directory = directory
        self.manifest = manifest
        self._factories = factories
        self._records = {record["field"]["name"]: record for record in manifest["tables"]}
        present = {name: record for name, record in self._records.items() if record["unique"]}
        self.names = tuple(name for name in present if name not in (CANDIDATE, REVIEW))
        self.modalities = {name: present[name]["field"]["modality"] for name in self.names}
        self.widths = {name: present[name]["width"] for name in self.names}
        self.items: int = manifest["items"]
        self.warnings = tuple(manifest["warnings"])
        self._tables = {
            name: open_table(
                directory / record["files"]["values"]["file"],
                directory / record["files"]["rows"]["file"],
                record["field"]["modality"],
            )
            for name, record in present.items()
        }
        self._encoders: dict[str, FieldEncoder] = {}

    def table(self, name: str) -> FieldTable:
        """The table of a field.

        Raises:
          CacheError: The field is unknown, or no item has a value of it.
        """
        if name not in self._tables:
            reason = "no item has a readable value of it" if name in self._records else "not a field of the schema"
            raise CacheError(f"{self.directory}: no table '{name}': {reason}; tables: {', '.join(self._tables)}")
        return self._tables[name]

    def gather(self, name: str, item_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of some items: float32 [n, width], zero where missing, and bool [n], True where present."""
        return self.table(name).gather(item_rows)

    @property
    def candidates(self) -> FieldTable | None:
        """Embeddings of the items' candidate texts, or given ones; None if no item has any."""
        return self._tables.get(CANDIDATE)

    @property
    def reviews(self) -> FieldTable | None:
        """Embeddings of the interactions' reviews, a row per event; None without reviews."""
        return self._tables.get(REVIEW)

    def encoder(self, name: str) -> FieldEncoder:
        """The frozen encoder of a table, loaded at the first call.

        Raises:
          CacheError: The encoder is damaged, or a pretrained one whose factory was not passed to `open_cache`.
        """
        if name not in self._encoders:
            self.table(name)
            record = self._records[name]
            where = f"{self.directory / 'manifest.json'}: altered: "
            field = from_tree(Field, record["field"], where=where)
            config = from_tree(FieldsConfig, self.manifest["config"], where=where)
            folder = self.directory / record["encoder"]["folder"]
            self._encoders[name] = load_encoder(folder, field, config, self._factories)
        return self._encoders[name]

    def __reduce__(self) -> tuple:
        return open_cache, (self.directory,)


def open_cache(
    directory: str | Path,
    *,
    item_ids: Sequence[str] | None = None,
    verify: bool = False,
    factories: Mapping[str, EncoderFactory] | None = None,
) -> FieldCache:
    """Opens a cache after checking it.

    Args:
      directory: Folder that `build` wrote.
      item_ids: Ids of the catalogue that the cache must belong to, in its order.
      verify: Read all files and compare their checksums, not only sizes, headers and the manifest's own hash.
      factories: Modality to the factory of a pretrained encoder; needed only to encode new items.

    Raises:
      CacheError: The cache is missing, truncated, altered, of another format version or of another catalogue.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / "manifest.json")
    if item_ids is not None:
        if len(item_ids) != manifest["items"]:
            raise CacheError(
                f"{directory}: of another catalogue: {manifest['items']} items, this one has {len(item_ids)}; "
                "run the fields stage again"
            )
        if hash_ids(item_ids) != manifest["item_ids_sha256"]:
            raise CacheError(
                f"{directory}: of another catalogue: as many items, but other ids or another order; "
                "run the fields stage again"
            )
    try:
        _check_files(directory, manifest, verify)
        return FieldCache(directory, manifest, factories)
    except (*STRUCTURE_ERRORS, *NPY_ERRORS) as error:
        if isinstance(error, CacheError):
            raise
        # Its own checksum is right, so it was made by something else than this program.
        reason = f"{type(error).__name__}: {error}"
        raise CacheError(
            f"{directory / 'manifest.json'}: altered, not a manifest that can be used ({reason}); delete the cache"
        ) from error


def _check_files(directory: Path, manifest: dict[str, Any], verify: bool) -> None:
    for record in manifest["tables"]:
        if not record["unique"]:
            continue
        shapes = {
            "values": (record["unique"], record["width"]),
            "keys": (record["unique"], 2),
            "rows": (record["count"],),
        }
        for part, file in record["files"].items():
            check_file(directory, file, shapes[part], verify=verify)
        for file in record["encoder"]["files"]:
            check_file(directory, file, None, verify=verify)
        inside(directory, record["encoder"]["folder"])
        if verify:
            rows = np.load(directory / record["files"]["rows"]["file"], mmap_mode="r")
            if rows.dtype.kind != "i" or (rows.size and not -1 <= rows.min() <= rows.max() < record["unique"]):
                raise CacheError(
                    f"{directory}: altered, rows of '{record['field']['name']}' are outside; delete the cache"
                )


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CacheError(f"{path}: no field cache here; run the fields stage")
    try:
        manifest = files.read_json(path)
    except ValueError as error:
        raise CacheError(
            f"{error}; truncated or altered, not the manifest of a field cache; delete the cache"
        ) from error
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{path}: not the manifest of a field cache")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"{path}: format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}; "
            "run the fields stage again"
        )
    if manifest.get("sha256") != manifest_hash(manifest):
        raise CacheError(f"{path}: altered, its own checksum differs; delete the cache and run the fields stage again")
    return manifest


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hash_ids(item_ids: Iterable[str]) -> str:
    """SHA-256 of item ids in their order."""
    digest = hashlib.sha256()
    for item_id in item_ids:
        # The length keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(f"{len(item_id)}:{item_id}".encode())
    return digest.hexdigest()


def candidate_fields(fields: Sequence[Field]) -> tuple[Field, ...]:
    """The fields that the candidate text is made of."""
    return tuple(field for field in fields if field.modality in ("text", "category"))


def candidate_text(frame: pl.DataFrame, fields: Sequence[Field], title: str | None) -> pl.Series:
    """One document per item: the title, then "name: value" lines of its other texts and categories.

    Args:
      frame: Canonical columns of the fields.
      fields: Fields of the schema; other modalities are passed over.
      title: Name of the field that is the title, if any.

    Returns:
      String series; null where an item has none of the values.
    """
    lines = []
    for field in sorted(candidate_fields(fields), key=lambda field: field.name != title):
        value = pl.col(field.name)
        if field.modality == "category":
            value = pl.when(value.list.len() > 0).then(value.list.join(", "))
        lines.append(value if field.name == title else pl.lit(f"{field.name}: ") + value)
    if not lines:
        return pl.Series(CANDIDATE, [None] * len(frame), dtype=pl.String)
    text = pl.concat_str(lines, separator="\n", ignore_nulls=True)
    return frame.select(pl.when(text != "").then(text).alias(CANDIDATE)).to_series()


def encode_items(cache: FieldCache, frame: pl.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encodes items that are not in the cache with its frozen encoders; nothing is written.

    Args:
      cache: Opened with the factories of its pretrained encoders, if it has any.
      frame: Canonical columns, named as the fields; a column that is not there is missing in every item.

    Returns:
      Field name (and "_candidate", if the cache has candidates) to float32 [n, width], zero where missing, and
      bool [n]. The vectors are rounded to float16 as the cache's are.
    """
    fields = [from_tree(Field, field) for field in cache.manifest["fields"]]
    frame = frame.with_columns(
        pl.lit(None, dtype=pl.List(pl.String) if field.modality == "category" else pl.String).alias(field.name)
        for field in fields
        if field.name not in frame.columns
    )
    columns = {name: frame[name] for name in cache.names}
    if cache.candidates is not None:
        columns[CANDIDATE] = candidate_text(frame, fields, cache.manifest["title"])
        if cache.candidates.modality == "vector":
            # They came from a file, which says nothing of new items; `nqf.serving.overlay` refuses those.
            columns[CANDIDATE] = pl.Series(CANDIDATE, [None] * len(frame), dtype=pl.List(pl.Float32))
    encoded = {}
    for name, column in columns.items():
        table = cache.table(name)
        present = present_values(column, table.modality).to_numpy().copy()
        vectors = np.zeros((len(frame), table.values.shape[1]), np.float32)
        if present.any():
            found, ok = encode_column(cache.encoder(name), column.filter(present))
            vectors[present] = np.where(ok[:, None], found, 0)
            present[present] = ok
        encoded[name] = vectors, present
    return encoded


def encode_column(encoder: FieldEncoder, values: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Encodes present values, float16 [n, width] and bool [n]; a vector that float16 cannot hold is unreadable."""
    # Pretrained encoders take plain lists; the light ones work on columns.
    vectors, ok = encoder.encode(values if isinstance(encoder, LightEncoder) else values.to_list())
    # Beyond 65,504 the rounding overflows, which the check of the result finds.
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    return halves, ok & np.isfinite(halves).all(axis=1)
