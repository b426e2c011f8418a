"""`nqf.fit`: from two tables in memory, or on disk, to a trained recommender, by the stages of the command."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import yaml
from rich.console import Console

from nqf import files
from nqf.cli import keep_compiled_programs, quiet_libraries, terminal
from nqf.config import DATA_PATHS, ColumnsConfig, Config, DataConfig, from_tree, load_config, to_tree
from nqf.data import addresses
from nqf.data.errors import DataError
from nqf.data.frames import frame_of
from nqf.data.schema import Schema, load_schema, schema_from_tree, schema_to_tree
from nqf.tools import inspect

if TYPE_CHECKING:
    from nqf.serving.recommender import Recommender

TABLES = "tables"
"""Folder in the run with the tables, where they came from memory, and the schema."""
_MANY_ITEMS = 50_000


# Many parameters: two tables and what may be said of them; all but the tables can be guessed.
def fit(
    items: Any,
    events: Any,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    rating: str | None = None,
    review: str | None = None,
    item_id: str | None = None,
    run: str | Path = "runs/fit",
    schema: Schema | Mapping[str, Any] | str | Path | None = None,
    config: Config | str | Path | None = None,
    split: Literal["temporal", "leave-one-out"] | None = None,
    quiet: bool = False,
) -> Recommender:
    """Trains a recommender on an item table and an event table, and says what it takes the columns for.

    The result is a run folder like that of `nqf train`: called again with the same tables, it does what is missing
    and nothing else, and a call that was cut off is resumed.

    Args:
      items: DataFrame of polars or pandas, Arrow table, or path or address (`gs://`, `s3://`, ...) of any table that
        `nqf data inspect` reads.
      events: Likewise; a row for everything that a user did with an item.
      user: Column of the users in `events`; by default one of a usual name, likewise the next four.
      item: Column of the items.
      time: Column of the times.
      rating: Column of the ratings.
      review: Column of the texts.
      item_id: Column of the ids in `items`; by default that of `item`, or one of a usual name.
      run: Run folder, or its address as text.
      schema: Fields of the items, as a value, a tree as in schema.yaml, or a path or address; by default they are
        guessed.
      config: Everything else, as a value or path; of its data section, tables, columns and split are replaced. By
        default sizes and epochs follow from the size of the data.
      split: How events are held out; by default by time where there are times and that leaves cases, else each user's
        last ones.
      quiet: Print nothing.

    Raises:
      DataError: Tables that cannot be used; names the column or row.
      StageError: The folder is somebody else's, or a stage was cut off under other settings.
    """
    keep_compiled_programs()
    quiet_libraries()
    # Imports that take seconds.
    from nqf.evaluation.results import print_results
    from nqf.serving.recommender import Recommender
    from nqf.stages.assess import assess
    from nqf.stages.folder import claim
    from nqf.stages.graph import lock_run, open_for_training, run_stages, wanted
    from nqf.stages.remote import local_run
    from nqf.tools.card import write_card

    console, name = terminal(quiet=quiet), files.masked(str(run))
    columns = ColumnsConfig(user=user, item=item, time=time, rating=rating, review=review, id=item_id)
    with local_run(run, writes=True) as (folder, saved), lock_run(folder):
        claim(folder, TABLES)
        paths = [_on_disk(table, folder / TABLES / name) for table, name in ((items, "items"), (events, "events"))]
        data, sizes = _data(paths, columns, schema, folder / TABLES / "schema.yaml", console)
        if split is not None:
            data["split"] = split
        if config is None:
            config = from_tree(Config, scaled(*sizes))
        elif not isinstance(config, Config):
            config = load_config(config)
        tree = {key: value for key, value in to_tree(config.data).items() if key not in ("synthetic", "columns")}
        # With the credentials of addresses.
        tree |= {key: getattr(config.data, key) for key in DATA_PATHS}
        config = dataclasses.replace(config, name=folder.name, data=from_tree(DataConfig, tree | data))
        stages = wanted(config)
        opened = dataclasses.replace(open_for_training(config, folder, console, stages=stages), saved=saved)
        run_stages(opened, stages)
        results = assess(opened)
        write_card(opened, results)
        print_results(results, console)
    console.print(f"the run is in {name}; nqf.Recommender.load({name!r}) opens it again", markup=False)
    return Recommender.load(run)


def scaled(items: int, users: int, events: int) -> dict[str, Any]:
    """Sizes and epochs for a data set, as a tree of the configuration.

    The rules give the shipped recipes of the quick start (3,000 items, 4,000 users, 56,000 events) and of ml-100k
    (1,682, 943 and 100,000), nearly, and for less data as many steps of smaller batches.
    """
    batch = min(128, max(16, 2 ** round(math.log2(max(users, 1) / 16))))
    epochs = min(16, max(4, round(200 * batch / max(users, 1))))
    loss = {"loss": {"negatives": "sampled"}} if items > _MANY_ITEMS else {}
    optim = {"batch_size": batch, "learning_rate": 0.003, "validate_every": 2}
    return {
        # A small catalogue is learned by heart before that; what it explains of held-out items then falls.
        "item": {"optim": {"epochs": min(20, max(2, round(192_000 / max(events, 1)))), "patience": 4}},
        # A vector of its own is learned of what an item's users did, which takes some.
        "candidates": {"free_vectors": events >= 20 * items},
        "user": {"optim": {**optim, "epochs": epochs}, **loss},
        "joint": {"optim": {**optim, "epochs": epochs + epochs // 2}, **loss},
    }


def _data(
    tables: list[str],
    columns: ColumnsConfig,
    schema: Schema | Mapping[str, Any] | str | Path | None,
    schema_path: Path,
    console: Console,
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The data section of two tables, which was tried, and the numbers of items, users and events."""

    def say(notes: list[str]) -> None:
        for note in notes:
            console.print(told(note), markup=False)

    given = {"items": tables[0], "interactions": tables[1]}
    # A schema that is a value has no path.
    named = {"schema": str(schema)} if isinstance(schema, (str, Path)) else {}
    with tempfile.TemporaryDirectory() as folder, addresses.local(given | named, Path(folder)) as (paths, told):
        scratch = Path(folder)
        source = inspect.examine(Path(paths["items"]), columns)
        if source.id is None:
            raise DataError(source.notes[-1])
        say(source.notes)
        if schema is None:
            found = inspect.inspect_items(source, scratch)
            said = [
                f"{column.name}: {', '.join(filter(None, (column.options.get('modality', 'left out'), column.note)))}"
                for column in found
                if column.name != source.id
            ]
            say(["fields of the items, where no schema is given:", *(f"  {line}" for line in said)])
            text = inspect.suggest_schema(source, found)
        else:
            if not isinstance(schema, Schema):
                tree = dict(schema) if isinstance(schema, Mapping) else None
                schema = load_schema(Path(paths["schema"])) if tree is None else schema_from_tree(tree)
            text = yaml.safe_dump(schema_to_tree(schema), sort_keys=False)
        events = inspect.open_events(Path(paths["interactions"]), scratch, source, columns)
        say(events.notes)
        data, decided = inspect.suggest_config(source, events, text, scratch)
        data |= {key: path for key, path in given.items() if files.is_address(path)}
        say(decided)
        count = inspect.open_items(source, scratch).select(pl.len()).collect().item()
        sizes = count, events.frame["user_id"].n_unique(), len(events.frame)
    files.write_text(schema_path, text)
    return data | {"schema": str(schema_path.absolute())}, sizes


def _on_disk(table: Any, path: Path) -> str:
    """The path or address of a table, which is written if it is in memory."""
    if isinstance(table, Path) and files.is_address(str(table).replace(":/", "://", 1)) and not table.exists():
        raise DataError(f"{table}: no such file; an address is given as text, as Path makes one slash of two")
    if isinstance(table, (str, Path)):
        return str(table)
    frame = frame_of(table)
    path = path.with_suffix(".parquet")
    with files.whole(path) as file:
        frame.write_parquet(file)
    return str(path)
