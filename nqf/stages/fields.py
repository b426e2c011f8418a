"""Fields stage: reads and splits the tables, then encodes what the field cache lacks. Nothing is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.markup import escape

from nqf.data import addresses
from nqf.data.load import prepare
from nqf.fields.build import build
from nqf.interop.encoders import encoder_factories
from nqf.interop.unirec.embeddings import catalogue_embeddings
from nqf.stages.run import Run
from nqf.stages.stage import Stage
from nqf.training.writer import Encoding


def build_fields(run: Run) -> dict[str, Any]:
    """Runs the stage; its record holds the sizes, the fields' modalities and widths, and the report on the data."""
    dataset, given = prepare(run.config.data, run.folder / "data"), None
    if run.config.data.candidates:
        given = _candidates(run, dataset.catalogue.item_ids)
    with Encoding(run.console) as encoding:
        cache = build(
            dataset.catalogue,
            run.folder / "fields",
            run.config.fields,
            factories=encoder_factories(run.config.fields),
            reviews=dataset.interactions.reviews,
            trained=dataset.split.train,
            candidates=given,
            progress=encoding.step,
        )
    for warning in (*dataset.split.warnings, *cache.warnings):
        run.console.print(f"[yellow]warning[/yellow]  {escape(warning)}", highlight=False)
    return {
        "items": len(dataset.catalogue.item_ids),
        "users": len(dataset.interactions.user_ids),
        "interactions": len(dataset.interactions.items),
        "fields": {name: {"modality": cache.modalities[name], "width": cache.widths[name]} for name in cache.names},
        "data": dataset.report,
    }


def _candidates(run: Run, item_ids: Sequence[str]) -> pl.Series:
    """The vectors of `data.candidates`, List(Float32), null of items that have none."""
    with tempfile.TemporaryDirectory() as scratch:
        with addresses.local({"candidates": run.config.data.candidates}, Path(scratch)) as (paths, told):
            vectors, there = catalogue_embeddings(paths["candidates"], item_ids)
            name = told(paths["candidates"])
    if count := int((~there).sum()):
        run.console.print(f"[yellow]warning[/yellow]  {escape(name)}: {count} items have no embedding in it")
    table = pl.DataFrame({"vector": vectors, "there": there})
    return table.select(pl.when("there").then(pl.col("vector").cast(pl.List(pl.Float32)))).to_series()


FIELDS = Stage(
    name="fields",
    after=(),
    reads=("data", "fields"),
    model_folders=("fields.text_encoder", "fields.image_encoder"),
    # The cache is content-addressed: it decides value by value what stays.
    writes=(),
    also=("data",),
    checked=("data/*.*", "fields/manifest.json"),
    make=build_fields,
)
