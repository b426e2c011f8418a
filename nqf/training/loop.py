"""The training loop that every stage shares, and the state it saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from rich.console import Console

from nqf.config import OptimConfig, TrainingConfig
from nqf.pipelines.datasets import TrainingData
from nqf.training.checkpoint import Checkpointer, CheckpointError, restore_params
from nqf.training.guard import refuse_batch
from nqf.training.mesh import agree, is_primary, layout, local, make_mesh, place, place_batch
from nqf.training.optimizer import make_optimizer
from nqf.training.profile import Profile
from nqf.training.stop import Stopped, StopRequest
from nqf.training.writer import Terminal, Writer

LOG_EVERY = 20
"""Steps between fetches of the metrics; a fetch waits for the device."""


@struct.dataclass
class TrainState:
    """Everything that training goes on from; the position in the data is the step.

    Attributes:
      step: int32 scalar, steps done.
      params: Trainable parameters.
      opt_state: Optimizer state.
      best: float32 scalar, best validation score so far.
      best_step: int32 scalar, step of the best score.
      stale: int32 scalar, validations since then.
      skipped: int32 scalar, batches left out because loss or gradient was not finite.
      failed: int32 scalar, step at which there was one too many of them; 0 for none.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    best: jax.Array
    best_step: jax.Array
    stale: jax.Array
    skipped: jax.Array
    failed: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """Outcome of a stage.

    Attributes:
      params: Parameters of the best validation, readable by this process alone.
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


def make_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""

    def zero() -> jax.Array:
        # One array for each: a state that holds the same buffer twice cannot be donated.
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        best=jnp.full((), -jnp.inf, jnp.float32),
        best_step=zero(),
        stale=zero(),
        skipped=zero(),
        failed=zero(),
    )


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int, skip: int, shardings: Any = None
) -> Callable:
    """Compiles `(state, frozen, batch) -> (state, metrics)`; the state is donated, the frozen tree is not.

    The key of a step is folded from its number, so that a resumed run draws what the uninterrupted one drew. A step
    whose loss or gradient is not finite changes nothing but the counters.

    Args:
      loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
      optimizer: Updates the parameters.
      seed: Seed of the steps' random keys.
      skip: Non-finite batches before `failed` is set.
      shardings: Where the state lies; by default wherever it is.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        step, skipped = state.step + 1, state.skipped + ~finite
        one_too_many = ~finite & (skipped == skip + 1)
        state = state.replace(
            step=step,
            params=params,
            opt_state=opt_state,
            skipped=skipped,
            failed=jnp.where(one_too_many, step, state.failed),
        )
        guard = {"skipped": skipped, "failed": state.failed}
        return state, {"loss": loss, "gradient_norm": norm, **metrics, **guard}

    return jax.jit(train_step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def fit(
    *,
    folder: Path,
    stage: str,
    data: TrainingData,
    optim: OptimConfig,
    training: TrainingConfig,
    params: Any,
    frozen: Any,
    loss_fn: LossFn,
    validate: Callable[[Any], dict[str, float]] | None,
    score: str,
    seed: int,
    console: Console,
    profile: int = 0,
) -> FitResult:
    """Trains to the end, from the newest checkpoint in the stage's folder if there is one.

    Args:
      folder: Run folder; checkpoints go to `<folder>/<stage>/checkpoints`.
      stage: Name of the stage.
      data: Batches of all epochs.
      optim: Optimizer, schedule, validation and patience.
      training: Mesh, checkpoints and the numerical guard.
      params: Freshly initialized trainable parameters.
      frozen: What the loss reads and nobody changes.
      loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
      validate: Metrics of some parameters; None if there is nothing to select on, and the newest ones are kept.
      score: The metric that selects; larger is better.
      seed: Seed of the steps' random keys.
      console: Terminal.
      profile: Steps to trace, after the first few.

    Raises:
      NonFiniteError: More batches than `training.skip_non_finite` had a non-finite loss or gradient.
      CheckpointError: A checkpoint could not be written, or the newest one cannot be read.
      Stopped: SIGTERM or SIGINT came; a checkpoint has been written.
    """
    mesh = make_mesh(training.mesh)
    optimizer = make_optimizer(optim, data.steps)
    state = make_state(params, optimizer)
    shardings = layout(state, mesh)
    state = place(state, shardings)
    frozen = place(frozen, layout(frozen, mesh))
    train_step = make_train_step(loss_fn, optimizer, seed=seed, skip=training.skip_non_finite, shardings=shardings)

    checkpoints = folder / stage / "checkpoints"
    validate_at = max(1, optim.validate_every) * data.steps_per_epoch
    with Checkpointer(checkpoints, keep=training.keep) as checkpointer, StopRequest() as request:
        latest = checkpointer.latest()
        if latest is not None:
            state = checkpointer.restore(latest, state)
        start_step = step = int(state.step)
        if latest not in (None, step):
            raise CheckpointError(f"{checkpoints / str(latest)}: holds step {step}; it was renamed or exchanged")
        done = step == data.steps or _patience_spent(optim, state)
        with (
            Writer(folder, stage, resumed_step=step, enabled=is_primary()) as writer,
            Terminal(stage, data.steps, console) as terminal,
            closing(Profile(folder / stage / "profile", profile)) as trace,
        ):
            if latest is not None and not done:
                terminal.line(f"resuming at step {step:,} of {data.steps:,}")
            if latest is None and done:
                # Without an epoch the initial parameters are what the stage leaves.
                checkpointer.save(step, state, best_step=step)
            batches = iter(()) if done else data.iterate(step)
            # Metrics of a step are fetched while the next one runs.
            pending: tuple[int, dict[str, jax.Array]] | None = None
            began = logged_at = saved_at = time.perf_counter()
            logged_step, validation_seconds, stopping = step, 0.0, False
            metrics: dict[str, jax.Array] = {}

            def check(metrics: dict[str, Any]) -> None:
                if failed := int(metrics["failed"]):
                    raise refuse_batch(folder, stage, failed, data, allowed=training.skip_non_finite)

            def log() -> None:
                nonlocal pending, logged_at, logged_step
                if pending is None:
                    return
                at, values = pending[0], jax.device_get(pending[1])
                check(values)
                now = time.perf_counter()
                rate = (at - logged_step) * data.batch_size / (now - logged_at)
                pending, logged_at, logged_step = None, now, at
                # Without skipped batches there is nothing to say about them.
                shown = {name: float(value) for name, value in values.items() if name != "failed" and
                         (name != "skipped" or value)}  # fmt: skip
                writer.write(at, {**shown, "items_per_second": rate})
                terminal.step(at, loss=shown["loss"], items_per_second=rate)

            while not (done or stopping):
                trace.before(step - start_step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    batch = place_batch(next(batches), mesh)
                    if jax.default_backend() == "cpu":
                        # A step that waits there is given its temporaries at once, beside those of the one that runs.
                        jax.block_until_ready(metrics)
                    state, metrics = train_step(state, frozen, batch)
                step += 1
                if trace.after(step - start_step, metrics):
                    terminal.line(f"trace of {profile} steps in {folder / stage / 'profile'}; open it with xprof")
                log()
                at_validation = step % validate_at == 0 or step == data.steps
                at_log = step % LOG_EVERY == 0 or at_validation
                if at_log:
                    pending = step, metrics
                if at_validation:
                    log()
                    before = time.perf_counter()
                    scores = validate(local(state.params, mesh)) if validate else {}
                    # Of equal values the newest is kept.
                    value = float(agree(np.float32(scores[score]))) if validate else 0.0
                    if scores:
                        writer.write(step, {f"valid/{name}": value for name, value in scores.items()})
                    improved = value >= float(state.best)
                    scalars = {"stale": np.int32(0 if improved else int(state.stale) + 1)}
                    if improved:
                        scalars |= {"best": np.float32(value), "best_step": np.int32(step)}
                    state = state.replace(**place(scalars, {name: getattr(shardings, name) for name in scalars}))
                    terminal.line(
                        f"epoch {step // data.steps_per_epoch:>3}  step {step:>6,}  loss {float(metrics['loss']):.4f}"
                        + (f"  {score} {value:.4f}{'  best' if improved else ''}" if validate else "")
                    )
                    done = step == data.steps or _patience_spent(optim, state)
                    logged_at = time.perf_counter()
                    validation_seconds += logged_at - before
                due, stopping = time.perf_counter() - saved_at >= training.save_every_seconds, bool(request.received)
                if jax.process_count() > 1:
                    # All processes do alike, and ask each other only where they wait for the device anyway.
                    due, stopping = agree(np.array([due, stopping])) if at_log else (False, False)
                if due or stopping or at_validation:
                    # What training goes on from has to be sound, and the metrics up to it on disk.
                    log()
                    check(metrics)
                    writer.sync()
                    checkpointer.save(step, state, best_step=int(state.best_step))
                    saved_at = time.perf_counter()
            if stopping:
                checkpointer.wait()
                raise Stopped(
                    f"{request.received or 'a signal'} came; stage {stage} is saved at step {step:,} of "
                    f"{data.steps:,}. Run the same command again to go on"
                )
            seconds = time.perf_counter() - began
    best_step = int(state.best_step)
    params = local(state.params, mesh)
    best = params if best_step == step else restore_params(checkpoints, best_step, params)
    steps = step - start_step
    return FitResult(
        params=best,
        best_step=best_step,
        metrics=validate(best) if validate else {},
        steps=step,
        items_per_second=steps * data.batch_size / max(seconds - validation_seconds, 1e-9) if steps else 0.0,
        seconds=seconds,
    )


def _patience_spent(optim: OptimConfig, state: TrainState) -> bool:
    return bool(optim.patience) and int(state.stale) >= optim.patience
