"""Evaluation of a run: its trained models and every baseline, on the same cases, in one table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape

from nqf.config import load_config, to_tree
from nqf.data.splits import Cases
from nqf.evaluation import baselines
from nqf.evaluation.choice import Score, choose_weights, text_rows
from nqf.evaluation.cooccurrence import add_cooccurrence
from nqf.evaluation.ranking import Scorer
from nqf.evaluation.results import Protocol, Results, evaluate, write_results
from nqf.evaluation.shares import ALONE, Shares
from nqf.files import masked
from nqf.stages.artifacts import status
from nqf.stages.folder import claim
from nqf.stages.graph import JOINT, NAMES, SASREC, USER, lock_run, run_stage
from nqf.stages.records import StageError, check_parts, run_version
from nqf.stages.run import Run
from nqf.stages.score import (
    counts_of,
    dense_score_of,
    given_counting,
    memory_of,
    say_score,
    score_of,
    trial_of,
    ways_of,
    with_factors,
    with_text,
)
from nqf.stages.stage import Stage


def assess(
    run: Run,
    *,
    split: Literal["valid", "test"] = "test",
    protocol: Protocol = "full",
    ks: tuple[int, ...] = (),
    into: str = "",
    parts: Path | None = None,
    card: Callable[[Run, Results], object] | None = None,
) -> Results:
    """Evaluates what the run has trained beside all baselines, and writes the results.

    Args:
      run: The run; stages that are missing or stale are left out of the table.
      split: Which cases. Select on `valid`; open `test` once.
      protocol: `full` catalogue, or the reference's `legacy` candidates.
      ks: Cut-offs; by default those of the configuration.
      into: Folder inside the run for the results; by default `eval` for the test split in full, which the model card
        and the report show, and a folder in it for anything else.
      parts: Folder of parts of the work, shared with other processes that are given the same; one of them writes the
        results when all parts are there, for which it holds the run.
      card: Called with the run and its results where they go to `eval`.

    Raises:
      StageError: The run has no fields stage to evaluate on, it was trained on the cases, `into` leads out of it, or
        `parts` holds something else.
      InUseError: Another process holds the run when shared results are to be written; the parts stay.
    """
    if into and (Path(into).is_absolute() or ".." in Path(into).parts):
        raise StageError(f"--into {into}: outside of the run folder")
    config, dataset = run.config, run.dataset
    if split == "valid" and config.data.refit:
        raise StageError("data.refit: this run was trained on its validation cases; evaluate it with --split test")
    cases = dataset.split.test if split == "test" else dataset.split.valid
    evaluation = dataclasses.replace(config.evaluation, ks=ks) if ks else config.evaluation
    record, shares = {}, Shares(folder=parts)
    if parts is not None:
        settings = {"split": split, "protocol": protocol, "into": into, "evaluation": to_tree(evaluation)}
        record = _record(run, settings | {"cases": len(cases.users), "cases_of_a_part": shares.size})
        check_parts(parts, record)
    results = evaluate(
        scorers(run, cases, shares),
        dataset.interactions,
        dataset.split,
        cases,
        split_name=split,
        config=evaluation,
        seed=config.seed,
        protocol=protocol,
        command=command_line(),
        shares=shares,
    )
    into = into or results_folder(run, results)

    def write() -> None:
        if parts is not None and run_version(run.folder, NAMES) != record["run"]:
            raise StageError(f"{run.folder}: changed while it was evaluated; name a new folder of parts than {parts}")
        with lock_run(run.folder) if parts is not None else contextlib.nullcontext():
            claim(run.folder, Path(into).parts[0])
            write_results(results, run.folder, into)
            if card is not None and into == "eval":
                card(run, results)

    shares.once("written", write)
    return results


def _record(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """What the parts of an evaluation are of, as JSON gives it back.

    Raises:
      StageError: A stage would have to be trained first, which processes do not share.
    """
    if run.config.baselines.sasrec and status(run.config, SASREC, run.folder):
        raise StageError(f"{run.folder}: run python -m nqf.train --run {run.folder} --stage sasrec first")
    version = {"run": run_version(run.folder, NAMES), "sasrec": run.config.baselines.sasrec}
    return json.loads(json.dumps(settings | version))


def scorers(run: Run, cases: Cases, shares: Shares = ALONE) -> dict[str, Scorer]:
    """What is evaluated on some cases: what the run has trained, best first, and every baseline."""
    trained = trained_vectors(run, cases, shares)
    models: dict[str, Scorer] = dict(trained)
    score, dense = score_of(run), dense_score_of(run)
    if "joint" in trained:
        vectors = trained.pop("joint")
        models = {"joint": with_pairs(run, cases, with_text(run, vectors, score), score)}
        if dense.cooccurrence or dense.text:
            models |= {"joint_vectors": with_factors(run, cases, vectors, dense), "joint_learned": vectors}
        elif score.cooccurrence or score.text:
            models["joint_vectors"] = vectors
        models |= trained
    models |= baseline_scorers(run, cases)
    if run.config.baselines.sasrec:
        # Trained here where `--stage all` did not.
        run_stage(run, SASREC.name)
        models["sasrec"] = sasrec = vectors_of(run, SASREC, cases, shares)
        score = sasrec_score(run)
        if score.cooccurrence:
            models["sasrec_cooccurrence"] = with_pairs(run, cases, sasrec, score)
    return models


def results_folder(run: Run, results: Results) -> str:
    """Where results belong by split, protocol and mask, so that none overwrites those of another kind."""
    usual = load_config(run.folder / "config.yaml").evaluation.repeats
    kind = [results.split, *([results.protocol] if results.protocol != "full" else [])]
    kind += ["keep-seen"] if results.repeats and not usual else []
    return "eval" if kind == ["test"] else f"eval/{'-'.join(kind)}"


def trained_vectors(run: Run, cases: Cases, shares: Shares = ALONE) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """User and item vectors of the stages that rank, are finished and fresh, by name, the last stage first."""
    vectors = {}
    for stage in (JOINT, USER):
        if reason := status(run.config, stage, run.folder):
            run.console.print(
                f"[bold]{stage.name}[/bold]  left out of the evaluation: {escape(reason)}", highlight=False
            )
        else:
            vectors[stage.name] = vectors_of(run, stage, cases, shares)
    return vectors


def vectors_of(run: Run, stage: Stage, cases: Cases, shares: Shares = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors of a finished stage that ranks."""
    assert stage.vectors is not None
    return stage.vectors(run, cases, shares)


