"""Writes the field cache in bounded memory, encoding only values that the cache does not hold yet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nqf import files
from nqf.config import FieldsConfig, to_tree
from nqf.data.catalogue import Catalogue
from nqf.data.schema import Field
from nqf.fields.cache import (
    CANDIDATE,
    FORMAT,
    FORMAT_VERSION,
    REVIEW,
    FieldCache,
    candidate_fields,
    candidate_text,
    encode_column,
    hash_ids,
    manifest_hash,
    open_cache,
)
from nqf.fields.encoder import CacheError, EncoderFactory, FieldEncoder
from nqf.fields.hashing import KEY_WORDS, group_keys, sample_rows, value_keys
from nqf.fields.parts import make_all, make_free, opened, parts_folder, read_part, remove_parts
from nqf.fields.registry import light_encoder, load_encoder, make_encoder
from nqf.fields.tables import TableWriter, publish, slug

# Called with the table's name, the items done and all items.
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A column of raw values that can be read again and again.

    Attributes:
      field: The field, or one made up for candidates and reviews.
      count: Number of values, missing ones included.
      chunks: Reads the canonical column in order.
      fitted: bool [count], the values that an encoder may be fitted on; None for all.
    """

    field: Field
    count: int
    chunks: Callable[[], Iterator[pl.Series]]
    fitted: np.ndarray | None = None

    def pick(self, rows: np.ndarray) -> Iterator[tuple[int, pl.Series]]:
        """The values of some rows, ascending, in chunks, each with the number of rows that were read so far."""
        start = done = 0
        for chunk in self.chunks():
            end = start + len(chunk)
            upto = int(np.searchsorted(rows, end))
            if upto > done:
                yield end, chunk.gather(rows[done:upto] - start)
            start, done = end, upto
            if done == len(rows):
                return


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Values:
    """The distinct values of a source, and which of them an earlier table holds.

    Attributes:
      present: int64 [n], rows of the source that have a value.
      keys: uint64 [n, 2], their keys.
      group: int64 [n], the distinct value of each.
      first: int64 [groups], where each distinct value comes first in the earlier table's keys followed by `keys`.
      known: bool [groups], those of the earlier table, which are encoded already.
      kept: int64 [k], rows of the earlier table whose values the source still has.
      new: int64 [m], the first in `keys` of each that is not known.
    """

    present: np.ndarray
    keys: np.ndarray
    group: np.ndarray
    first: np.ndarray
    known: np.ndarray
    kept: np.ndarray
    new: np.ndarray


