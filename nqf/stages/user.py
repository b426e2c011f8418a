"""User stage: train the User Q-Former and the candidate tower on histories of item tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import Config, LossConfig
from nqf.evaluation.metrics import summarize
from nqf.evaluation.ranking import rank_vectors
from nqf.models.recommender import ItemTables, UserModel
from nqf.pipelines.datasets import TrainingData, history_dataset
from nqf.pipelines.histories import HistoryBatch, history_of_items, training_windows
from nqf.stages.artifacts import read_artifact
from nqf.stages.item import tables_on_device
from nqf.stages.ranker import Ranker, batch_tables, compute_dtype, make_ranker, ranking_loss
from nqf.stages.run import Run
from nqf.training.checkpoint import restore_params
from nqf.training.loop import LossFn, fit
from nqf.training.mesh import batch_shard

VALIDATION_CASES = 5_000
"""Validation cases per selection at most; the standard error of HR@10 is then below 0.005."""


def user_module(config: Config, tables: ItemTables) -> UserModel:
    """The user model that fits some item tables."""
    return UserModel(
        config=config,
        items=len(tables.has_text),
        item_tokens=tables.tokens.shape[1:],
        dtype=compute_dtype(config.training.dtype),
    )


def empty_history(run: Run, slots: int) -> Any:
    """One empty history of the run's shapes, for initialization."""
    reviews = run.features.reviews
    return history_of_items(np.full((1, slots), -1, np.int32), 0 if reviews is None else reviews.values.shape[1])


def init_user(run: Run, module: UserModel, tables: ItemTables) -> Any:
    """Fresh parameters of the user model."""
    rows = np.zeros(1, np.int32)
    key = jax.random.key(run.config.seed + 1)
    # Compiled: it is faster than op by op, and `jax.eval_shape` passes through it.
    return jax.jit(module.init, static_argnames="positions")(
        key, tables.take(rows), rows, empty_history(run, 1), positions=1
    )["params"]


def history_data(
    run: Run, loss: LossConfig, optim: Any, tables: ItemTables | None, seed: int, given: np.ndarray | None = None
) -> TrainingData:
    """Training batches of the user or joint stage."""
    config, dataset = run.config, run.dataset
    positions = config.joint.prompt.history_items
    return history_dataset(
        training_windows(dataset.interactions, dataset.split, positions),
        run.features,
        loss=loss,
        max_history=config.user.max_history,
        positions=positions,
        item_dropout=config.user.item_dropout,
        batch_size=optim.batch_size,
        epochs=optim.epochs,
        seed=seed,
        workers=config.training.workers,
        items=len(dataset.catalogue.item_ids),
        tables=tables,
        given=given,
        shard=batch_shard(config.training.mesh),
    )


def frozen_tables(run: Run, tables: ItemTables, loss: LossConfig) -> ItemTables | None:
    """The tables if training keeps them on the device, else None (each batch then carries its rows).

    Raises:
      ValueError: Full-catalogue negatives with tables on the host.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tables))
    if tables_on_device(run, size):
        return jax.tree.map(np.asarray, tables)
    if loss.negatives == "full":
        raise ValueError(
            f"the item tables ({size / 2**30:.1f} GiB) stay on the host, so negatives cannot be 'full'; set "
            "loss.negatives to 'sampled', or raise training.device_table_gib"
        )
    return None


def log_popularity(run: Run) -> np.ndarray:
    """Log share of the training events per item, float32 [I]."""
    split, items = run.dataset.split, len(run.dataset.catalogue.item_ids)
    counts = np.bincount(run.dataset.interactions.items[split.train], minlength=items)
    share = np.maximum(counts, 0.5) / max(counts.sum(), 1)
    return np.log(share).astype(np.float32)


def make_validation(run: Run, ranker: Ranker) -> Callable[[Any], dict[str, float]] | None:
    """A function from variables to metrics on a fixed sample of the validation cases, masked as the evaluation.

    None where these cases are trained on.
    """
    if run.config.data.refit:
        return None
    dataset, evaluation = run.dataset, run.config.evaluation
    cases = dataset.split.valid
    which = np.sort(np.random.default_rng(0).permutation(len(cases.users))[:VALIDATION_CASES])
    interactions = dataset.interactions
    targets = interactions.items[cases.cuts[which]]
    seen = [
        interactions.items[interactions.offsets[cases.users[case]] : cases.cuts[case]] if evaluation.mask_seen else []
        for case in which
    ]

    def validate(variables: Any) -> dict[str, float]:
        users = ranker.encode_cases(variables, interactions, run.features, cases, which)
        ranks = rank_vectors(users, ranker.item_vectors(variables), targets, seen)
        return {name: entry[0] for name, entry in summarize(ranks, (10,), bootstrap=0, seed=0).items()}

    return validate


def user_ranker(run: Run, module: UserModel, tables: ItemTables) -> Ranker:
    """The user model's ranker."""
    return make_ranker(
        module,
        tables,
        extra=(),
        max_history=run.config.user.max_history,
        batch_size=run.config.evaluation.batch_size,
    )


