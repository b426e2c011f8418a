"""From tables to a prepared data folder, and back: `items.parquet, interactions.parquet, split.npz, report.json`.

The files `events-*` have the interactions once more, as arrays that are mapped into memory.

Users with fewer than `data.min_interactions` events are in `short.parquet`, which serving alone reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import yaml

from nqf import files
from nqf.config import DATA_PATHS, ColumnsConfig, DataConfig
from nqf.data import addresses, amazon, recbole, splits, synthetic, unirec
from nqf.data.catalogue import (
    BAD,
    Catalogue,
    canonical,
    check_item_ids,
    missing_ids,
    plain_ids,
    resolve,
    vector_lengths,
)
from nqf.data.columns import CANONICAL, identify, identify_interactions
from nqf.data.errors import NPY_ERRORS, STRUCTURE_ERRORS, DataError
from nqf.data.events import write_interactions
from nqf.data.interactions import SHORT, TABLE, Interactions, load_interactions, open_interactions
from nqf.data.readers import Columns, Table, open_table
from nqf.data.schema import Field, Schema, load_schema, schema_to_tree

T = TypeVar("T")

_INTERACTION_COLUMNS = {"user_id": None, "item_id": None, "timestamp": None, "rating": None, "review": None}
# The candidates' embeddings are read with the fields.
_READ = tuple(key for key in DATA_PATHS if key != "candidates")
# Rows that a reader of the canonical file decodes at least.
_ROW_GROUP = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Prepared data.

    Attributes:
      catalogue: The items.
      interactions: Interactions with items of the catalogue.
      split: Training events, validation and test cases.
      report: What was read, dropped and warned about (JSON-able).
    """

    catalogue: Catalogue
    interactions: Interactions
    split: splits.Split
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tables:
    """Source tables, not yet read.

    Attributes:
      items: Column item_id and the columns of the schema.
      interactions: The interaction columns.
      schema: All fields, those known only after the fact included.
      folder: Where relative image paths start; text of an item table at an address.
      items_path: Named in errors.
      interactions_path: Named in errors.
      notes: What was guessed and what is not used, in words.
    """

    items: pl.LazyFrame
    interactions: pl.LazyFrame
    schema: Schema
    folder: Path | str
    items_path: Path
    interactions_path: Path
    notes: list[str]


