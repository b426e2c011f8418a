"""`python -m nqf.recommend`: recommendations for a user, a history or everybody."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import Count, section


@section
class RecommendArguments:
    """Recommends items from a trained run.

    Attributes:
      run: Run folder.
      user: Id of a user of the run.
      history: Item ids, oldest first, separated by commas.
      all: Write recommendations for every user to this Parquet file.
      k: Number of items.
      stage: `joint`, or `user` for the User Q-Former without the language model.
      debug: Show the traceback of an error.
    """

    run: Annotated[Path, tyro.conf.Positional]
    user: str | None = None
    history: str | None = None
    all: Path | None = None
    k: Count = 10
    stage: str = "joint"
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(RecommendArguments, arguments, prog=program("recommend"))
    chosen = [value for value in (options.user, options.history, options.all) if value is not None]
    if len(chosen) != 1:
        raise ValueError("give exactly one of --user ID, --history ID,ID,... and --all OUT.parquet")
    import polars as pl

    from nqf.evaluation.table import print_table
    from nqf.serving.recommender import Recommender

    console = terminal()
    recommender = Recommender.load(options.run, stage=options.stage)
    if options.all is not None:
        temporary = options.all.with_suffix(".tmp")
        pl.concat(recommender.recommend_all(k=options.k)).write_parquet(temporary)
        os.replace(temporary, options.all)
        console.print(f"wrote {options.all}", highlight=False)
        return
    if options.user is not None:
        frame, title = recommender.recommend(user=options.user, k=options.k), f"For user {options.user}"
    else:
        history = [item.strip() for item in options.history.split(",") if item.strip()]
        frame, title = recommender.recommend(history=history, k=options.k), f"For the history {', '.join(history)}"
    rows = [
        [str(row["rank"]), row["item_id"], row["title"], f"{row['score']:.4f}"] for row in frame.iter_rows(named=True)
    ]
    print_table(console, [(("rank", "item_id", "title", "score"), rows)], title=title, left=(1, 2))


if __name__ == "__main__":
    guard(main, sys.argv[1:])