def make_user_loss(config: Config, module: UserModel) -> LossFn:
    """Ranking loss plus the weighted regression of the next item's query tokens."""

    def loss_fn(params: Any, frozen: Any, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
        step_tables, rows = batch_tables(frozen["tables"], batch)
        users, items, predicted = module.apply(
            {"params": params},
            step_tables,
            rows,
            batch.history,
            positions=batch.targets.shape[1],
            deterministic=False,
            rngs={"dropout": key},
        )
        ranking = ranking_loss(
            config.user.loss,
            users,
            items,
            batch,
            learned_width=config.candidates.width,
            text_RxT=step_tables.text,
            trained=step_tables.trained,
            log_popularity=frozen["log_popularity"],
        )
        true = step_tables.tokens[jnp.maximum(batch.targets, 0)].astype(jnp.float32)
        error = jnp.mean(jnp.square(predicted.astype(jnp.float32) - true), axis=(-2, -1))
        supervised = (batch.targets >= 0).astype(jnp.float32)
        regression = jnp.sum(error * supervised) / jnp.maximum(jnp.sum(supervised), 1.0)
        loss = config.user.ranking_weight * ranking + config.user.regression_weight * regression
        return loss, {"ranking": ranking, "regression": regression}

    return loss_fn


def train_users(run: Run) -> dict[str, Any]:
    """Runs the user stage."""
    config = run.config
    tables = run.tables(run.folder / "tokens")
    module = user_module(config, tables)
    on_device = frozen_tables(run, tables, config.user.loss)
    params = init_user(run, module, tables)
    check = make_validation(run, user_ranker(run, module, tables))
    result = fit(
        folder=run.folder,
        stage="user",
        data=history_data(run, config.user.loss, config.user.optim, None if on_device else tables, config.seed + 1),
        optim=config.user.optim,
        params=params,
        frozen={"tables": on_device, "log_popularity": log_popularity(run)},
        loss_fn=make_user_loss(config, module),
        # Without a ranking loss nothing that ranks was trained.
        validate=(lambda params: check({"params": params})) if check and config.user.ranking_weight else None,
        score="ndcg@10",
        seed=config.seed + 1,
        training=config.training,
        console=run.console,
        profile=run.profile,
    )
    return {
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "items_per_second": round(result.items_per_second, 1),
        **result.metrics,
    }


def load_users(run: Run) -> tuple[Ranker, Any]:
    """The trained user model: its ranker and best variables."""
    tables = run.tables(run.folder / "tokens")
    module = user_module(run.config, tables)
    shapes = jax.eval_shape(lambda: init_user(run, module, tables))
    step = read_artifact(run.folder, "user").result["best_step"]
    params = restore_params(run.folder / "user" / "checkpoints", step, shapes)
    return user_ranker(run, module, tables), {"params": params}