def prepare(config: DataConfig, directory: Path) -> Dataset:
    """Reads, checks and splits the tables of a configuration and writes them in canonical form.

    Args:
      config: Sources and options.
      directory: Folder to write; what it held is replaced, once everything has been written.

    Raises:
      DataError: Tables, schema or options that cannot be used, or an address that cannot be read.
    """
    directory = Path(os.path.abspath(directory))
    building = directory.with_name(f".{directory.name}-preparing")
    shutil.rmtree(building, ignore_errors=True)
    scratch, target = building / "scratch", building / "data"
    scratch.mkdir(parents=True)
    target.mkdir()
    # Made by nqf, or copied into the scratch folder where they are at addresses.
    given = {key: getattr(config, key) for key in _READ} if config.format != "synthetic" else {}
    try:
        with addresses.local(given, scratch, config.format) as (paths, told):
            _write(dataclasses.replace(config, **paths), target, scratch, directory, told)
        if directory.exists():
            files.publish(directory, building / "replaced")
        files.publish(target, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_dataset(directory)


def open_dataset(directory: Path) -> Dataset:
    """Opens what `prepare` wrote.

    Raises:
      DataError: A file is missing, or the files do not belong together.
    """
    directory = Path(directory)
    for name in ("items.parquet", "interactions.parquet", "split.npz", "schema.yaml", "report.json"):
        if not (directory / name).is_file():
            raise DataError(f"{directory / name}: no such file; run python -m nqf.train --stage fields first")
    schema = load_schema(directory / "schema.yaml")
    dataset = Dataset(
        catalogue=_read(directory / "items.parquet", lambda path: Catalogue(path, schema)),
        interactions=_read(directory / TABLE, lambda path: open_interactions(path.parent)),
        split=_read(directory / "split.npz", splits.load_split),
        report=_read(directory / "report.json", lambda path: json.loads(path.read_text(encoding="utf-8"))),
    )
    sizes = (len(dataset.split.cold), len(dataset.split.train))
    if sizes != (len(dataset.catalogue), len(dataset.interactions.items)):
        raise DataError(f"{directory}: split.npz is of other tables; run python -m nqf.train --stage fields again")
    return dataset


def open_short_users(directory: Path) -> Interactions | None:
    """Users with too few events to be trained on; None if there are none, or the folder is of before version 0.2.

    Raises:
      DataError: The file is not readable.
    """
    path = Path(directory) / SHORT
    return _read(path, load_interactions) if path.is_file() else None


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (pl.exceptions.PolarsError, *NPY_ERRORS, *STRUCTURE_ERRORS) as error:
        raise DataError(
            f"{path}: not readable ({type(error).__name__}: {error}); run python -m nqf.train --stage fields again"
        ) from error


def _write(config: DataConfig, target: Path, scratch: Path, final: Path, told: Callable[[str], str]) -> None:
    tables = _open_tables(config, target, scratch, final, told)
    known = [field.name for field in tables.schema.fields]
    if unknown := set(config.without) - set(known):
        raise DataError(f"data.without: no field {', '.join(sorted(unknown))}; the schema has {', '.join(known)}")
    left_out = [
        field.name
        for field in tables.schema.fields
        if field.name in config.without or (field.after_the_fact and not config.use_after_the_fact)
    ]
    fields = tuple(field for field in tables.schema.fields if field.name not in left_out)
    if not fields:
        raise DataError(
            "no field is left: all are marked after_the_fact or named by data.without; see data.use_after_the_fact"
        )
    title = tables.schema.title if tables.schema.title not in left_out else None
    schema = Schema(fields=fields, title=title, missing_words=config.missing_words)
    item_ids, schema, item_report = _write_items(tables, schema, config, target, scratch)
    interactions, event_report = write_interactions(
        tables.interactions,
        item_ids,
        config,
        folder=target,
        scratch=scratch,
        where=(str(tables.interactions_path), str(tables.items_path)),
    )
    options = {"items": len(item_ids), "cold_share": config.cold_share, "refit": config.refit, "seed": config.seed}
    if config.split == "temporal":
        options |= {"valid_share": config.valid_share, "test_share": config.test_share}
        split = splits.temporal(interactions, **options)
    elif config.split == "samples":
        split = _sample_split(interactions, item_ids, config, tables, options)
    else:
        split = splits.leave_one_out(interactions, **options)
    warnings = [*tables.notes, *item_report.pop("warnings"), *event_report.pop("warnings")]
    split = dataclasses.replace(split, warnings=(*map(told, warnings), *split.warnings))
    report = {
        "format": config.format,
        "items": item_report,
        "interactions": event_report,
        "tied_share": interactions.tied_share,
        "ties": "shuffled" if config.shuffle_ties else "as in the source",
        "fields_left_out": left_out,
        "training_interactions": int(split.train.sum()),
        "validation_cases": len(split.valid.users),
        "test_cases": len(split.test.users),
        "cold_items": int(split.cold.sum()),
        "warnings": list(split.warnings),
    }
    split.save(target / "split.npz")
    (target / "schema.yaml").write_text(yaml.safe_dump(schema_to_tree(schema), sort_keys=False), encoding="utf-8")
    (target / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _sample_split(
    interactions: Interactions, item_ids: pl.Series, config: DataConfig, tables: _Tables, options: dict[str, Any]
) -> splits.Split:
    """The split that UniRec's two sample files are; samples that are not found in the interactions are told."""
    train, rows = tables.interactions_path, dict(zip(item_ids, range(len(item_ids)), strict=True))
    if (test := unirec.test_file(train)) == train:
        raise DataError(
            f"{train}: data.split: samples needs a test file beside it, of the same name with '_test' in place of "
            "'_train'; add it, or choose another split"
        )
    found = [unirec.find_samples(path, interactions, rows) for path in (train, test)]
    for path, samples in zip((train, test), found, strict=True):
        if samples.missing:
            tables.notes.append(
                f"{path}: {samples.missing} samples are left out: their target or user is unknown, or the times of "
                "their interactions contradict their order"
            )
    return splits.of_samples(interactions, *found, valid_share=config.valid_share, **options)


def _open_tables(config: DataConfig, target: Path, scratch: Path, final: Path, told: Callable[[str], str]) -> _Tables:
    if config.format == "synthetic":
        source = target / "source"
        source.mkdir()
        synthetic.generate(config.synthetic, config.seed, source)
        items, interactions, schema_path = (
            source / name for name in ("items.parquet", "interactions.parquet", "schema.yaml")
        )
        # The folder is renamed when it is complete.
        folder = final / "source"
    else:
        items, interactions, schema_path = (Path(getattr(config, key)) for key in ("items", "interactions", "schema"))
        folder = addresses.beside(items, told)
    schema = load_schema(schema_path)
    columns: Columns = {"item_id": None} | {column: field for field in schema.fields for column in field.columns}
    events: Columns = _INTERACTION_COLUMNS
    notes: list[str] = []
    if config.format in ("amazon-2023", "unirec") and config.columns != ColumnsConfig():
        raise DataError(f"data.columns: format '{config.format}' has columns of its own; remove it")
    if config.format == "amazon-2023":
        item_table = amazon.read_items(items, scratch, columns, config.items_dialect)
        event_table = amazon.read_reviews(interactions, scratch, events, config.interactions_dialect)
    elif config.format == "unirec":
        item_table = unirec.read_items(items, scratch, columns)
        inter = None
        if config.inter:
            table = recbole.open_interactions(Path(config.inter), config.interactions_dialect, config.columns)
            inter = _read_event_table(table, config, scratch, notes)
        event_table = unirec.read_interactions(
            interactions,
            scratch,
            events,
            inter=inter,
            reviews=Path(config.reviews) if config.reviews else None,
            notes=notes,
        )
    else:
        kind = ".item" if config.format == "recbole" else None
        item_table = _read_item_table(open_table(items, config.items_dialect, kind), columns, config, scratch, notes)
        if config.format == "recbole":
            table = recbole.open_interactions(interactions, config.interactions_dialect, config.columns)
        else:
            table = open_table(interactions, config.interactions_dialect)
        event_table = _read_event_table(table, config, scratch, notes)
    return _Tables(
        items=item_table,
        interactions=event_table,
        schema=schema,
        folder=folder,
        items_path=items,
        interactions_path=interactions,
        notes=notes,
    )


def _read_item_table(
    table: Table, columns: Columns, config: DataConfig, scratch: Path, notes: list[str]
) -> pl.LazyFrame:
    found, guessed = identify(table.path, table.names, ("id",), config.columns)
    source = found["id"]
    fields = {name: field for name, field in columns.items() if name != "item_id" or field is not None}
    if source != "item_id" and "item_id" in fields:
        raise DataError(f"{table.path}: the schema uses 'item_id' and data.columns.id is '{source}'; rename one")
    frame = table.read({source: None} | fields, scratch)
    notes += [*guessed, *table.notes]
    return frame.with_columns(pl.col(source).alias("item_id"))


def _read_event_table(table: Table, config: DataConfig, scratch: Path, notes: list[str]) -> pl.LazyFrame:
    found, guessed = identify_interactions(table.path, table.names, config.columns)
    frame = table.read(dict.fromkeys(found.values()), scratch)
    notes += [*guessed, *table.notes]
    return frame.select(
        pl.col(found[role]).alias(name) if role in found else pl.lit(None, dtype=pl.String).alias(name)
        for role, name in CANONICAL.items()
    )


def _write_items(
    tables: _Tables, schema: Schema, config: DataConfig, target: Path, scratch: Path
) -> tuple[pl.Series, Schema, dict[str, Any]]:
    path, draft = tables.items_path, scratch / "canonical-items.parquet"
    words = () if config.missing_ids == "keep" else config.missing_words
    try:
        source, notes = plain_ids(tables.items, ("item_id",), words, str(path))
        schema, more, found = resolve(source, schema, str(path))
        canonical(source, schema, tables.folder).sink_parquet(draft, row_group_size=_ROW_GROUP)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: could not be read: {error}") from error
    table = pl.scan_parquet(draft, glob=False)
    item_ids = table.select("item_id").collect()["item_id"]
    if not len(item_ids):
        raise DataError(f"{path}: there is no item in it")
    absent = table.with_row_index("row").filter(pl.col("item_id").is_null())
    dropped = missing_ids(absent, tables.items, "item_id", config, str(path))
    table, item_ids = table.filter(pl.col("item_id").is_not_null()), item_ids.drop_nulls()
    check_item_ids(item_ids, str(path))
    for name, lengths in vector_lengths(table, schema).items():
        if len(lengths) > 1:
            raise DataError(
                f"{path}: vectors of '{name}' have different lengths, such as {lengths[0]} and {lengths[-1]}"
            )
    names = [field.name for field in schema.fields]
    counts = table.select(
        *(pl.col(BAD + name).sum() for name in names), *(pl.col(name).null_count() for name in names)
    ).collect(engine="streaming")
    missing = {name: int(counts[name].item()) for name in names}
    bad = {name: int(counts[BAD + name].item()) for name in names if counts[BAD + name].item()}
    if bad and config.bad_values == "refuse":
        field = next(field for field in schema.fields if field.name in bad)
        raise DataError(_bad_item(tables, field, table, bad[field.name]))
    warnings = [*notes, *more, *dropped]
    warnings += [
        f"{path}: {count} values of '{name}' could not be read and count as missing" for name, count in bad.items()
    ]
    warnings += [
        f"{path}: no item has a value of '{name}'; remove it from the schema or fix its column"
        for name in names
        if missing[name] == len(item_ids)
    ]
    table.drop(BAD + name for name in names).sink_parquet(target / "items.parquet", row_group_size=_ROW_GROUP)
    report = {"count": len(item_ids), "missing": missing, "missing_words": found, "bad_values": bad}
    return item_ids, schema, report | {"warnings": warnings}


def _bad_item(tables: _Tables, field: Field, table: pl.LazyFrame, count: int) -> str:
    marked = table.select("item_id", BAD + field.name).with_row_index().filter(pl.col(BAD + field.name))
    row, item_id, _ = marked.head(1).collect().row(0)
    values = tables.items.select(field.columns).slice(row, 1).collect().row(0)
    return (
        f"{tables.items_path}: row {row + 1} (item_id '{item_id}'): {field.name} is not a {field.modality}: "
        f"{', '.join(map(repr, values))}; there are {count} such rows; fix them or set data.bad_values: missing"
    )
