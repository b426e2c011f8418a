"""SASRec stage: the trained baseline, with cross-entropy over the whole catalogue at every position.

That is what makes a SASRec strong (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np

from nqf.config import LossConfig, OptimConfig
from nqf.data.splits import Cases
from nqf.evaluation.shares import ALONE, Shares
from nqf.models.sasrec import SASRec
from nqf.pipelines.batches import HistoryBatch, ItemTables
from nqf.pipelines.histories import training_windows
from nqf.stages.artifacts import restore_best
from nqf.stages.rank import (
    RankParts,
    case_vectors,
    history_data,
    init_rank,
    log_popularity,
    make_validation,
    ranker_of,
)
from nqf.stages.ranking_loss import batch_tables, ranking_loss
from nqf.stages.run import Run
from nqf.stages.stage import TRAINED, Stage
from nqf.training.program import Program


def sasrec_parts(run: Run) -> RankParts:
    """The network; of items it knows their number alone."""
    items, options = len(run.dataset.catalogue.item_ids), run.config.baselines.sasrec_options
    nothing, there = np.zeros((items, 0), np.float32), np.ones(items, bool)
    tables = ItemTables(
        tokens=nothing[:, None], vectors=nothing, fields=nothing, neighbors=nothing, text=nothing, has_text=~there,
        trained=there, titles=nothing.astype(np.int32),
    )  # fmt: skip
    return RankParts(module=SASRec(config=options, items=items), tables=tables, max_history=options.max_history)


def sasrec_program(run: Run, abstract: bool = False) -> Program:
    """What the baseline trains: warm-up of one epoch, then cosine decay to zero."""
    config, options, parts = run.config, run.config.baselines.sasrec_options, sasrec_parts(run)
    loss = LossConfig(negatives="full")
    windows = training_windows(run.dataset.interactions, run.dataset.split, options.max_history)
    slots = np.minimum(windows.slots(), options.max_history)
    lengths = {"max_history": options.max_history, "positions": options.max_history, "even_slots": True}
    optim = OptimConfig(
        batch_size=max(1, round(options.batch_positions / max(1.0, slots.mean()))) if len(slots) else 1,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_share=1 / max(1, options.epochs),
        final_share=0.0,
        weight_decay=options.weight_decay,
        patience=options.patience,
    )

    def loss_fn(params: Any, frozen: Any, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
        tables, rows = batch_tables(frozen["tables"], batch)
        made = parts.module.apply(
            {"params": params},
            tables,
            rows,
            batch.history,
            positions=batch.targets.shape[1],
            deterministic=False,
            rngs={"dropout": key},
        )
        users, items, _ = cast(tuple[jax.Array, jax.Array, None], made)
        ranking = ranking_loss(
            loss,
            users,
            items,
            batch,
            learned_width=options.width,
            text_RxT=tables.text,
            trained=tables.trained,
            log_popularity=frozen["log_popularity"],
        )
        return ranking, {}

    def validation() -> Any:
        check = make_validation(run, ranker_of(run, parts))
        return (lambda params: check({"params": params})) if check else None

    return Program(
        module=parts.module,
        init=lambda: init_sasrec(run, parts),
        frozen=lambda: {"tables": parts.tables, "log_popularity": log_popularity(run)},
        variables=lambda params: {"params": params},
        loss_fn=loss_fn,
        data=lambda optim: history_data(run, loss, optim, None, seed=config.seed, **lengths),
        optim=optim,
        seed=config.seed,
        validate=validation,
        score="ndcg@10",
        report=lambda params, metrics: dict(metrics),
    )


def init_sasrec(run: Run, parts: RankParts) -> Any:
    """Fresh parameters."""
    return init_rank(run, parts, seed=run.config.seed, slots=1)["params"]


def load_sasrec(run: Run) -> tuple[RankParts, Any]:
    """The trained network and its variables."""
    parts = sasrec_parts(run)
    return parts, {"params": restore_best(run.folder, "sasrec", lambda: init_sasrec(run, parts))}


def sasrec_vectors(run: Run, cases: Cases, shares: Shares = ALONE) -> tuple[np.ndarray, np.ndarray]:
    """User and item vectors of the trained baseline."""
    parts, variables = load_sasrec(run)
    return case_vectors(run, "sasrec", ranker_of(run, parts), variables, cases, shares)


SASREC = Stage(
    name="sasrec",
    after=("fields",),
    reads=("seed", "baselines.sasrec_options"),
    # The last is what versions before 0.2 wrote.
    writes=(*TRAINED, "params.npz"),
    checked=("sasrec/checkpoints/BEST/**/*",),
    program=sasrec_program,
    vectors=sasrec_vectors,
)
