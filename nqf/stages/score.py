"""Stages that choose on the validation cases what a score counts besides vectors. Nothing is trained.

`counts`: how pairs of items count, alone and beside texts; the baselines `cooccurrence` and `cooccurrence_text`.
`score`: what counts and texts weigh beside the joint stage's vectors, in evaluations and recommendations, and what
factors of the counts weigh in vectors that a dense index ranks by alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nqf.config import CountingConfig, load_config
from nqf.data.splits import Cases
from nqf.evaluation.baselines import known_events
from nqf.evaluation.choice import (
    CASES,
    Score,
    Trial,
    Ways,
    choose_counting,
    choose_weights,
    counting_ways,
    has_ties,
    text_rows,
)
from nqf.evaluation.cooccurrence import Cooccurrence, Counting, count_pairs, newest_of_cases, stand_in
from nqf.evaluation.factors import RANK, factorize
from nqf.fields.encoder import unit_rows
from nqf.stages.artifacts import status
from nqf.stages.folder import owned
from nqf.stages.joint import joint_vectors, load_joint
from nqf.stages.rank import Trained
from nqf.stages.records import StageError, read_artifact
from nqf.stages.run import Run
from nqf.stages.stage import Stage


def trial_of(run: Run, text_IxT: np.ndarray | None = None) -> Trial:
    """The run's validation cases, for choosing."""
    dataset, cases = run.dataset, run.dataset.split.valid
    return Trial(
        dataset.interactions,
        known_events(dataset.interactions, dataset.split, cases),
        cases,
        len(dataset.catalogue.item_ids),
        repeats=run.config.evaluation.repeats,
        text_IxT=text_IxT,
    )


def make_counts(run: Run) -> dict[str, Any]:
    """Runs the stage `counts`; its record holds both scores and their NDCG@10 on the validation cases."""
    if not len(run.dataset.split.valid.users):
        return {
            "plain": dataclasses.asdict(Score(cooccurrence=1.0)),
            "text": dataclasses.asdict(Score(cooccurrence=1.0)),
        }
    ties, chosen = has_ties(run.dataset.interactions), {}
    for name, text in (("plain", False), ("text", True)):
        chosen[name] = choose_counting(trial_of(run, text_rows(*run.text) if text else None), ties=ties, text=text)
        say_score(run, "counts", chosen[name])
    return {name: dataclasses.asdict(score) for name, score in chosen.items()}


COUNTS = Stage(name="counts", after=("fields",), reads=("evaluation.repeats",), writes=(), checked=(), make=make_counts)


def _counting(run: Run) -> Counting:
    """How pairs count beside texts, as chosen, but for what is given."""
    counts = counts_of(run)
    return dataclasses.replace(
        counts.get("text", counts["plain"]).counting, **given_counting(run.config.evaluation.counting)
    )


def given_counting(counting: CountingConfig) -> dict[str, Any]:
    """What a configuration says of how pairs count, as changes of a `Counting`."""
    return {name: value for name, value in dataclasses.asdict(counting).items() if value is not None}


def ways_of(run: Run, counting: CountingConfig) -> Ways:
    """Ways in which pairs may count, without what the configuration gives."""
    given, ways = given_counting(counting), {}
    for axis, changes in counting_ways(ties=has_ties(run.dataset.interactions)).items():
        free = [{key: value for key, value in change.items() if key not in given} for change in changes]
        if any(free):
            ways[axis] = free
    return ways


def counts_of(run: Run) -> dict[str, Score]:
    """The training-free scores by name, `plain` and `text`, as chosen; where the stage was never run, `plain` with the
    constants of versions before 0.3 alone.

    Raises:
      StageError: The stage is stale, or its record is gone.
    """
    record = _record(run, COUNTS)
    if record is None:
        return {"plain": Score(cooccurrence=1.0)}
    return {name: Score.of(record[name]) for name in ("plain", "text")}


