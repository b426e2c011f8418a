"""The training loop that every stage shares, and the state it saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from rich.console import Console

from nqf.config import OptimConfig
from nqf.pipelines.datasets import TrainingData
from nqf.training.checkpoint import Checkpointer, restore_params
from nqf.training.mesh import make_mesh, place_batch, replicate
from nqf.training.optimizer import make_optimizer
from nqf.training.writer import Terminal, Writer

LOG_EVERY = 20
"""Steps between fetches of the metrics; a fetch waits for the device."""


@struct.dataclass
class TrainState:
    """What a checkpoint holds beside the data position.

    Attributes:
      step: int32 scalar, steps done.
      params: Trainable parameters.
      opt_state: Optimizer state.
      best: float32 scalar, best validation score so far.
      best_step: int32 scalar, step of the best score.
      stale: int32 scalar, validations since then.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    best: jax.Array
    best_step: jax.Array
    stale: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """Outcome of a stage.

    Attributes:
      params: Parameters of the best validation.
      best_step: Their step.
      metrics: Their validation metrics.
      steps: Steps done.
      items_per_second: Training throughput of this process, examples per second; 0 if it trained nothing.
      seconds: Wall time of this process in the loop.
    """

    params: Any
    best_step: int
    metrics: dict[str, float]
    steps: int
    items_per_second: float
    seconds: float


LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> Callable:
    """Compiles `(state, frozen, batch, key) -> (state, metrics)`; the state is donated, the frozen tree is not.

    The key of a step is folded from its number, so that a resumed run draws what the uninterrupted one drew.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, key: jax.Array) -> tuple[TrainState, dict]:
        step_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, step_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(grads), **metrics}
        state = state.replace(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)


def fit(
    *,
    folder: Path,
    stage: str,
    data: TrainingData,
    optim: OptimConfig,
    params: Any,
    frozen: Any,
    loss_fn: LossFn,
    validate: Callable[[Any], dict[str, float]],
    score: str,
    seed: int,
    keep: int,
    console: Console,
) -> FitResult:
    """Trains to the end, from the newest checkpoint in the stage's folder if there is one.

    Args:
      folder: Run folder; checkpoints go to `<folder>/<stage>/checkpoints`.
      stage: Name of the stage.
      data: Batches of all epochs.
      optim: Optimizer, schedule, validation and patience.
      params: Freshly initialized trainable parameters.
      frozen: What the loss reads and nobody changes.
      loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
      validate: Metrics of some parameters.
      score: The metric that selects; larger is better.
      seed: Seed of the steps' random keys.
      keep: Newest checkpoints kept beside the best.
      console: Terminal.

    Raises:
      FloatingPointError: The loss is not finite; names stage and step.
    """
    mesh = make_mesh()
    optimizer = make_optimizer(optim, data.steps)
    train_step = make_train_step(loss_fn, optimizer)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        best=jnp.full((), -jnp.inf, jnp.float32),
        best_step=jnp.zeros((), jnp.int32),
        stale=jnp.zeros((), jnp.int32),
    )
    # A donated state must not share buffers with what the caller keeps.
    state = replicate(jax.tree.map(jnp.copy, state), mesh)
    frozen = replicate(frozen, mesh)
    key = replicate(jax.random.key(seed), mesh)
    iterator = iter(data.dataset)

    checkpoints = folder / stage / "checkpoints"
    validate_at = max(1, optim.validate_every) * data.steps_per_epoch
    with Checkpointer(checkpoints, keep=keep) as checkpointer:
        latest = checkpointer.latest()
        if latest is not None:
            state = checkpointer.restore(latest, state, iterator)
        start_step = step = int(state.step)
        stopped = bool(optim.patience) and int(state.stale) >= optim.patience
        with Writer(folder, stage, resumed_step=step) as writer, Terminal(stage, data.steps, console) as terminal:
            if latest is not None and step < data.steps and not stopped:
                terminal.line(f"resuming at step {step:,} of {data.steps:,}")
            pending: dict[str, jax.Array] = {}
            began = logged_at = time.perf_counter()
            logged_step, validation_seconds = step, 0.0
            while step < data.steps and not stopped:
                batch = place_batch(next(iterator), mesh)
                state, metrics = train_step(state, frozen, batch, key)
                step += 1
                at_validation = step % validate_at == 0 or step == data.steps
                # Metrics of the step before are fetched while this one runs.
                if pending and (step % LOG_EVERY == 0 or at_validation):
                    values = {name: float(value) for name, value in jax.device_get(pending).items()}
                    _check_finite(values["loss"], stage, step - 1)
                    now = time.perf_counter()
                    rate = (step - logged_step) * data.batch_size / (now - logged_at)
                    logged_at, logged_step = now, step
                    writer.write(step - 1, {**values, "items_per_second": rate})
                    terminal.step(step, loss=values["loss"], items_per_second=rate)
                pending = metrics
                if at_validation:
                    _check_finite(float(metrics["loss"]), stage, step)
                    before = time.perf_counter()
                    scores = validate(state.params)
                    writer.write(step, {f"valid/{name}": value for name, value in scores.items()})
                    improved = scores[score] >= float(state.best)
                    state = state.replace(
                        best=jnp.where(improved, scores[score], state.best).astype(jnp.float32),
                        best_step=jnp.where(improved, step, state.best_step).astype(jnp.int32),
                        stale=jnp.where(improved, 0, state.stale + 1).astype(jnp.int32),
                    )
                    state = replicate(state, mesh)
                    checkpointer.save(step, state, iterator, score=scores[score])
                    terminal.line(
                        f"epoch {step // data.steps_per_epoch:>3}  step {step:>6,}  loss {float(metrics['loss']):.4f}  "
                        f"{score} {scores[score]:.4f}{'  best' if improved else ''}"
                    )
                    stopped = bool(optim.patience) and int(state.stale) >= optim.patience
                    validation_seconds += time.perf_counter() - before
                    logged_at, logged_step = time.perf_counter(), step
            seconds = time.perf_counter() - began
    best_step = int(state.best_step)
    best = state.params if best_step == step else restore_params(checkpoints, best_step, state.params)
    done = step - start_step
    return FitResult(
        params=best,
        best_step=best_step,
        metrics=validate(best),
        steps=step,
        items_per_second=done * data.batch_size / max(seconds - validation_seconds, 1e-9) if done else 0.0,
        seconds=seconds,
    )


def _check_finite(loss: float, stage: str, step: int) -> None:
    if not jnp.isfinite(loss):
        raise FloatingPointError(
            f"stage {stage}: the loss is {loss} at step {step}; lower {stage}.optim.learning_rate or check the data "
            "for values out of range"
        )
