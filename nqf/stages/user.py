"""User stage: the User Q-Former and the candidate tower learn on histories of item tokens."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from nqf.config import Config
from nqf.data.splits import Cases
from nqf.evaluation.shares import ALONE, Shares
from nqf.ops.pins import take_rows
from nqf.pipelines.batches import HistoryBatch
from nqf.stages.artifacts import restore_best
from nqf.stages.item import load_items
from nqf.stages.rank import (
    RankParts,
    Trained,
    case_vectors,
    frozen_tables,
    history_data,
    init_rank,
    log_popularity,
    make_validation,
    rank_module,
    ranker_of,
)
from nqf.stages.ranking_loss import batch_tables, ranking_loss
from nqf.stages.run import Run
from nqf.stages.stage import TRAINED, Stage
from nqf.training.program import LossFn, Program


def user_parts(run: Run, abstract: bool = False, *, before: Cases | None = None) -> RankParts:
    """The rank model without a language model; `before` is that of `Run.tables`."""
    tables = run.abstract_tables() if abstract else run.tables(run.folder / "tokens", before=before)
    return RankParts(
        module=rank_module(run.config, tables, run.dtype), tables=tables, max_history=run.config.user.max_history
    )


def init_user(run: Run, parts: RankParts) -> Any:
    """Fresh parameters of the user model."""
    return init_rank(run, parts, seed=run.config.seed + 1, slots=1)["params"]


def make_user_loss(config: Config, module: nn.Module) -> LossFn:
    """Ranking loss plus the weighted regression of the next item's query tokens."""

    def loss_fn(params: Any, frozen: Any, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
        step_tables, rows = batch_tables(frozen["tables"], batch)
        made = module.apply(
            {"params": params},
            step_tables,
            rows,
            batch.history,
            None,
            positions=batch.targets.shape[1],
            deterministic=False,
            rngs={"dropout": key},
        )
        users, items, predicted = cast(tuple[jax.Array, jax.Array, jax.Array], made)
        ranking = jnp.zeros(())
        if config.user.ranking_weight:
            ranking = ranking_loss(
                config.user.loss,
                users,
                items,
                batch,
                learned_width=config.candidates.learned_width,
                text_RxT=step_tables.text,
                trained=step_tables.trained,
                log_popularity=frozen["log_popularity"],
            )
        true = take_rows(jnp.asarray(step_tables.tokens), jnp.maximum(batch.targets, 0)).astype(jnp.float32)
        error = jnp.mean(jnp.square(predicted.astype(jnp.float32) - true), axis=(-2, -1))
        supervised = (batch.targets >= 0).astype(jnp.float32)
        regression = jnp.sum(error * supervised) / jnp.maximum(jnp.sum(supervised), 1.0)
        loss = config.user.ranking_weight * ranking + config.user.regression_weight * regression
        return loss, {"ranking": ranking, "regression": regression}

    return loss_fn


def user_program(run: Run, abstract: bool = False) -> Program:
    """What the user stage trains."""
    config, parts = run.config, user_parts(run, abstract)
    on_device = frozen_tables(run, parts.tables, config.user.loss)

    def validation() -> Any:
        check = make_validation(run, ranker_of(run, parts))
        # Without a ranking loss nothing that ranks was trained.
        return (lambda params: check({"params": params})) if check and config.user.ranking_weight else None

    return Program(
        module=parts.module,
        init=lambda: init_user(run, parts),
        frozen=lambda: {"tables": on_device, "log_popularity": log_popularity(run)},
        variables=lambda params: {"params": params},
        loss_fn=make_user_loss(config, parts.module),
        data=lambda optim: history_data(
            run,
            config.user.loss,
            optim,
            None if on_device else parts.tables,
            seed=config.seed + 1,
            max_history=config.user.max_history,
            positions=config.joint.prompt.history_items,
            item_dropout=config.user.item_dropout,
        ),
        optim=config.user.optim,
        seed=config.seed + 1,
        validate=validation,
        score="ndcg@10",
        report=lambda params, metrics: dict(metrics),
    )


def load_users(run: Run, *, before: Cases | None = None) -> Trained:
    """The trained user model; `before` is that of `Run.tables`."""
    parts = user_parts(run, before=before)
    params = restore_best(run.folder, "user", lambda: init_user(run, parts))
    return Trained(
        parts=parts,
        ranker=ranker_of(run, parts),
        variables={"params": params},
        load_item_qformer=lambda: load_items(run),
    )


def user_vectors(run: Run, cases: Cases, shares: Shares = ALONE) -> tuple[Any, Any]:
    """User and item vectors of the trained user model."""
    trained = load_users(run, before=cases)
    return case_vectors(run, "user", trained.ranker, trained.variables, cases, shares)


USER = Stage(
    name="user",
    after=("tokens",),
    reads=("seed", "candidates", "user", "joint.prompt.history_items"),
    writes=TRAINED,
    checked=("user/checkpoints/BEST/**/*",),
    program=user_program,
    vectors=user_vectors,
)
