"""Sample users of the report: what they chose, what the best trained model would have shown them, and what came."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nqf.data.splits import Cases, pasts, rankable
from nqf.evaluation.choice import Score
from nqf.evaluation.cooccurrence import newest_of_cases
from nqf.evaluation.ranking import raise_some, top_k
from nqf.evaluation.results import Results, model_ranks
from nqf.stages.artifacts import status
from nqf.stages.graph import stage_of
from nqf.stages.run import Run
from nqf.stages.score import load_with_text, memory_of, score_of
from nqf.stages.user import load_users
from nqf.tools.report.cards import item_cards
from nqf.tools.report.page import User

_SHOWN = 8


def sample_users(run: Run, results: Results, count: int) -> tuple[list[User], dict[str, np.ndarray]]:
    """Sample users of the best trained model, and its item vectors, float32 [I, D], by a name.

    Both are empty, and the console says why, where no trained model is as it was evaluated.
    """
    ranks = model_ranks(results.frame)
    model = next((name for name in ("joint", "user") if name in ranks), None)
    if model is None or count < 1:
        return [], {}
    reason = status(run.config, stage_of(model), run.folder)
    if reason:
        run.console.print("[yellow]warning[/yellow]  ", end="")
        run.console.print(f"no sample users: stage '{model}' has changed since: {reason}", markup=False)
        return [], {}
    score = score_of(run) if model == "joint" else Score()
    cases = run.dataset.split.test if results.split == "test" else run.dataset.split.valid
    trained = load_with_text(run, score, cases) if model == "joint" else load_users(run, before=cases)
    ranker, variables = trained.ranker, trained.variables
    item_vectors = ranker.item_vectors(variables)

    which = _draw(ranks[model], results.frame["cold"].to_numpy(), count)
    interactions = run.dataset.interactions
    # The rows of the results are those of the cases that were ranked.
    cases = cases[rankable(interactions, cases, repeats=results.repeats or results.repeated is None)]
    vectors = ranker.encode_cases(variables, interactions, run.features, cases, which)
    before = pasts(interactions, cases[which])
    left_out = [[]] * len(before) if results.repeats else before
    best = top_k(vectors, item_vectors, _SHOWN, left_out)
    if score.cooccurrence:
        memory = memory_of(run, cases, score.counting)
        pairs = score.cooccurrence * memory.scores(newest_of_cases(interactions, cases, which, memory.how.newest))
        best = raise_some(best, vectors, item_vectors, pairs, left_out)
    users = [
        _user(run, results, model, cases, case, past, recommended)
        for case, past, recommended in zip(which.tolist(), before, best[1], strict=True)
    ]
    return users, {f"{model}, item side of the score": item_vectors}


def _draw(ranks_N: np.ndarray, cold_N: np.ndarray, count: int) -> np.ndarray:
    """Cases whose target was found, was not found, and was never seen in training, int [count] at most."""
    rng = np.random.default_rng(0)
    found_N = ranks_N <= 10
    kinds = (found_N & ~cold_N, ~found_N & ~cold_N, cold_N)
    wanted = (count - count // 3 - count // 6, count // 3, count // 6)
    return np.concatenate([
        rng.permutation(np.flatnonzero(kind))[:number] for kind, number in zip(kinds, wanted, strict=True)
    ])  # fmt: skip


def _user(
    run: Run,
    results: Results,
    model: str,
    cases: Cases,
    case: int,
    past: np.ndarray,
    recommended: Sequence[int],
) -> User:
    interactions, catalogue = run.dataset.interactions, run.dataset.catalogue
    target = int(interactions.items[cases.cuts[case]])
    ids = [catalogue.item_ids[row] for row in [*past[1 - _SHOWN :], *recommended, target]]
    cards = item_cards(catalogue, ids)
    shown = len(recommended) + 1
    history, first, next_one = cards[:-shown], cards[-shown:-1], cards[-1]
    rank = f"{model_ranks(results.frame)[model][case]:,.1f}".removesuffix(".0")
    kind = " unseen in training" if results.frame["cold"][case] else ""
    return User(
        heading=f"User {interactions.user_ids[cases.users[case]]} · {len(past):,} items so far · "
        f"next item{kind} at rank {rank} of {results.items:,} ({model})",
        history=history,
        recommended=[
            dataclasses.replace(card, note=f"rank {place}", marked=int(row) == target)
            for place, (row, card) in enumerate(zip(recommended, first, strict=True), 1)
        ],
        target=dataclasses.replace(next_one, marked=True, note=f"rank {rank}"),
    )
