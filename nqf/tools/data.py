"""`python -m nqf.data`: fetch public data by name, and look at tables before training."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nqf.cli import program, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from nqf.tools.inspect import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchArguments:
    """Downloads a public data set from its publisher and writes tables, schema and configuration, ready to train.

    A download that breaks off is resumed where it stopped when the command is given again.

    Attributes:
      dataset: `ml-100k`, `ml-1m`, `goodbooks`, `amazon-beauty` (2014, 5-core), or `amazon-2023:CATEGORY` such as
        amazon-2023:All_Beauty.
      output: Folder to write; `data/DATASET` by default.
      pictures: Also download the pictures that the items link to (`goodbooks`, `amazon-beauty`), for a field `image`.
      base_url: Address to take the files from instead of the publisher's: a mirror, or a server of your own.
      debug: Show the traceback of an error.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    output: Path | None = None
    pictures: bool = False
    base_url: str | None = None
    debug: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Shows the columns of an item table, how interactions are spread, and a schema to start from.

    Attributes:
      table: Item table: CSV, TSV, JSON, JSONL (plain or .gz), Parquet, Excel, a folder of parts, RecBole's .item,
        Amazon 2023 metadata, or the reference system's item dictionary.
      interactions: Interaction table, of the same kinds. Both may be addresses (gs://, s3://, ...).
      output: Write the suggested schema.yaml, and with interactions a config.yaml that was tried, into this folder.
      force: Replace the schema.yaml and config.yaml that are there.
      debug: Show the traceback of an error.
    """

    table: Annotated[str, tyro.conf.Positional]
    interactions: str | None = None
    output: Path | None = None
    force: bool = False
    debug: bool = False


DataArguments = (
    Annotated[FetchArguments, tyro.conf.subcommand("fetch")]
    | Annotated[InspectArguments, tyro.conf.subcommand("inspect")]
)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = tyro.cli(DataArguments, args=arguments, prog=program("data"))
    console = terminal()
    if isinstance(options, FetchArguments):
        run_fetch(options, console)
    else:
        run_inspect(options, console)


def run_fetch(options: FetchArguments, console: Console) -> None:
    """Fetches, with a bar on a terminal and a line per file elsewhere; then says what may be done with the data."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from nqf.tools.fetch import fetch, source_of
    from nqf.training.writer import Encoding

    source_of(options.dataset)
    output = options.output or Path("data") / options.dataset.replace(":", "-")
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    tasks = {}

    def progress(name: str, done: int, total: int | None) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
            if not console.is_terminal:
                size = f"{total:,} bytes" if total else "size not stated"
                console.print(f"{name}: {size}, {done:,} there", markup=False)
        bars.update(tasks[name], completed=done, total=total)

    with bars, Encoding(console) as pictures:
        source = fetch(
            options.dataset, output, base=options.base_url, progress=progress,
            pictures=pictures.step if options.pictures else None,
        )  # fmt: skip
    console.print(f"\n{source.license}\n", markup=False)
    console.print(
        f"The data is in {output}. Train with: python -m nqf.train --config {output / 'config.yaml'}", markup=False
    )


def run_inspect(options: InspectArguments, console: Console) -> None:
    """Prints what the tables hold, what was guessed and what schema fits."""
    import polars as pl

    from nqf.data import addresses
    from nqf.evaluation.table import print_table
    from nqf.files import is_address, masked, write_text
    from nqf.tools import inspect

    names = ["schema.yaml"] if options.interactions is None else ["schema.yaml", "config.yaml"]
    for path in [options.output / name for name in names] if options.output is not None else ():
        if path.exists() and not options.force:
            raise FileExistsError(f"{path}: there already; --force replaces it, or give another --output")
    given = {"items": options.table, "interactions": options.interactions}
    with tempfile.TemporaryDirectory() as folder, addresses.local(given, Path(folder)) as (paths, told):
        scratch = Path(folder)
        source = inspect.examine(Path(paths["items"]))
        columns = inspect.inspect_items(source, scratch)
        _print_columns(columns, told(paths["items"]), console)
        _print_notes(map(told, source.notes), console)
        schema = inspect.suggest_schema(source, columns)
        texts = {"schema.yaml": schema}
        if options.interactions is not None:
            ids = None
            if source.id is not None:
                ids = (
                    inspect.open_items(source, scratch).select(pl.col(source.id).cast(pl.String)).collect().to_series()
                )
            events = inspect.open_events(Path(paths["interactions"]), scratch, source)
            console.print()
            lines = inspect.inspect_interactions(events, ids)
            print_table(console, [(["interactions", ""], lines)], title=told(paths["interactions"]), left=(0, 1))
            _print_notes(map(told, events.notes), console)
            # Nothing is written that was not tried.
            data, decided = inspect.suggest_config(source, events, schema, scratch)
            _print_notes(map(told, decided), console)
            data |= {key: masked(path) for key, path in given.items() if path and is_address(path)}
            if any(path and path != masked(path) for path in given.values()):
                _print_notes(["credentials are not written into config.yaml; leave them to the environment"], console)
            texts["config.yaml"] = inspect.config_text(data, options.output or Path())
    console.print(f"\nA schema to start from:\n\n{schema}", markup=False)
    if options.output is not None:
        for name, text in texts.items():
            write_text(options.output / name, text)
            console.print(f"wrote {options.output / name}", markup=False)


def _print_columns(columns: list[Column], title: str, console: Console) -> None:
    from nqf.evaluation.table import print_table

    header = ["column", "type", "filled", "distinct", "suggested", "example"]
    rows = [
        [
            column.name,
            column.kind,
            f"{column.filled:.1%}",
            f"{column.distinct:,}",
            column.options.get("modality", "-"),
            column.example,
        ]
        for column in columns
    ]
    short = (header[:-1], [row[:-1] for row in rows])
    print_table(console, [(header, rows), short], title=title, left=(0, 1, 4, 5))


def _print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"note  {note}", markup=False)
