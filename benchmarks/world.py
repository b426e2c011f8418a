"""A synthetic catalogue with histories of given lengths, and the user and joint stages' training steps on it.

Everything but the item tokens is nqf's own: windows, batches, modules, losses and the optimizer. The tokens are random
numbers, whose values no step's time depends on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import Config, JointConfig, LossConfig, OptimConfig, PromptConfig, QFormerConfig, UserConfig
from nqf.data.interactions import Interactions
from nqf.data.splits import leave_one_out
from nqf.models.qwen3 import Qwen3Config
from nqf.models.rank_model import PromptIds
from nqf.pipelines.batches import ItemTables
from nqf.pipelines.datasets import TrainingData, history_dataset
from nqf.pipelines.histories import EventFeatures, event_features, history_of_items, training_windows
from nqf.stages.joint import make_joint_loss, reader_of
from nqf.stages.rank import RankParts, rank_module
from nqf.stages.user import make_user_loss
from nqf.training.loop import make_state, make_train_step
from nqf.training.mesh import layout, placed
from nqf.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Catalogue and histories.

    Attributes:
      tables: Host tables of the items.
      interactions: All interactions.
      features: Their features.
      log_popularity: float32 [I], as the losses read it.
    """

    tables: ItemTables
    interactions: Interactions
    features: EventFeatures
    log_popularity: np.ndarray

    def data(self, config: Config, stage: str, *, on_device: bool = True, epochs: int = 1) -> TrainingData:
        """The training batches of a stage."""
        part, positions = getattr(config, stage), config.joint.prompt.history_items
        split = leave_one_out(self.interactions, items=len(self.tables.has_text))
        return history_dataset(
            training_windows(self.interactions, split, positions),
            self.features,
            loss=part.loss,
            max_history=config.user.max_history,
            positions=positions,
            item_dropout=config.user.item_dropout,
            batch_size=part.optim.batch_size,
            epochs=epochs,
            seed=config.seed,
            workers=0,
            items=len(self.tables.has_text),
            tables=None if on_device else self.tables,
        )


def make_world(
    *, items: int, lengths: np.ndarray, seed: int, tokens: tuple[int, int] = (2, 64), text: int = 128
) -> World:
    """Draws a world; popularity follows Zipf's law, and a history has two more events, which are held out."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths) + 2)]).astype(np.int64)
    events = int(offsets[-1])
    interactions = Interactions(
        user_ids=[str(user) for user in range(len(lengths))],
        offsets=offsets,
        items=((rng.zipf(1.2, events) - 1) % items).astype(np.int32),
        times=1_600_000_000 + np.arange(events) * 3_600,
        ratings=rng.integers(1, 6, events).astype(np.float32),
        reviews=None,
    )
    split = leave_one_out(interactions, items=items)
    tables = ItemTables(
        tokens=rng.standard_normal((items, *tokens), np.float32).astype(np.float16),
        vectors=rng.standard_normal((items, tokens[1]), np.float32).astype(np.float16),
        fields=np.zeros((items, 0), np.float16),
        neighbors=np.zeros((items, 0), np.float16),
        text=rng.standard_normal((items, text), np.float32),
        has_text=np.ones(items, bool),
        trained=np.ones(items, bool),
        titles=np.zeros((items, 0), np.int32),
    )
    return World(
        tables=tables,
        interactions=interactions,
        features=event_features(interactions, split, None),
        log_popularity=np.full(items, -np.log(items), np.float32),
    )


def configuration(
    *,
    batch: int,
    history: int = 50,
    positions: int = 20,
    negatives: str = "full",
    width: int = 64,
    samples: int = 4_096,
) -> Config:
    """A configuration whose other values are nqf's defaults."""
    loss, optim = LossConfig(negatives=negatives, samples=samples), OptimConfig(batch_size=batch)
    qformer = QFormerConfig(queries=2, layers=1, width=width, mlp_width=4 * width)
    return Config(
        user=UserConfig(qformer=qformer, max_history=history, loss=loss, optim=optim),
        joint=JointConfig(prompt=PromptConfig(history_items=positions), loss=loss, optim=optim),
    )


def small_backbone(**options: Any) -> Qwen3Config:
    """The default small Qwen3, or another."""
    sizes = dict(
        vocab_size=2_048,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return Qwen3Config(**sizes | options)


@dataclasses.dataclass(kw_only=True)
class Training:
    """A stage in training: call `step(batch)`.

    Attributes:
      compiled: The jitted step, `(state, frozen, batch) -> (state, metrics)`.
      state: Present state.
      frozen: What the step reads.
    """

    compiled: Any
    state: Any
    frozen: Any

    def step(self, batch: Any, *, wait: bool = True) -> Any:
        """One step; returns the metrics."""
        self.state, metrics = self.compiled(self.state, self.frozen, batch)
        return jax.block_until_ready(metrics) if wait else metrics


def training(
    world: World,
    config: Config,
    stage: str,
    *,
    backbone: Qwen3Config | None = None,
    instruction: int = 12,
    on_device: bool = True,
    abstract: bool = False,
    mesh: Any = None,
) -> Training:
    """The user or the joint stage's training step on a world, with random parameters.

    A backbone with adapters is frozen but for them, as a pretrained one. `abstract` gives shapes in place of arrays,
    and with a mesh, whose devices need not be there, shapes that are laid out on it as training does.
    """
    slots = config.user.max_history
    some, rows = world.tables.take(np.zeros(1, np.int32)), np.zeros(1, np.int32)
    history = history_of_items(np.full((1, slots), -1, np.int32), 0)
    key = jax.random.key(config.seed)
    frozen: dict[str, Any] = {
        "tables": world.tables if on_device else None,
        "log_popularity": world.log_popularity,
    }

    def init(module: Any, prompt: Any) -> dict[str, Any]:
        inputs = (some, rows, history, prompt)
        make = jax.jit(lambda *inputs: module.init(key, *inputs, positions=1))
        return dict(jax.eval_shape(make, *inputs) if abstract else make(*inputs))

    if stage == "user":
        module = rank_module(config, world.tables, jnp.float32)
        params, loss = init(module, None)["params"], make_user_loss(config, module)
    else:
        backbone = backbone or small_backbone()
        module = rank_module(config, world.tables, backbone.dtype, reader_of(config.joint, backbone))
        parts = RankParts(module=module, tables=world.tables, max_history=slots)
        ids = np.arange(instruction, dtype=np.int32)
        prompt = PromptIds(instruction=ids, placeholder=np.int32(instruction), end=np.int32(instruction + 1))
        params, loss = init(module, prompt), make_joint_loss(config, parts, None)
        frozen |= {"prompt": prompt, "params": {}}
        if backbone.lora_rank:
            params["params"] = dict(params["params"])
            frozen["params"]["qwen3"] = params["params"].pop("qwen3")
    optimizer = make_optimizer(getattr(config, stage).optim, 1_000)
    if abstract:
        state, shardings = jax.eval_shape(lambda tree: make_state(tree, optimizer), params), None
        if mesh is not None:
            frozen, shardings = placed(frozen, layout(frozen, mesh)), layout(state, mesh)
            state = placed(state, shardings)
        step = make_train_step(loss, optimizer, seed=0, skip=0, shardings=shardings)
        return Training(compiled=step, state=state, frozen=frozen)
    step = make_train_step(loss, optimizer, seed=0, skip=0)
    return Training(compiled=step, state=make_state(params, optimizer), frozen=jax.device_put(frozen))