def baseline_scorers(run: Run, cases: Cases) -> dict[str, Scorer]:
    """The training-free baselines."""
    interactions, split = run.dataset.interactions, run.dataset.split
    text, has_text = run.text
    counts = counts_of(run)
    made = {
        "popular": baselines.popular(interactions, split, cases),
        "recent_popular": baselines.recent_popular(interactions, split, cases, days=run.config.evaluation.recent_days),
        "last_item_cosine": baselines.last_item_cosine(interactions, cases, text, has_text),
        "cooccurrence": baselines.cooccurrence(interactions, split, cases, counts["plain"].counting),
    }
    if "text" in counts:
        beside = text_rows(text, has_text), counts["text"].text
        made["cooccurrence_text"] = baselines.cooccurrence(
            interactions, split, cases, counts["text"].counting, text=beside
        )
    else:
        run.console.print("[bold]counts[/bold]  has not been run, so cooccurrence_text is left out", highlight=False)
    return made


def with_pairs(run: Run, cases: Cases, vectors: tuple[np.ndarray, np.ndarray], score: Score) -> Scorer:
    """Vectors beside counted pairs."""
    if not score.cooccurrence:
        return vectors
    memory = memory_of(run, cases, score.counting)
    return add_cooccurrence(*vectors, score.cooccurrence, memory, run.dataset.interactions, cases)


def sasrec_score(run: Run) -> Score:
    """What counts beside the SASRec's vectors: what the configuration says, or what the validation chooses."""
    options = run.config.baselines
    given, counting = options.sasrec_cooccurrence_weight, counts_of(run)["plain"].counting
    start = Score(counting=dataclasses.replace(counting, **given_counting(options.sasrec_counting)))
    if given is not None or run.config.data.refit or not len(run.dataset.split.valid.users):
        return dataclasses.replace(start, cooccurrence=given or 0.0)
    trial = trial_of(run)
    users, items = vectors_of(run, SASREC, run.dataset.split.valid[trial.which])
    base_NxI, ways = users @ items.T, ways_of(run, options.sasrec_counting)
    chosen = choose_weights(lambda score: trial.value(score, base_NxI, None), start, ["cooccurrence"], ways)
    say_score(run, SASREC.name, chosen)
    return chosen


def command_line() -> str:
    """The command of this process, as a person would type it, for the record; without credentials."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    head = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    return masked(" ".join([head, *sys.argv[1:]]))
