"""What the user and joint stages share: the rank model's parts, its batches, its validation and its ranker."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import Config, LossConfig, OptimConfig
from nqf.data.splits import Cases, pasts, rankable
from nqf.evaluation.metrics import summarize
from nqf.evaluation.ranking import rank_vectors
from nqf.evaluation.shares import ALONE, Shares
from nqf.interop.tokenizer import Tokenizer
from nqf.models.item_qformer import ItemQFormer
from nqf.models.rank_model import PromptIds, RankModel, Reader
from nqf.pipelines.batches import History, ItemTables
from nqf.pipelines.histories import history_of_items, training_windows
from nqf.stages.item import tables_on_device
from nqf.stages.ranker import ITEM_CHUNK, Ranker, make_ranker
from nqf.stages.run import Run
from nqf.training.program import Metrics

VALIDATION_CASES = 5_000
"""Validation cases per selection at most; the standard error of HR@10 is then below 0.005."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankParts:
    """The rank model of a stage, without trained parameters.

    Attributes:
      module: The Linen module.
      frozen: Frozen parameters of the module by name: a pretrained base under `qwen3`, a User Q-Former that does not
        learn under `user_qformer`.
      prompt: Token ids of the prompt; None without a language model.
      tables: Host tables, with titles where there is a language model.
      tokenizer: Its tokenizer; None without one.
      max_history: Newest slots that it reads.
      item_chunk: Items encoded at a time.
    """

    module: nn.Module
    tables: ItemTables
    max_history: int
    item_chunk: int = ITEM_CHUNK
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt: PromptIds | None = None
    tokenizer: Tokenizer | None = None

    def variables(self, params: Any) -> dict[str, Any]:
        """Linen variables from the trainable tree (`params`, `lora` beside a pretrained base) and the frozen one."""
        variables = {"params": {**params["params"], **self.frozen}}
        return variables | ({"lora": params["lora"]} if "lora" in params else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished stage that ranks, restored.

    Attributes:
      parts: Its rank model.
      ranker: Its inference functions.
      variables: Linen variables with the best parameters.
      load_item_qformer: Reads module and parameters of the Item Q-Former that made the tokens it reads.
    """

    parts: RankParts
    ranker: Ranker
    variables: Any
    load_item_qformer: Callable[[], tuple[ItemQFormer, Any]]


def case_vectors(
    run: Run, name: str, ranker: Ranker, variables: Any, cases: Cases, shares: Shares = ALONE
) -> tuple[np.ndarray, np.ndarray]:
    """User vectors float32 [cases, D] from everything before the targets, and item vectors float32 [I, D].

    Args:
      run: The run.
      name: Name of the stage.
      ranker: Its inference functions.
      variables: What they read.
      cases: The cases.
      shares: How the cases are shared with other processes.
    """

    def users(span: slice) -> dict[str, np.ndarray]:
        which = np.arange(len(cases.users))[span]
        return {"users": ranker.encode_cases(variables, run.dataset.interactions, run.features, cases, which)}

    return shares.rows(f"users-{name}", len(cases.users), users)["users"], ranker.item_vectors(variables)


def rank_module(config: Config, tables: ItemTables, dtype: jnp.dtype, reader: Reader | None = None) -> RankModel:
    """The rank model of a configuration that fits some item tables."""
    return RankModel(
        tower_config=config.candidates,
        user=config.user,
        items=len(tables.has_text),
        item_tokens=(int(tables.tokens.shape[1]), int(tables.tokens.shape[2])),
        new_item_weight=config.evaluation.new_item_weight,
        reader=reader,
        dtype=dtype,
    )


def init_rank(run: Run, parts: RankParts, *, seed: int, slots: int) -> Any:
    """Fresh trainable parameters: `params` without what is frozen, and `lora` beside a pretrained base.

    Args:
      run: The run.
      parts: The rank model.
      seed: Seed.
      slots: Length of the empty history that shapes are taken from.
    """
    rows = np.zeros(1, np.int32)
    inputs = (parts.tables.take(rows), rows, empty_history(run, slots), parts.prompt)

    return _init(parts.module, tuple(parts.frozen), seed, inputs)


# Compiled: it is faster than op by op, and `jax.eval_shape` passes through it; traced once for every equal module.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(module: nn.Module, frozen: tuple[str, ...], seed: int, inputs: tuple) -> Any:
    variables = module.init(jax.random.key(seed), *inputs, positions=1)
    # Under jit a base that `init` draws is never computed: its only use is dropped here.
    params = {name: tree for name, tree in variables["params"].items() if name not in frozen}
    return {"params": params} | ({"lora": variables["lora"]} if "lora" in variables else {})


def empty_history(run: Run, slots: int) -> History:
    """One empty history of the run's shapes, for initialization."""
    reviews = run.features.reviews
    return history_of_items(np.full((1, slots), -1, np.int32), 0 if reviews is None else reviews.values.shape[1])


# Many parameters: what differs between the three stages whose data this is, by name.
def history_data(
    run: Run,
    loss: LossConfig,
    optim: OptimConfig,
    tables: ItemTables | None,
    *,
    seed: int,
    max_history: int,
    positions: int,
    item_dropout: float = 0.0,
    given: Any = None,
    even_slots: bool = False,
) -> Any:
    """Training batches of a stage that ranks.

    Args:
      run: The run.
      loss: Decides about negatives.
      optim: Batch size and epochs.
      tables: Host tables to gather from; None if they are on the device.
      seed: Seed of order and draws.
      max_history: Most slots of a history.
      positions: Supervised positions of a history, counted from the newest slot.
      item_dropout: Probability that an item of a history is hidden.
      given: int32 [events, K], negatives of each event's item alone; None without.
      even_slots: Whether longer windows come in smaller batches.
    """
    from nqf.pipelines.datasets import history_dataset
    from nqf.training.mesh import batch_shard

    config, dataset = run.config, run.dataset
    windows = training_windows(dataset.interactions, dataset.split, 1 if loss.negatives == "given" else positions)
    if loss.negatives == "given":
        given = dataset.split.candidates(np.arange(len(dataset.interactions.items)))[:, : loss.samples]
        # Targets of samples alone are examples.
        windows = windows.only((given >= 0).any(axis=1))
    return history_dataset(
        windows,
        run.features,
        loss=loss,
        max_history=max_history,
        positions=positions,
        item_dropout=item_dropout,
        batch_size=optim.batch_size,
        epochs=optim.epochs,
        seed=seed,
        workers=config.training.workers,
        items=len(dataset.catalogue.item_ids),
        tables=tables,
        given=given,
        shard=batch_shard(config.training.mesh),
        even_slots=even_slots,
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


def make_validation(run: Run, ranker: Ranker) -> Callable[[Any], Metrics] | None:
    """A function from variables to metrics on a fixed sample of the validation cases, masked as the evaluation.

    It computes on the mesh that trains, with the variables laid out as there. None where these cases are trained on.
    """
    from nqf.training.mesh import layout, make_mesh, place

    if run.config.data.refit:
        return None
    mesh = make_mesh(run.config.training.mesh)
    dataset, evaluation = run.dataset, run.config.evaluation
    cases, interactions = dataset.split.valid, dataset.interactions
    kept = rankable(interactions, cases, repeats=evaluation.repeats)
    which = kept[np.sort(np.random.default_rng(0).permutation(len(kept))[:VALIDATION_CASES])]
    targets = interactions.items[cases.cuts[which]]
    seen = None if evaluation.repeats else pasts(interactions, cases[which])

    def validate(variables: Any) -> Metrics:
        variables = place(variables, layout(variables, mesh))
        with jax.set_mesh(mesh):
            users = ranker.encode_cases(variables, interactions, run.features, cases, which)
            items = ranker.item_vectors(variables)
        ranks = rank_vectors(users, items, targets, seen)
        return {name: entry[0] for name, entry in summarize(ranks, (10,), bootstrap=0, seed=0).items()}

    return validate


def ranker_of(run: Run, parts: RankParts) -> Ranker:
    """The inference functions of a rank model."""
    return make_ranker(
        parts.module,
        parts.tables,
        prompt=parts.prompt,
        max_history=parts.max_history,
        batch_size=run.config.evaluation.batch_size,
        item_chunk=parts.item_chunk,
    )
