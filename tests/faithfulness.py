"""Whether explanations are faithful: what they name is deleted, and its effect on the rank compared with chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from nqf.evaluation.metrics import mean_intervals
from nqf.serving.recommender import Recommender


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Faithfulness:
    """Whether the evidence that explanations name matters more than other parts of the history.

    Attributes:
      cases: One row per case: item_id, rank (with the whole history), rank_named (without the named evidence),
        rank_random (geometric mean without as much random evidence that was not named).
      named: Mean of log2(rank_named / rank) with its 95 % interval: how often the rank doubles.
      random: The same of rank_random.
      difference: `named` minus `random`, paired; above zero the explanations are faithful.
    """

    cases: pl.DataFrame
    named: list[float]
    random: list[float]
    difference: list[float]


def faithfulness(
    recommender: Recommender,
    cases: Sequence[tuple[Sequence[str], str]],
    *,
    by: Literal["effect", "attention"] = "effect",
    remove: int = 2,
    draws: int = 5,
    seed: int = 0,
) -> Faithfulness:
    """Deletes the named evidence from histories, and random evidence, and compares what it does to the rank.

    Deletion as a test of explanations: DeYoung et al. 2020 (ERASER, arXiv 1911.03429, comprehensiveness).

    Args:
      recommender: Explains and ranks.
      cases: Histories of item ids, oldest first, longer than `remove`, each with the item to explain.
      by: What names the evidence.
      remove: History items that are removed at once.
      draws: Random removals per case.
      seed: Seed of the random removals and of the bootstrap.

    Raises:
      ValueError: A history that is too short, or an unknown item id.
    """
    rng = np.random.default_rng(seed)
    histories: list[Sequence[str]] = []
    for history, item_id in cases:
        if len(history) <= remove:
            raise ValueError(f"a history of {len(history)} items cannot lose {remove} and be compared with others")
        explanation = recommender.explain(history, item_id)
        named = explanation.history.sort(by, descending=True)["position"][:remove].to_numpy() - 1
        others = np.setdiff1d(np.arange(len(history)), named)
        removed = [named, *(rng.choice(others, min(remove, len(others)), replace=False) for _ in range(draws))]
        histories.append(history)
        histories += [[item for at, item in enumerate(history) if at not in gone] for gone in removed]
    # All of them in one call: the whole history, without the named evidence, without each random draw.
    whole = [case for case in cases for _ in range(2 + draws)]
    ranks = recommender.rank(histories, [item for _, item in whole], left_out=[history for history, _ in whole])
    ranks = ranks.reshape(len(cases), 2 + draws)
    frame = pl.DataFrame(
        {
            "item_id": [item_id for _, item_id in cases],
            "rank": ranks[:, 0],
            "rank_named": ranks[:, 1],
            "rank_random": np.exp2(np.log2(ranks[:, 2:]).mean(axis=1)),
        }
    )
    drops = {name: np.log2((frame[f"rank_{name}"] / frame["rank"]).to_numpy()) for name in ("named", "random")}
    drops["difference"] = drops["named"] - drops["random"]
    return Faithfulness(cases=frame, **mean_intervals(drops, bootstrap=1_000, seed=seed))
