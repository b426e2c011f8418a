"""Evaluates models over the full catalogue; writes, prints and tabulates what came out.

A model is a `Scorer`: see `nqf.evaluation.ranking`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import polars as pl
from rich.console import Console

from nqf import files
from nqf.config import EvaluationConfig
from nqf.data.interactions import Interactions
from nqf.data.parquet import checked
from nqf.data.splits import Cases, Split, pasts, rankable, repeated
from nqf.evaluation.legacy import LEGACY_WARNING, legacy_ranks
from nqf.evaluation.metrics import mean_intervals, per_user
from nqf.evaluation.ranking import Scorer, dense_batches, rank_vectors, ranks_from_scores, top_k, top_k_from_scores
from nqf.evaluation.segments import describe_recommended, segment_users
from nqf.evaluation.shares import ALONE, Shares
from nqf.evaluation.table import print_table

Protocol = Literal["full", "legacy"]
TRAINED = ("joint", "joint_vectors", "joint_learned", "user")
"""Rows of what a run has trained, by their names in tables."""

_RECOMMENDED = 10
_RANK = "rank:"
_SEGMENTS_SHOWN = ("all", "warm", "cold")
# What `print_results` leaves out, step by step, where the terminal is too narrow.
_DETAIL: tuple[dict[str, Any], ...] = (
    {},
    {"intervals": ("all",)},
    {"intervals": ("all",), "about": False},
    {"intervals": (), "about": False},
    {"intervals": (), "about": False, "segments": ("all",)},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What an evaluation found.

    Attributes:
      split: `valid` or `test`.
      protocol: `full` or `legacy`.
      repeats: Whether the users' past stayed in the ranking, and targets out of it counted.
      repeated: Cases whose target the user had before; without `repeats` they are not among the evaluated ones. None
        in results that were written before they were counted.
      users: Number of evaluated users.
      items: Size of the catalogue.
      segments: Segment name to its number of users.
      models: Model to segment to metric to [mean, low, high], a 95 % interval over users.
      recommended: Model to `coverage@10` and `popularity@10`; empty under the legacy protocol.
      frame: One row per user: user_id, target (item row), history (length), cold, popularity (training events of the
        target), and `rank:MODEL` (float64, expected under ties) per model.
      provenance: Command, seed, machine, date and versions.
    """

    split: str
    protocol: str
    repeats: bool
    repeated: int | None
    users: int
    items: int
    segments: dict[str, int]
    models: dict[str, dict[str, dict[str, list[float]]]]
    recommended: dict[str, dict[str, float]]
    frame: pl.DataFrame
    provenance: dict[str, Any]

    def tree(self) -> dict[str, Any]:
        """What results.json holds."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "frame"}


# Many parameters: what is ranked, on what, and how it is told; each named at its one call.
def evaluate(
    models: Mapping[str, Scorer],
    interactions: Interactions,
    split: Split,
    cases: Cases,
    *,
    split_name: Literal["valid", "test"],
    config: EvaluationConfig,
    seed: int,
    protocol: Protocol = "full",
    command: str = "",
    shares: Shares = ALONE,
) -> Results:
    """Ranks every case's target with every model.

    Args:
      models: Model name to scorer.
      interactions: All interactions.
      split: What is training, and which items it never saw.
      cases: The cases to rank, one per user; without `evaluation.repeats`, those whose target is not new are left out.
      split_name: Which part of the split `cases` is.
      config: Cut-offs, masking, bootstrap and batch size.
      seed: Seed of the bootstrap and of the legacy protocol's negatives.
      protocol: `full` ranks the whole catalogue; `legacy` is the reference's 100 candidates.
      command: The command that was run, for the record.
      shares: How the ranking of the full catalogue is shared with other processes; by default, not at all.

    Raises:
      ValueError: There are no cases, or a model's scores have the wrong shape or are not finite.
    """
    if len(cases.users) == 0:
        raise ValueError(f"the {split_name} split is empty: no user has an item to predict; check the split's settings")
    items, given = len(split.cold), len(cases.users)
    known = int(repeated(interactions, cases).sum())
    kept = rankable(interactions, cases, repeats=config.repeats)
    cases = cases[kept]
    starts_N, targets_N = interactions.offsets[cases.users], interactions.items[cases.cuts]
    past = pasts(interactions, cases)
    counts_I = np.bincount(interactions.items[split.train], minlength=items)
    columns: dict[str, Any] = {
        "user_id": [interactions.user_ids[user] for user in cases.users],
        "target": targets_N,
        "history": cases.cuts - starts_N,
        "cold": split.cold[targets_N],
        "popularity": counts_I[targets_N],
    }
    recommended, seen = {}, None if config.repeats else past
    for name, scorer in models.items():
        _check_shape(name, scorer, given, items)
        if protocol == "legacy":
            scorer = _of_cases(scorer, kept)
            theirs = split.candidates(cases.cuts)
            ranks_N = legacy_ranks(scorer, targets_N, past, items=items, seed=seed, given=theirs)
        else:
            rank = functools.partial(_rank, scorer, kept, targets_N, seen, items, config)
            found = shares.rows(f"ranks-{name}", len(kept), rank)
            ranks_N, recommended[name] = found["ranks"], describe_recommended(found["recommended"], counts_I)
        columns[_RANK + name] = ranks_N
    inside = segment_users(lengths_N=columns["history"], targets_N=targets_N, cold_I=split.cold, counts_I=counts_I)
    summaries = {
        name: {
            segment: mean_intervals(
                {key: values_N[inside_N] for key, values_N in per_user(columns[_RANK + name], config.ks).items()},
                bootstrap=config.bootstrap,
                seed=seed,
            )
            for segment, inside_N in inside.items()
        }
        for name in models
    }
    return Results(
        split=split_name,
        protocol=protocol,
        repeats=config.repeats,
        repeated=known,
        users=len(targets_N),
        items=items,
        segments={segment: int(inside_N.sum()) for segment, inside_N in inside.items()},
        models=summaries,
        recommended=recommended,
        frame=pl.DataFrame(columns),
        provenance=_provenance(command, seed),
    )


def model_ranks(frame: pl.DataFrame) -> dict[str, np.ndarray]:
    """The ranks in a per-user frame, by model."""
    return {name.removeprefix(_RANK): frame[name].to_numpy() for name in frame.columns if name.startswith(_RANK)}


def write_results(results: Results, folder: Path, into: str = "eval") -> None:
    """Writes results.json and per_user.parquet into a folder of a run, each whole, and bound to each other."""
    table, tree = folder / into / "per_user.parquet", results.tree()
    with files.whole(table) as file:
        results.frame.write_parquet(file)
    files.write_text(
        folder / into / "results.json", json.dumps(tree | {"digest": _digest(tree, table)}, indent=1) + "\n"
    )


def read_results(folder: Path, into: str = "eval") -> Results:
    """Reads what `write_results` wrote.

    Raises:
      FileNotFoundError: The run was never evaluated.
      ValueError: The files were changed since, or are damaged.
    """
    target = folder / into
    path, table, command = target / "results.json", target / "per_user.parquet", f"run python -m nqf.evaluate {folder}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {command} first")
    tree = files.read_json(path)
    # Those of version 0.2 and before have none.
    digest = tree.pop("digest", None)
    if not table.is_file() or digest not in (None, _digest(tree, table)):
        raise ValueError(f"{path} and {table.name} are not what was evaluated; {command} again")
    if "mask_seen" in tree:
        tree |= {"repeats": not tree.pop("mask_seen"), "repeated": None}
    return Results(frame=pl.read_parquet(checked(table), glob=False), **tree)


def _digest(tree: dict[str, Any], table: Path) -> str:
    """SHA-256 of both files of an evaluation."""
    content = json.dumps(tree, sort_keys=True) + files.sha256(table)
    return hashlib.sha256(content.encode()).hexdigest()


def print_results(results: Results, console: Console, *, k: int | None = None) -> None:
    """Prints a table of models in the detail that the console is wide enough for; all of it is in results.json.

    Args:
      results: What to print.
      console: Terminal.
      k: Cut-off; default 10, or the largest evaluated one where 10 is not among them.
    """
    k = cut_off(results, k)
    title = f"{results.split}: {results.users:,} users, {results.items:,} items, {_repeats(results)}"
    if results.protocol == "legacy":
        console.print(f"[yellow]{LEGACY_WARNING}[/yellow]", highlight=False)
        title = f"{results.split}: {results.users:,} users, 1 target and 99 other items each (legacy protocol)"
    choices = []
    for options in _DETAIL:
        header, rows = _cells(results, k, **options)
        choices.append(([name.replace(" ", "\n") for name in header], rows))
    chosen = print_table(console, choices, title=title)
    intervals = (
        "95 % bootstrap intervals in brackets" if _DETAIL[chosen].get("intervals", True) else "no room for intervals"
    )
    console.print(f"means over users; {intervals}; all figures are in eval/results.json", highlight=False)


def markdown_table(results: Results, *, k: int | None = None) -> str:
    """The table of `print_results` in Markdown, with the record of how it was made below it."""
    k = cut_off(results, k)
    header, rows = _cells(results, k)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    made = results.provenance
    lines += [
        "",
        f"{results.split} split, {results.users:,} users, {results.items:,} items, protocol {results.protocol}, "
        f"{_repeats(results)}; 95 % bootstrap intervals over users in brackets. "
        f"`{made['command']}`, seed {made['seed']}, {made['machine']}, {made['date']}, "
        + ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _repeats(results: Results) -> str:
    if results.repeats:
        return f"seen items kept, {results.repeated:,} targets among them" if results.repeated else "seen items kept"
    left_out = f", {results.repeated:,} cases with a seen target left out" if results.repeated else ""
    return f"seen items masked{left_out}"


def cut_off(results: Results, k: int | None) -> int:
    """A cut-off that was evaluated: `k`, or by default 10, or the largest one where 10 is not among them.

    Raises:
      ValueError: There are no metrics at `k`.
    """
    summary = next(iter(results.models.values()))["all"]
    known = sorted(int(name.removeprefix("hr@")) for name in summary if name.startswith("hr@"))
    if k is None:
        return 10 if 10 in known else known[-1]
    if k not in known:
        raise ValueError(f"no metrics at {k}; the evaluation has {', '.join(map(str, known))}")
    return k


def _cells(
    results: Results,
    k: int,
    *,
    segments: Sequence[str] = _SEGMENTS_SHOWN,
    intervals: Sequence[str] = _SEGMENTS_SHOWN,
    about: bool = True,
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: some segments, some of them with intervals, and what describes the recommended items."""
    shown = [segment for segment in segments if segment in results.segments]
    if "cold" not in shown:
        shown = ["all"]
    header = ["model"]
    for segment in shown:
        of = "" if segment == "all" else f" {segment} ({results.segments[segment]:,})"
        header += [f"HR@{k}{of}", f"NDCG@{k}{of}"] + (["MRR"] if segment == "all" else [])
    if about and results.recommended:
        header += [f"coverage@{_RECOMMENDED}", f"popularity@{_RECOMMENDED}"]
    rows = []
    for name, summary in results.models.items():
        row = [name]
        for segment in shown:
            keys = [f"hr@{k}", f"ndcg@{k}"] + (["mrr"] if segment == "all" else [])
            cells = [format_interval(summary[segment][key]) for key in keys]
            row += cells if segment in intervals else [cell.split(" ")[0] for cell in cells]
        if about and results.recommended:
            entry = results.recommended[name]
            row += [f"{entry[f'coverage@{_RECOMMENDED}']:.1%}", f"{entry[f'popularity@{_RECOMMENDED}']:,.0f}"]
        rows.append(row)
    return header, rows