def build(
    catalogue: Catalogue,
    directory: str | Path,
    config: FieldsConfig,
    *,
    factories: Mapping[str, EncoderFactory] | None = None,
    reviews: Sequence[str | None] | None = None,
    trained: np.ndarray | None = None,
    candidates: pl.Series | None = None,
    progress: Progress | None = None,
) -> FieldCache:
    """Writes or brings up to date the cache of a catalogue.

    A value is encoded once, whoever holds it. What an earlier build in `directory` encoded is kept where the
    field's options and encoder settings are the same; then its fitted encoder is kept too, also if the items
    changed, so that old vectors stay comparable with new ones. Delete the folder to fit again. Values that no item
    holds any longer are dropped; unreadable ones are tried again in every build.

    What a pretrained encoder has to encode takes hours where there is much of it, so it is encoded as parts in
    `directory`: a build that was killed is resumed from its parts, and `assist` makes some of them in other processes.
    Light encoders take seconds and are fitted first, so they encode here alone.

    Args:
      catalogue: The items.
      directory: Folder of the cache; made if missing. Until the new manifest replaces the old one, whoever
        opens the cache sees the old one.
      config: Encoders, sizes and rows per chunk.
      factories: Modality to the factory of a pretrained encoder.
      reviews: Review text of every interaction, in their order.
      trained: bool [interactions], the training events: a light encoder of reviews is fitted on theirs alone. Without
        it, on all.
      candidates: List(Float32), a vector of every item, null for none, in place of the embeddings of the items' texts.
      progress: Called after each chunk.

    Raises:
      CacheError: A folder of parts holds what nqf did not write, or was deleted meanwhile.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    previous, warnings = _previous(directory)
    with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as temporary:
        builder = _Builder(
            directory=directory,
            temporary=Path(temporary),
            config=config,
            factories=factories or {},
            progress=progress or _silent,
        )
        sources = _sources(catalogue, config.chunk_rows, reviews, trained, candidates)
        records = [builder.build(source, previous) for source in sources]
        warnings += [line for record in records for line in _warn(record)]
        schema = catalogue.schema
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fields": [to_tree(field) for field in schema.fields],
            "title": schema.title,
            "config": to_tree(config),
            "items": len(catalogue),
            "item_ids_sha256": hash_ids(catalogue.item_ids),
            "normalization": "an average readable value has about unit norm; float16",
            "tables": records,
            "warnings": warnings,
        }
        manifest["sha256"] = manifest_hash(manifest)
        files.write_text(directory / "manifest.json", json.dumps(manifest, indent=1))
    _remove_unused(directory, records)
    return open_cache(directory, item_ids=catalogue.item_ids, factories=factories)


def assist(
    catalogue: Catalogue,
    directory: str | Path,
    config: FieldsConfig,
    *,
    factories: Mapping[str, EncoderFactory],
    reviews: Sequence[str | None] | None = None,
) -> Iterator[str]:
    """Makes parts of the tables that a `build` in another process has begun, with the same arguments.

    It writes nothing else, and nothing where no build has opened a folder for what its arguments name.

    Args:
      catalogue: The items.
      directory: Folder of the cache.
      config: Encoders, sizes and rows per chunk.
      factories: Modality to the factory of a pretrained encoder.
      reviews: Review text of every interaction, in their order.

    Yields:
      What was made, in words.
    """
    directory = Path(directory)
    previous, _ = _previous(directory)
    for source in _sources(catalogue, config.chunk_rows, reviews, None, None):
        field = source.field
        if field.modality not in factories or not opened(directory, field.name):
            continue
        encoder = factories[field.modality](field, config)
        recipe = _recipe(source, encoder, config)
        values = _find_values(source, _reusable(previous, field.name, recipe), directory)
        parts = _parts_of(source, values, recipe, directory, config)
        if parts is not None and parts in opened(directory, field.name):
            for part in make_free(parts, encoder, _unchanged(source, values)):
                if part.made:
                    yield f"wrote {part.path}"


def _unchanged(source: _Source, values: _Values) -> Iterator[tuple[int, pl.Series]]:
    """The new values, until one has another key: who builds was ended, and has written other tables since."""
    start, keys = 0, values.keys[values.new]
    for done, chunk in source.pick(values.present[values.new]):
        expected = keys[start : start + len(chunk)]
        if not np.array_equal(value_keys(chunk, source.field.modality)[1], expected):
            return
        yield done, chunk
        start += len(chunk)


def _previous(directory: Path) -> tuple[FieldCache | None, list[str]]:
    """The earlier cache in a folder, or None and, if it cannot be used, why."""
    if not (directory / "manifest.json").is_file():
        return None, []
    try:
        return open_cache(directory, verify=True), []
    except CacheError as error:
        return None, [f"everything was encoded again, as the earlier cache could not be used: {error}"]


def _silent(name: str, done: int, total: int) -> None:
    pass


def _sources(
    catalogue: Catalogue,
    rows: int,
    reviews: Sequence[str | None] | None,
    trained: np.ndarray | None,
    candidates: pl.Series | None,
) -> Iterator[_Source]:
    fields, items = catalogue.schema.fields, len(catalogue)
    for field in fields:
        yield _Source(
            field=field,
            count=items,
            chunks=lambda name=field.name: (frame[name] for frame in catalogue.chunks([name], rows)),
        )
    names = [field.name for field in candidate_fields(fields)]
    if candidates is not None:
        yield _Source(
            field=Field(name=CANDIDATE, modality="vector", columns=("data.candidates",)),
            count=items,
            chunks=lambda: (candidates[start : start + rows] for start in range(0, items, rows)),
        )
    elif names:
        yield _Source(
            field=Field(name=CANDIDATE, modality="text", columns=tuple(names)),
            count=items,
            chunks=lambda: (
                candidate_text(frame, fields, catalogue.schema.title) for frame in catalogue.chunks(names, rows)
            ),
        )
    if reviews is not None:
        yield _Source(
            field=Field(name=REVIEW, modality="text", columns=("review",)),
            count=len(reviews),
            chunks=lambda: (
                pl.Series(REVIEW, reviews[start : start + rows], dtype=pl.String)
                for start in range(0, len(reviews), rows)
            ),
            fitted=trained,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Builder:
    """Builds one table after another.

    Attributes:
      directory: Folder of the cache.
      temporary: Folder for unfinished files, on the same file system.
      config: The fields configuration.
      factories: Modality to the factory of a pretrained encoder.
      progress: Called after each chunk.
    """

    directory: Path
    temporary: Path
    config: FieldsConfig
    factories: Mapping[str, EncoderFactory]
    progress: Progress

    def build(self, source: _Source, previous: FieldCache | None) -> dict[str, Any]:
        """Writes the files of a table and returns its manifest record."""
        field = source.field
        pretrained = self.factories[field.modality](field, self.config) if field.modality in self.factories else None
        recipe = _recipe(source, pretrained, self.config)
        old = _reusable(previous, field.name, recipe)
        values = _find_values(source, old, self.directory)

        encoder = pretrained
        if encoder is None and old:
            encoder = load_encoder(self.directory / old["encoder"]["folder"], field, self.config)
        elif encoder is None:
            # Without an earlier table all values are new.
            encoder = make_encoder(field, self.config, _sample(source, values, self.config.fit_sample))

        record = {"field": to_tree(field), "recipe": recipe, "count": source.count}
        index = np.full(len(values.first), -1, np.int64)
        index[np.isin(values.first, values.kept)] = np.arange(len(values.kept))
        tables = old["files"] if old else {}
        if len(values.new) or not old or len(values.kept) < old["unique"]:
            # A light encoder takes seconds, and may not be what another process has fitted.
            parts = _parts_of(source, values, recipe, self.directory, self.config) if pretrained else None
            ok, tables = self._write_values(source, encoder, old, values, parts)
            index[np.flatnonzero(~values.known)[ok]] = len(values.kept) + np.arange(np.sum(ok))
        present, item_index = values.present, index[values.group]
        record["unique"] = int(index.max(initial=-1)) + 1
        record["missing"] = source.count - len(present)
        record["unreadable"] = int(np.sum(item_index < 0))
        if field.modality == "image" and pretrained is None and record["unreadable"]:
            record["links"] = sum(int(chunk.str.contains("^https?://").sum()) for chunk in source.chunks())
        if record["unique"]:
            rows = np.full(source.count, -1, np.int32)
            rows[present] = item_index
            path = self.temporary / "rows.npy"
            np.save(path, rows)
            record["width"] = encoder.width
            record["files"] = {
                "values": tables["values"],
                "keys": tables["keys"],
                "rows": publish(path, self.directory, f"tables/{slug(field.name)}-rows-{{hash}}.npy"),
            }
            record["encoder"] = old["encoder"] if old else self._save_encoder(encoder, field.name)
        self.progress(field.name, source.count, source.count)
        return record

    def _write_values(
        self,
        source: _Source,
        encoder: FieldEncoder,
        old: dict[str, Any] | None,
        found: _Values,
        parts: Path | None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Writes kept and new values with their keys; returns which new ones could be read, and the files."""
        name, kept, keys = source.field.name, found.kept, found.keys[found.new]
        encoded = self._encode(source, encoder, found, parts)
        value_path, key_path = self.temporary / "values.npy", self.temporary / "keys.npy"
        values = TableWriter(value_path, np.float16, encoder.width)
        kept_keys = TableWriter(key_path, np.uint64, KEY_WORDS)
        if old:
            for part, writer in (("values", values), ("keys", kept_keys)):
                table = np.load(self.directory / old["files"][part]["file"], mmap_mode="r")
                for start in range(0, len(kept), self.config.chunk_rows):
                    writer.append(table[kept[start : start + self.config.chunk_rows]])
        readable = []
        for vectors, ok in encoded:
            values.append(vectors[ok])
            readable.append(ok)
        ok = np.concatenate([np.zeros(0, bool), *readable])
        kept_keys.append(keys[ok])
        values.close()
        kept_keys.close()
        return ok, {
            "values": publish(value_path, self.directory, f"tables/{slug(name)}-values-{{hash}}.npy"),
            "keys": publish(key_path, self.directory, f"tables/{slug(name)}-keys-{{hash}}.npy"),
        }

    def _encode(
        self, source: _Source, encoder: FieldEncoder, found: _Values, parts: Path | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encodes the new values chunk by chunk, as parts if there is a folder for them."""
        rows, progress = found.present[found.new], lambda done: self.progress(source.field.name, done, source.count)
        if parts is not None:
            made = make_all(parts, encoder, lambda: source.pick(rows), progress)
            if sum(part.size for part in made) < len(rows):
                raise CacheError(f"{parts}: deleted while it was in use; run the same again")
            for part in made:
                yield read_part(part.path, part.size, encoder.width)
            return
        for done, chunk in source.pick(rows):
            yield encode_column(encoder, chunk)
            progress(done)

    def _save_encoder(self, encoder: FieldEncoder, name: str) -> dict[str, Any]:
        folder = self.temporary / "encoder"
        folder.mkdir()
        encoder.save(folder)
        paths = sorted(folder.iterdir())
        content = hashlib.sha256("".join(files.sha256(path) for path in paths).encode()).hexdigest()
        target = f"encoders/{slug(name)}-{content[:16]}"
        written = [publish(path, self.directory, f"{target}/{path.name}") for path in paths]
        folder.rmdir()
        return {"folder": target, "identity": encoder.identity, "files": written}


def _recipe(source: _Source, pretrained: FieldEncoder | None, config: FieldsConfig) -> dict[str, Any]:
    """What the vectors of a table depend on beside its values, as it reads in the manifest, where tuples are lists."""
    if pretrained is not None:
        return json.loads(json.dumps({"pretrained": pretrained.identity}))
    light = light_encoder(source.field.modality)
    settings = light.settings(source.field, config)
    # The columns belong to it: a fit on other columns' values is another fit.
    recipe = {"kind": light.kind, "version": light.version, "columns": list(source.field.columns), **settings}
    if source.fitted is not None:
        recipe["fitted"] = hashlib.sha256(np.packbits(source.fitted).tobytes()).hexdigest()
    return json.loads(json.dumps(recipe))


def _find_values(source: _Source, old: dict[str, Any] | None, directory: Path) -> _Values:
    """Reads the keys of a source and compares them with those of an earlier table."""
    old_keys = np.zeros((0, KEY_WORDS), np.uint64)
    if old:
        old_keys = np.load(directory / old["files"]["keys"]["file"])
    present, keys = _read_keys(source)
    first, group = group_keys(np.concatenate([old_keys, keys]))
    group = group[len(old_keys) :]
    # Old keys come first, so a group that holds one starts with it, and its value is encoded already.
    known = first < len(old_keys)
    used = np.zeros(len(first), bool)
    used[group] = True
    return _Values(
        present=present,
        keys=keys,
        group=group,
        first=first,
        known=known,
        kept=first[known & used],
        new=first[~known] - len(old_keys),
    )


def _sample(source: _Source, values: _Values, size: int) -> Callable[[], Iterator[pl.Series]]:
    """Reads the distinct values that a light encoder is fitted on."""
    present, keys = values.present, values.keys
    fit = np.arange(len(present)) if source.fitted is None else np.flatnonzero(source.fitted[present])
    sample = present[fit[sample_rows(keys[fit], group_keys(keys[fit])[0], size)]]
    return lambda: (chunk for _, chunk in source.pick(sample))


def _parts_of(
    source: _Source, values: _Values, recipe: dict[str, Any], directory: Path, config: FieldsConfig
) -> Path | None:
    """The folder of the parts of a source's new values; None if there are none."""
    if not len(values.new):
        return None
    whole = {"recipe": recipe, "chunk_rows": config.chunk_rows}
    return parts_folder(directory, source.field.name, whole, values.present[values.new], values.keys[values.new])


def _read_keys(source: _Source) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the present values, int64 [n] ascending, and their keys, uint64 [n, 2]."""
    rows, keys, start = [np.zeros(0, np.int64)], [np.zeros((0, KEY_WORDS), np.uint64)], 0
    for chunk in source.chunks():
        present, found = value_keys(chunk, source.field.modality)
        rows.append(start + np.flatnonzero(present))
        keys.append(found)
        start += len(chunk)
    return np.concatenate(rows), np.concatenate(keys)


def _reusable(previous: FieldCache | None, name: str, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The earlier record of a table, if it holds values that the same recipe made."""
    records = previous.manifest["tables"] if previous else ()
    for record in records:
        if record["field"]["name"] == name and record["recipe"] == recipe and record["unique"]:
            return record
    return None


def _warn(record: dict[str, Any]) -> Iterator[str]:
    name, modality = record["field"]["name"], record["field"]["modality"]
    links = record.get("links", 0)
    if links:
        yield (
            f"field '{name}': {links} of {record['count'] - record['missing']} pictures are links, which only a CLIP "
            "model reads, and count as missing; set fields.image_encoder to one (its folder or hub name, such as "
            f"openai/clip-vit-base-patch32), or leave the field out by data.without: [{name}]"
        )
    if record["unreadable"] > links:
        yield f"field '{name}': {record['unreadable'] - links} {modality} values could not be read and count as missing"
    if not record["unique"] and not links and name not in (CANDIDATE, REVIEW):
        yield f"field '{name}' is absent from every item and is left out; remove it from the schema or fix its column"


def _remove_unused(directory: Path, records: Sequence[dict[str, Any]]) -> None:
    """Deletes what the manifest does not name: older tables, parts, and what a killed build left."""
    remove_parts(directory)
    named = {
        file["file"]
        for record in records
        if record["unique"]
        for file in (*record["files"].values(), *record["encoder"]["files"])
    }
    for folder in ("tables", "encoders"):
        for path in sorted((directory / folder).rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(directory).as_posix() not in named:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    for path in directory.glob("building-*"):
        shutil.rmtree(path, ignore_errors=True)
