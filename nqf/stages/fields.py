"""Fields stage: reads and splits the tables, then encodes what the field cache lacks. Nothing is trained."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.markup import escape

from nqf.data import addresses
from nqf.data.load import open_dataset, prepare
from nqf.fields.build import assist, build
from nqf.fields.parts import opened
from nqf.interop.encoders import encoder_factories
from nqf.interop.unirec.embeddings import catalogue_embeddings
from nqf.stages.artifacts import STARTED
from nqf.stages.records import RECORD
from nqf.stages.run import Run
from nqf.stages.stage import Stage
from nqf.training.writer import Encoding

_LOOK_SECONDS = 1.0


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


def assist_fields(run: Run) -> None:
    """Encodes values for the process that makes the stage, until it has finished; waits where there are none yet.

    Takes no lock and writes parts alone, into folders that the other process has opened for the very same values,
    encoder and rows per chunk. It may be ended at any time, and costs the part that it was at.

    Args:
      run: The run, under the configuration of that process.
    """
    factories, folder = encoder_factories(run.config.fields), run.folder / "fields"
    if not factories:
        _say(run, "no pretrained encoder is configured: light ones take seconds, and encode alone")
        return
    seen, waiting, made = set(), False, 0
    while not (folder / RECORD).is_file():
        begun = _tables_read(run.folder)
        new = {(begun, parts) for parts in opened(folder) if begun} - seen
        if new:
            dataset = open_dataset(run.folder / "data")
            reviews = dataset.interactions.reviews
            for line in assist(dataset.catalogue, folder, run.config.fields, factories=factories, reviews=reviews):
                _say(run, line)
                made += 1
            waiting, seen = False, seen | new
        elif not waiting:
            waiting = True
            _say(run, f"nothing to encode in {run.folder} now; waiting until its fields stage has finished")
        else:
            time.sleep(_LOOK_SECONDS)
    _say(run, f"{run.folder}: the fields stage has finished; {made} parts of it were made here")


def _tables_read(run: Path) -> int:
    """When the process that makes the stage began, if it has read the tables since, and 0 otherwise."""
    try:
        begun = (run / "fields" / STARTED).stat().st_mtime_ns
        return begun if (run / "data" / "report.json").stat().st_mtime_ns >= begun else 0
    except OSError:
        return 0


def _say(run: Run, line: str) -> None:
    run.console.print(line, highlight=False, markup=False)


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