def make_score(run: Run, rank: int = RANK) -> dict[str, Any]:
    """Runs the stage `score`; its record: the score, what factors weigh, NDCG@10 of both and of the vectors alone."""
    evaluation = run.config.evaluation
    given = {"cooccurrence": evaluation.cooccurrence_weight, "text": evaluation.text_weight}
    start = Score(counting=_counting(run), **{name: weight or 0.0 for name, weight in given.items()})
    candidates = run.config.candidates
    texts = candidates.frozen_similarity and not candidates.frozen
    free = [name for name, weight in given.items() if weight is None and (texts or name != "text")]
    if run.config.data.refit or not len(run.dataset.split.valid.users):
        if missing := [*free, *(["factor"] if evaluation.factor_weight is None else [])]:
            keys = " and ".join(f"evaluation.{name}_weight" for name in missing)
            run.console.print(
                f"[yellow]warning[/yellow]  there are no validation cases to choose {keys} on, so they are 0; give "
                "what a run without data.refit chose",
                highlight=False,
            )
        if start.text:
            # Of histories alone: no target is read.
            users, _ = joint_vectors(run, run.dataset.split.test[:CASES])
            start = dataclasses.replace(
                start, gate=float(_gates(users, candidates.width).mean()) if len(users) else 0.0
            )
        dense = dataclasses.replace(start, cooccurrence=evaluation.factor_weight or 0.0)
        return dataclasses.asdict(start) | {"dense": dataclasses.asdict(dense if dense.cooccurrence else Score())}
    text_IxT = read_text(run)
    trial = trial_of(run, text_IxT)
    users, items = joint_vectors(run, run.dataset.split.valid[trial.which])
    base_NxI, learned, text_NxI = users @ items.T, candidates.width, None
    new = np.flatnonzero(run.dataset.split.cold)
    gates_Nx1 = learned_NxJ = np.zeros((0, 0), np.float32)
    if texts:
        text_NxI, gates_Nx1 = unit_rows(users[:, learned:]) @ text_IxT.T, _gates(users, learned)[:, None]
        start = dataclasses.replace(start, gate=float(gates_Nx1.mean()))
        learned_NxJ = users[:, :learned] @ items[new, :learned].T

    def value(score: Score, added_NxI: np.ndarray | None = None) -> float:
        if text_NxI is not None:
            # What texts give new items depends on what they weigh; `trial` adds its part for all.
            weight = score.new_item_weight(evaluation.new_item_weight)
            base_NxI[:, new] = learned_NxJ + ((gates_Nx1 + score.text) * weight - score.text) * text_NxI[:, new]
        return trial.value(score, base_NxI if added_NxI is None else base_NxI + added_NxI, text_NxI)

    alone = value(Score())
    chosen = choose_weights(value, start, free, ways_of(run, evaluation.counting))
    say_score(run, "score", chosen)
    record = {**dataclasses.asdict(chosen), "alone": alone}
    if evaluation.factor_weight == 0:
        return record
    start = dataclasses.replace(start, counting=chosen.counting, cooccurrence=evaluation.factor_weight or 0.0)
    free = [*(["cooccurrence"] if evaluation.factor_weight is None else []), *(["text"] if "text" in free else [])]
    dense = _choose_dense(trial, value, start, free, rank)
    say_score(run, "dense", dense)
    return {**record, "dense": dataclasses.asdict(dense)}


def _choose_dense(
    trial: Trial, value: Callable[[Score, np.ndarray], float], start: Score, free: Sequence[str], rank: int
) -> Score:
    """What factors of the pairs weigh in their place, and texts beside them."""
    memory = trial.counted(start.counting)
    near_NxI = factorize(memory, rank).scores(trial.newest(memory.how.newest))

    def dense_value(score: Score) -> float:
        return value(dataclasses.replace(score, cooccurrence=0.0), score.cooccurrence * near_NxI)

    return choose_weights(dense_value, start, free)


def _gates(users_NxD: np.ndarray, learned: int) -> np.ndarray:
    """What vectors of users give the frozen similarity, float32 [N]."""
    return np.linalg.norm(users_NxD[:, learned:], axis=1)


SCORE = Stage(
    name="score",
    after=("joint", "counts"),
    reads=(
        "evaluation.counting",
        *(f"evaluation.{name}_weight" for name in ("cooccurrence", "text", "factor", "new_item")),
    ),
    writes=(),
    checked=(),
    make=make_score,
)


def score_of(run: Run) -> Score:
    """What the run's score adds to the joint stage's vectors.

    Where the stage was never run, as in a run of a version before 0.3, weights that the configuration gives count.

    Raises:
      StageError: A weight is to be chosen, and the stage is stale, or its record is gone.
    """
    evaluation = run.config.evaluation
    given = {"cooccurrence": evaluation.cooccurrence_weight, "text": evaluation.text_weight}
    given = {name: weight for name, weight in given.items() if weight is not None}
    record = _record(run, SCORE, needed=len(given) < 2)
    if record is None:
        return Score(counting=_counting(run), **given)
    record = {name: value for name, value in record.items() if name in Score.__dataclass_fields__}
    return dataclasses.replace(Score.of(record), **given)


def dense_score_of(run: Run) -> Score:
    """What vectors that rank by themselves have beside what was learned: `cooccurrence` weighs factors of the counts.

    All zero where the stage was never run, is stale, or is of a version before 0.3.
    """
    record, given = _record(run, SCORE, needed=False), run.config.evaluation.factor_weight
    found = Score.of(record["dense"]) if record and "dense" in record else Score(counting=_counting(run))
    return found if given is None else dataclasses.replace(found, cooccurrence=given)


