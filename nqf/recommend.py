"""`python -m nqf.recommend`: recommendations for a user, a history or everybody."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import Count, section


@section
class RecommendArguments:
    """Recommends items from a trained run: for a user, for a history, or for everybody.

    Whether items of the history may be among them is `evaluation.repeats` of the run's configuration.

    Attributes:
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      user: Id of a user of the run.
      history: Item ids, oldest first, separated by commas; for ids that hold commas there are the next two.
      item: An item id of a history, oldest first; to be given once for each.
      history_file: Text file with the item ids of a history, oldest first, one a line.
      all: Write recommendations for every user to this Parquet file.
      parts: Write them to parts of this folder; any number of processes that are given the same share the work.
      k: Number of items.
      stage: `joint`, or `user` for the User Q-Former without the language model.
      debug: Show the traceback of an error.
    """

    run: Annotated[str | Path, tyro.conf.Positional]
    user: str | None = None
    history: str | None = None
    item: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    history_file: Path | None = None
    all: Path | None = None
    parts: Path | None = None
    k: Count = 10
    stage: str = "joint"
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(RecommendArguments, arguments, prog=program("recommend"))
    chosen = (options.user, options.history, options.item or None, options.history_file, options.all, options.parts)
    if sum(value is not None for value in chosen) != 1:
        raise ValueError(
            "give exactly one of --user ID, --history ID,ID,..., --item ID (once for each), --history-file FILE, "
            "--all OUT.parquet and --parts FOLDER"
        )
    history = _history(options)
    import polars as pl

    from nqf.evaluation.table import print_table
    from nqf.files import whole
    from nqf.serving.parts import recommend_parts
    from nqf.serving.recommender import Recommender

    console = terminal()
    recommender = Recommender.load(options.run, stage=options.stage)
    if options.all is not None:
        with whole(options.all, "wb") as file:
            pl.concat(recommender.recommend_all(k=options.k)).write_parquet(file)
        console.print(f"wrote {options.all}", highlight=False, markup=False)
        return
    if options.parts is not None:
        for line in recommend_parts(recommender, options.parts, k=options.k):
            console.print(line, highlight=False, markup=False)
        return
    if options.user is not None:
        frame, title = recommender.recommend(user=options.user, k=options.k), f"For user {options.user}"
    else:
        unknown = set(history).difference(recommender.item_ids)
        if unknown and options.history is not None:
            raise ValueError(
                f"unknown item ids in the history: {', '.join(map(repr, sorted(unknown)[:5]))}; ids that hold commas "
                "are given by --item or --history-file"
            )
        frame = recommender.recommend(history=history, k=options.k)
        title = f"For the history {', '.join(history)}" if history else "The popular items, as the history is empty"
    rows = [
        [str(row["rank"]), row["item_id"], row["title"], f"{row['score']:.4f}"] for row in frame.iter_rows(named=True)
    ]
    print_table(console, [(("rank", "item_id", "title", "score"), rows)], title=title, left=(1, 2))


def _history(options: RecommendArguments) -> list[str]:
    """Item ids, oldest first."""
    if options.history_file is not None:
        if not options.history_file.is_file():
            raise FileNotFoundError(f"{options.history_file}: no such file; it holds the item ids of a history")
        ids = options.history_file.read_text(encoding="utf-8-sig").split("\n")
    else:
        ids = list(options.item) or (options.history or "").split(",")
    # Ids of the tables are stripped, too.
    return [item for item in (entry.strip() for entry in ids) if item]


if __name__ == "__main__":
    guard(main, sys.argv[1:])
