"""Evaluation of a run: its trained models and every baseline, on the same cases, in one table."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import to_tree
from nqf.data.splits import Cases
from nqf.evaluation import baselines
from nqf.evaluation.cooccurrence import add_cooccurrence
from nqf.evaluation.ranking import Scorer
from nqf.evaluation.results import Protocol, Results, evaluate, write_results
from nqf.stages.artifacts import StageError, fingerprint, read_artifact, status, write_artifact
from nqf.stages.joint import load_joint
from nqf.stages.run import Run
from nqf.stages.sasrec import SASRec, TrainedSASRec, train_sasrec
from nqf.stages.user import load_users


def assess(
    run: Run,
    *,
    split: Literal["valid", "test"] = "test",
    protocol: Protocol = "full",
    ks: tuple[int, ...] = (),
    into: str = "eval",
) -> Results:
    """Evaluates what the run has trained beside all baselines; writes eval/.

    Args:
      run: The run; stages that are missing or stale are left out of the table.
      split: Which cases. Select on `valid`; open `test` once.
      protocol: `full` catalogue, or the reference's `legacy` candidates.
      ks: Cut-offs; by default those of the configuration.
      into: Folder inside the run for the results.

    Raises:
      StageError: The run has no fields stage to evaluate on, or it was trained on the cases.
    """
    config, dataset = run.config, run.dataset
    if split == "valid" and config.data.refit:
        raise StageError("data.refit: this run was trained on its validation cases; evaluate it with --split test")
    cases = dataset.split.test if split == "test" else dataset.split.valid
    evaluation, interactions = config.evaluation, dataset.interactions
    # Counted once, when it is first asked for.
    memory = functools.cache(lambda: run.cooccurrence(cases))

    def with_pairs(vectors: tuple[np.ndarray, np.ndarray], weight: float) -> Scorer:
        return add_cooccurrence(*vectors, weight, memory(), interactions, cases)

    models = trained_scorers(run, cases)
    if evaluation.cooccurrence_weight and "joint" in models:
        vectors = models.pop("joint")
        models = {"joint": with_pairs(vectors, evaluation.cooccurrence_weight), "joint_vectors": vectors, **models}
    models |= baseline_scorers(run, cases)
    if config.baselines.sasrec:
        models["sasrec"] = sasrec(run).scorer(interactions, cases)
        if weight := config.baselines.sasrec_cooccurrence_weight:
            models["sasrec_cooccurrence"] = with_pairs(models["sasrec"], weight)
    results = evaluate(
        models,
        dataset.interactions,
        dataset.split,
        cases,
        split_name=split,
        config=dataclasses.replace(evaluation, ks=ks) if ks else evaluation,
        seed=config.seed,
        protocol=protocol,
        command=command_line(),
    )
    write_results(results, run.folder, into)
    return results


def trained_scorers(run: Run, cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """User and item vectors of the stages that are finished and fresh, by name."""
    which = np.arange(len(cases.users))
    scorers = {}
    for name in ("joint", "user"):
        reason = status(run.config, name, run.folder)
        if reason:
            run.console.print(f"[bold]{name}[/bold]  left out of the evaluation: {reason}", highlight=False)
            continue
        ranker, variables = load_joint(run)[1:3] if name == "joint" else load_users(run)
        users = ranker.encode_cases(variables, run.dataset.interactions, run.features, cases, which)
        scorers[name] = (users, ranker.item_vectors(variables))
    return scorers


def baseline_scorers(run: Run, cases: Cases) -> dict[str, Scorer]:
    """The training-free baselines."""
    interactions, split = run.dataset.interactions, run.dataset.split
    text, has_text = run.text
    return {
        "popular": baselines.popular(interactions, split, cases),
        "recent_popular": baselines.recent_popular(interactions, split, cases, days=run.config.evaluation.recent_days),
        "last_item_cosine": baselines.last_item_cosine(interactions, cases, text, has_text),
        "cooccurrence": baselines.cooccurrence(interactions, split, cases),
    }


def sasrec(run: Run) -> TrainedSASRec:
    """The run's SASRec: trained once, kept in `sasrec/params.npz`, and trained anew when data or options change."""
    config, dataset, folder = run.config, run.dataset, run.folder / "sasrec"
    parts = {
        "options": to_tree(config.baselines.sasrec_options),
        "seed": config.seed,
        "input fields": read_artifact(run.folder, "fields").fingerprint,
    }
    model = SASRec(config=config.baselines.sasrec_options, items=len(dataset.split.cold))
    stored = read_artifact(run.folder, "sasrec")
    if stored is not None and stored.fingerprint == fingerprint(parts):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        with np.load(folder / "params.npz", allow_pickle=False) as arrays:
            params = jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], shapes)
        return TrainedSASRec(model=model, params=params, history=stored.result["history"])

    def report(entry: dict[str, float]) -> None:
        text = f"epoch {entry['epoch']:>3}  loss {entry['loss']:.4f}"
        text += f"  ndcg@10 {entry['ndcg@10']:.4f}" if "ndcg@10" in entry else ""
        run.console.print(f"[bold]sasrec[/bold]  {text}", highlight=False)

    started = time.perf_counter()
    trained = train_sasrec(
        dataset.interactions,
        dataset.split,
        config.baselines.sasrec_options,
        seed=config.seed,
        select=not config.data.refit,
        report=report,
    )
    folder.mkdir(exist_ok=True)
    # A kill in between must not leave new parameters under an old record.
    (folder / "stage.json").unlink(missing_ok=True)
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trained.params)[0]}
    temporary = folder / "params.tmp"
    with temporary.open("wb") as file:
        np.savez(file, **leaves)
    os.replace(temporary, folder / "params.npz")
    result = {"history": trained.history, "wall_seconds": round(time.perf_counter() - started, 1)}
    write_artifact(run.folder, "sasrec", parts, result)
    return trained


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(part.key for part in path)


def command_line() -> str:
    """The command of this process, as a person would type it, for the record."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    head = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    return " ".join([head, *sys.argv[1:]])