def with_factors(
    run: Run, cases: Cases, vectors: tuple[np.ndarray, np.ndarray], score: Score
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of `joint_vectors` with what `dense_score_of` gives them: users float32 [N, D + F], items [I, D + F]."""
    users_NxD, items_IxD = with_text(run, vectors, score)
    if not score.cooccurrence:
        return users_NxD, items_IxD
    factors = factorize(memory_of(run, cases, score.counting))
    newest = newest_of_cases(run.dataset.interactions, cases, np.arange(len(cases.users)), score.counting.newest)
    users_NxF = score.cooccurrence * factors.users(newest)
    return np.concatenate([users_NxD, users_NxF], axis=1), np.concatenate([items_IxD, factors.candidate], axis=1)


def load_scored(run: Run) -> tuple[Trained, Score, Cooccurrence | None]:
    """The joint model with what its texts weigh, its score, and the pairs that the score counts, None for none.

    Test targets are not counted, so that trying a recommender on test users tells the truth.
    """
    score = score_of(run)
    memory = memory_of(run, run.dataset.split.test, score.counting) if score.cooccurrence else None
    return load_with_text(run, score, run.dataset.split.test), score, memory


def load_with_text(run: Run, score: Score, before: Cases) -> Trained:
    """The joint model with what texts weigh in a score, as it is before some cases."""
    weight = score.new_item_weight(run.config.evaluation.new_item_weight)
    return load_joint(run, text_weight=score.text, new_item_weight=weight, before=before)


def read_text(run: Run) -> np.ndarray:
    """Frozen texts as the models read them, unit rows, float32 [I, T]."""
    return unit_rows(run.text_features(*run.text))


def memory_of(run: Run, cases: Cases, how: Counting) -> Cooccurrence:
    """Pairs of items in the events that are known before some cases, those that stand in included."""
    interactions, split = run.dataset.interactions, run.dataset.split
    memory = count_pairs(interactions, known_events(interactions, split, cases), len(split.cold), how)
    return stand_in(memory, read_text(run)) if how.stand_ins else memory


def with_text(run: Run, vectors: tuple[np.ndarray, np.ndarray], score: Score) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of `load_with_text`, of those without it: users float32 [N, D] and items float32 [I, D]."""
    if not score.text:
        return vectors
    new = run.dataset.split.cold
    return weigh_text(run, vectors, score, new=new, text_JxT=read_text(run)[new])


def weigh_text(
    run: Run,
    vectors: tuple[np.ndarray, np.ndarray],
    score: Score,
    *,
    new: np.ndarray,
    text_JxT: np.ndarray,
    before: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors with other weights of texts.

    Args:
      run: The run.
      vectors: Users float32 [N, D] and items float32 [I, D] of the joint stage.
      score: What texts shall weigh.
      new: bool [I], items that training never saw.
      text_JxT: Their texts, unit rows.
      before: What texts weigh in the users' vectors beyond what was learned.
    """
    users_NxD, items_IxD = vectors
    candidates = run.config.candidates
    if candidates.frozen or not candidates.frozen_similarity:
        return vectors
    learned, text = candidates.width, users_NxD[:, candidates.width :]
    text = text + (score.text - before) * unit_rows(text)
    items_IxD = items_IxD.copy()
    items_IxD[new, learned:] = score.new_item_weight(run.config.evaluation.new_item_weight) * text_JxT
    return np.concatenate([users_NxD[:, :learned], text], axis=1), items_IxD


def _record(run: Run, stage: Stage, *, needed: bool = True) -> dict[str, Any] | None:
    """What a stage chose, None if it was never run, or is stale and not needed."""
    # By the saved configuration: what is tried in place of it, as seen items kept, changes nothing that was chosen.
    if reason := status(load_config(run.folder / "config.yaml"), stage, run.folder):
        if needed and stage.name in owned(run.folder):
            raise StageError(
                f"{run.folder}: stage '{stage.name}' cannot be used: {reason}. "
                f"Run python -m nqf.train --run {run.folder} --stage all."
            )
        return None
    artifact = read_artifact(run.folder, stage.name)
    assert artifact is not None, "its status was asked for"
    return artifact.result


def say_score(run: Run, stage: str, score: Score) -> None:
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(score.counting).items())
    run.console.print(
        f"[bold]{stage}[/bold]  ndcg@10 {score.ndcg:.4f}: co-occurrence {score.cooccurrence:g}, text {score.text:g}; "
        f"{settings}",
        highlight=False,
    )