def format_interval(entry: Sequence[float], *, signed: bool = False) -> str:
    """`.1234 [.1200, .1268]` from [mean, low, high], with a sign if `signed`."""
    mean, low, high = (f"{value:{'+' if signed else ''}.4f}".replace("0.", ".", 1) for value in entry)
    return f"{mean} [{low}, {high}]"


def _rank(
    scorer: Scorer,
    kept: np.ndarray,
    targets_N: np.ndarray,
    seen: Sequence[np.ndarray] | None,
    items: int,
    config: EvaluationConfig,
    span: slice,
) -> dict[str, np.ndarray]:
    """`ranks` of some targets, float64 [n], and `recommended`, the rows of the top lists, int32 [n, K]."""
    scorer, targets_N, seen = _of_cases(scorer, kept[span]), targets_N[span], None if seen is None else seen[span]
    if not callable(scorer):
        ranks_N = rank_vectors(*scorer, targets_N, seen, batch=config.batch_size)
        rows_NxK = top_k(*scorer, _RECOMMENDED, seen, batch=config.batch_size)[1]
        return {"ranks": ranks_N, "recommended": rows_NxK}
    ranks, rows = [], []
    for batch in dense_batches(len(targets_N), items, config.batch_size):
        scores_BxI = scorer(np.arange(batch.start, batch.stop))
        masked = None if seen is None else seen[batch]
        ranks.append(ranks_from_scores(scores_BxI, targets_N[batch], masked))
        rows.append(top_k_from_scores(scores_BxI, _RECOMMENDED, masked)[1])
    return {"ranks": np.concatenate(ranks), "recommended": np.concatenate(rows)}


def _of_cases(scorer: Scorer, rows: np.ndarray) -> Scorer:
    """A scorer of all cases as one of some."""
    if callable(scorer):
        return lambda chosen: scorer(rows[chosen])
    users, items = scorer
    return (users, items) if len(rows) == len(users) else (users[rows], items)


def _check_shape(name: str, scorer: Scorer, users: int, items: int) -> None:
    if callable(scorer):
        return
    user_vectors, item_vectors = scorer
    if len(user_vectors) != users or len(item_vectors) != items:
        raise ValueError(
            f"model '{name}' has {len(user_vectors)} user vectors and {len(item_vectors)} item vectors; the split has "
            f"{users} cases and the catalogue {items} items"
        )


def _provenance(command: str, seed: int) -> dict[str, Any]:
    # Those that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "command": command,
        "seed": seed,
        "machine": f"{cores} CPU core{'s' * (cores != 1)} ({platform.machine()}), {jax.devices()[0].device_kind}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    }
