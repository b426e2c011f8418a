"""A training program: one value that the trainer, the planner and whoever restores a checkpoint share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from nqf.config import OptimConfig

if TYPE_CHECKING:
    # Grain takes a second to import, which whoever restores a checkpoint need not wait for.
    from nqf.pipelines.datasets import TrainingData

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is trained, on what, and what selects. Nothing is computed or read before a function in it is called.

    Attributes:
      module: The Linen module.
      init: Fresh trainable parameters; `jax.eval_shape` passes through it.
      start: What training begins with, from fresh parameters: what earlier stages have learned is taken over here.
      frozen: What the loss reads and nobody changes: arrays, or shapes in a program that is only planned.
      variables: Linen variables of the module from trainable parameters.
      loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
      data: Batches of all epochs for some optimizer settings.
      optim: Optimizer, schedule, validation and patience.
      seed: Seed of the steps' random keys.
      validate: Makes the function from parameters to validation metrics; None from it where there is nothing to
        select on, and the newest parameters are kept.
      score: The metric that selects; larger is better.
      report: What the stage's record says of the best parameters and their metrics.
    """

    module: nn.Module
    init: Callable[[], Any]
    frozen: Callable[[], Any]
    variables: Callable[[Any], Any]
    loss_fn: LossFn
    data: Callable[[OptimConfig], TrainingData]
    optim: OptimConfig
    seed: int
    validate: Callable[[], Callable[[Any], Metrics] | None]
    score: str
    report: Callable[[Any, Metrics], dict[str, Any]]
    start: Callable[[Any], Any] = lambda params: params
