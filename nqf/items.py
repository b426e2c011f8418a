"""`python -m nqf.items`: new, changed and removed items of a trained run, without training it again."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import section

if TYPE_CHECKING:
    from nqf.stages.run import Run


@section
class ItemsArguments:
    """Changes the items that a trained run recommends. Nothing is trained and no stage becomes stale.

    The run folder gets a folder `items/` that `nqf.Recommender` reads beside the catalogue; delete it to undo
    everything. The evaluation continues with the catalogue that was trained on.

    Attributes:
      action: `add` items that the run does not know; `update` known ones (columns that FILE lacks stay as they are);
        `remove` known ones from all recommendations (they stay known in histories).
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      file: Item table of any kind that `python -m nqf.data inspect` reads, or its address; column item_id and those of
        the schema. To remove, item_id is enough.
      debug: Show the traceback of an error.
    """

    action: Annotated[Literal["add", "update", "remove"], tyro.conf.Positional]
    run: Annotated[str | Path, tyro.conf.Positional]
    file: Annotated[str, tyro.conf.Positional]
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(ItemsArguments, arguments, prog=program("items"))
    from nqf.stages.remote import local_run
    from nqf.stages.run import open_run

    with local_run(options.run, writes=True) as (folder, _):
        _change(options, open_run(folder, terminal()))


def _change(options: ItemsArguments, run: Run) -> None:
    import polars as pl

    from nqf.data import addresses
    from nqf.data.errors import DataError
    from nqf.data.schema import some
    from nqf.serving import overlay
    from nqf.tools.inspect import examine, open_items

    console = run.console
    catalogue, cache, folder = run.dataset.catalogue, run.cache, run.folder / "items"
    given = {"file": options.file}
    with tempfile.TemporaryDirectory() as scratch, addresses.local(given, Path(scratch)) as (paths, told):
        path = Path(paths["file"])
        source = examine(path, run.config.data.columns)
        if source.id is None:
            raise DataError(source.notes[-1])
        table = open_items(source, Path(scratch))
        names = table.collect_schema().names()
        columns = [column for field in catalogue.schema.fields for column in field.columns if column in names]
        if not columns and options.action != "remove":
            raise DataError(f"{path}: none of its columns is in the schema: {some(names)}")
        frame = table.select(pl.col(source.id).alias("item_id"), *columns).collect()
    for note in source.notes:
        console.print(told(note), markup=False)
    with overlay.locked(folder):
        old = overlay.read_overlay(folder, catalogue, cache)
        if options.action == "remove":
            new = overlay.remove(old, catalogue, frame["item_id"].cast(pl.String).to_list())
        else:
            change = overlay.add if options.action == "add" else overlay.update
            new = change(old, catalogue, cache, frame, addresses.beside(path, told))
        overlay.write_overlay(folder, new, cache)
    passed_over = [name for name in names if name not in (source.id, *columns)]
    if passed_over and options.action != "remove":
        console.print(f"columns that the schema does not name are passed over: {some(passed_over)}", markup=False)
    for name, count in overlay.unreadable(new, frame["item_id"].cast(pl.String)).items():
        console.print(f"warning  {count} values of '{name}' could not be read and count as missing", markup=False)
    added = len(set(new.frame["item_id"]) - set(catalogue.item_ids))
    console.print(
        f"{options.action}: {len(frame):,} items. The run recommends {len(catalogue) + added - len(new.removed):,}: "
        f"{len(catalogue):,} of its training; since then {added:,} added, {len(new.frame) - added:,} updated, "
        f"{len(new.removed):,} removed"
    )


if __name__ == "__main__":
    guard(main, sys.argv[1:])
