"""`python -m nqf.evaluate`: ranks the whole catalogue for every case with the run's models and all baselines."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nqf.cli import guard, parse, program, terminal
from nqf.config import ConfigError, Count, Weight, section
from nqf.files import is_address

if TYPE_CHECKING:
    from nqf.stages.run import Run


@section
class EvaluateArguments:
    """Evaluates a run beside all baselines; writes results.json and per_user.parquet into eval/, and the model card.

    Attributes:
      run: Run folder, or its address (`gs://`, `s3://`, ...).
      split: Which cases. Select on `valid`; open `test` once.
      protocol: `full` ranks the whole catalogue; `legacy` is the reference's 100 candidates, for comparison only.
      k: Cut-offs of HR and NDCG; by default those of the run's configuration.
      keep_seen: Leave the user's past in the ranking, as some published numbers do (`evaluation.repeats`).
      new_item_weight: In place of the configuration's `evaluation.new_item_weight`, to choose it on `--split valid`.
      cooccurrence_weight: The same of `evaluation.cooccurrence_weight`.
      text_weight: The same of `evaluation.text_weight`.
      factor_weight: The same of `evaluation.factor_weight`.
      into: Folder inside the run for the results; by default `eval` for the test split, and a folder in it for another
        split or protocol, seen items kept, or a trial of weights.
      parts: Share the work through parts in this folder with any number of processes that are given the same; each may
        be ended and run again, and one of them writes the results when all parts are there.
      sasrec: Also train and evaluate a SASRec, whatever the configuration says.
      debug: Show the traceback of an error.
    """

    run: Annotated[str | Path, tyro.conf.Positional]
    split: Literal["valid", "test"] = "test"
    protocol: Literal["full", "legacy"] = "full"
    k: tuple[Count, ...] = ()
    keep_seen: bool = False
    new_item_weight: Weight | None = None
    cooccurrence_weight: Weight | None = None
    text_weight: Weight | None = None
    factor_weight: Weight | None = None
    into: str = ""
    parts: Path | None = None
    sasrec: bool = False
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(EvaluateArguments, arguments, prog=program("evaluate"))
    from nqf.stages.remote import local_run
    from nqf.stages.run import open_run

    if options.parts is not None and is_address(str(options.run)):
        raise ConfigError(
            "processes that share parts share the run, which no address can be: mount it and give that path",
            key="parts",
        )
    console = terminal()
    with local_run(options.run, writes=True) as (folder, saved):
        _evaluate(options, dataclasses.replace(open_run(folder, console), saved=saved))


def _evaluate(options: EvaluateArguments, run: Run) -> None:
    from nqf.evaluation.results import print_results
    from nqf.stages.assess import assess
    from nqf.stages.graph import lock_run
    from nqf.tools.card import write_card

    weights = ("new_item_weight", "cooccurrence_weight", "text_weight", "factor_weight")
    given = {name: getattr(options, name) for name in weights}
    given |= {"repeats": True if options.keep_seen else None}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, **given))
    if options.sasrec:
        config = dataclasses.replace(config, baselines=dataclasses.replace(config.baselines, sasrec=True))
    run = dataclasses.replace(run, config=config)
    # Who shares the work holds the run for as long as results are written.
    with lock_run(run.folder) if options.parts is None else contextlib.nullcontext():
        trial = "-".join(f"{name.replace('_', '-')}-{given[name]:g}" for name in weights if name in given)
        into = options.into or (f"eval/{options.split}-{trial}" if trial else "")
        results = assess(
            run,
            split=options.split,
            protocol=options.protocol,
            ks=options.k,
            into=into,
            parts=options.parts,
            card=write_card,
        )
        print_results(results, run.console)


if __name__ == "__main__":
    guard(main, sys.argv[1:])
