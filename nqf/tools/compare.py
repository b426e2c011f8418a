"""The models of several runs in one table, with paired differences."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from nqf.cli import parse, program, terminal
from nqf.config import CountOrNone, Seed, section


@section
class CompareArguments:
    """Compares evaluated runs, each model with one of them, on the same users.

    Attributes:
      runs: Run folders or their addresses, evaluated on the same split of the same data.
      against: Model that the others are compared with, as `MODEL` of the first run or `RUN:MODEL` with the run
        folder's name; by default the first run's first model.
      metric: Metric of the differences, for example `ndcg@10`.
      segment: Users to compare on: `all`, `warm` or `cold`.
      bootstrap: Bootstrap resamples of the users.
      seed: Seed of the resampling.
      debug: Show the traceback of an error.
    """

    runs: Annotated[tuple[str | Path, ...], tyro.conf.Positional]
    against: str = ""
    metric: str = "ndcg@10"
    segment: str = "all"
    bootstrap: CountOrNone = 1_000
    seed: Seed = 0
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = parse(CompareArguments, arguments, prog=program("compare"))
    from nqf.evaluation.table import print_table

    header, rows = compare(options)
    broken = [*header[:-1], header[-1].replace(" ", "\n")]
    # The difference keeps its interval where there is no room for the others.
    plain = [[row[0], *(cell.split(" ")[0] for cell in row[1:-1]), row[-1]] for row in rows]
    title = f"{options.segment} users; differences are paired over users, 95 % bootstrap intervals in brackets"
    print_table(terminal(), [(broken, rows), (broken, plain)], title=title)


def compare(options: CompareArguments) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison.

    Raises:
      FileNotFoundError: A run was never evaluated.
      ValueError: The runs do not have the same users and targets, split or protocol, or a name is unknown.
    """
    from nqf.evaluation.metrics import mean_intervals, per_user
    from nqf.evaluation.results import format_interval, model_ranks, read_results
    from nqf.stages.remote import local_run

    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(local_run(run))[0] for run in options.runs]
        names = _names(runs)
        results = {name: read_results(run) for name, run in zip(names, runs, strict=True)}
    first = results[names[0]]
    identity = ("user_id", "target", "cold")
    users = first.frame.select(identity).sort("user_id")
    values = {}
    for name, result in results.items():
        for key in ("split", "protocol", "repeats"):
            if getattr(result, key) != getattr(first, key):
                raise ValueError(
                    f"{name} was evaluated with {key} = {getattr(result, key)}, {names[0]} with {getattr(first, key)}; "
                    "evaluate both alike with python -m nqf.evaluate"
                )
        frame = result.frame.sort("user_id")
        if not frame.select(identity).equals(users):
            raise ValueError(f"{name} and {names[0]} have other users or targets; they cannot be compared in pairs")
        for model, ranks_N in model_ranks(frame).items():
            values[name, model] = per_user(ranks_N, _cut_offs(options.metric))
    known = list(next(iter(values.values())))
    if options.metric not in known:
        raise ValueError(f"unknown metric '{options.metric}'; use hr@K, ndcg@K or mrr")
    cold_N = users["cold"].to_numpy()
    inside = {"all": np.ones(len(cold_N), bool), "warm": ~cold_N, "cold": cold_N}
    if options.segment not in inside:
        raise ValueError(f"unknown segment '{options.segment}'; use {', '.join(inside)}")
    inside_N = inside[options.segment]
    reference = _reference(options.against, names, list(values))
    rows = []
    for (name, model), metrics in values.items():
        table = {key: value[inside_N] for key, value in metrics.items()}
        means = mean_intervals(table, bootstrap=options.bootstrap, seed=options.seed)
        cells = [f"{name}:{model}", *(format_interval(means[key]) for key in known)]
        if (name, model) == reference:
            cells.append("reference")
        else:
            difference = {options.metric: (metrics[options.metric] - values[reference][options.metric])[inside_N]}
            interval = mean_intervals(difference, bootstrap=options.bootstrap, seed=options.seed)[options.metric]
            cells.append(format_interval(interval, signed=True))
        rows.append(cells)
    return ["model", *known, f"{options.metric} minus {':'.join(reference)}"], rows


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, numbered where two runs share one."""
    names = [run.resolve().name for run in runs]
    return [f"{name}#{index + 1}" if names.count(name) > 1 else name for index, name in enumerate(names)]


def _cut_offs(metric: str) -> tuple[int, ...]:
    _, _, k = metric.partition("@")
    return (int(k),) if k.isdigit() and int(k) > 0 else (10,)


def _reference(against: str, names: list[str], models: list[tuple[str, str]]) -> tuple[str, str]:
    if not against:
        return models[0]
    run, _, model = against.rpartition(":")
    chosen = (run or names[0], model)
    if chosen not in models:
        raise ValueError(f"no model '{against}'; there are {', '.join(':'.join(one) for one in models)}")
    return chosen
