"""The training loop that every stage shares, and the state it saves."""

from __future__ import annotations

import contextlib
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
from jax.sharding import Mesh
from rich.console import Console

from nqf.config import TrainingConfig
from nqf.pipelines.datasets import TrainingData
from nqf.training.checkpoint import Checkpointer, CheckpointError, restore_params
from nqf.training.guard import refuse_batch
from nqf.training.mesh import agree, is_primary, layout, local, make_mesh, place, place_batch
from nqf.training.optimizer import make_optimizer
from nqf.training.profile import Profile
from nqf.training.program import LossFn, Metrics, Program
from nqf.training.stop import Stopped, StopRequest
from nqf.training.writer import Terminal, Writer

LOG_EVERY = 20
"""Steps between fetches of the metrics; a fetch waits for the device."""


class TrainState(struct.PyTreeNode):
    """Everything that training resumes from; the position in the data is the step.

    Attributes:
      step: int32 scalar, steps done.
      params: Trainable parameters, as they are validated and kept.
      opt_state: Optimizer state.
      best: float32 scalar, best validation score so far.
      best_step: int32 scalar, step of the best score.
      stale: int32 scalar, validations since then.
      skipped: int32 scalar, batches left out because loss or gradient was not finite.
      failed: int32 scalar, step at which there was one too many of them; 0 for none.
      raw: What the steps update, and `params` are the moving average of; None where nothing is averaged.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    best: jax.Array
    best_step: jax.Array
    stale: jax.Array
    skipped: jax.Array
    failed: jax.Array
    raw: Any = None


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


def make_state(params: Any, optimizer: optax.GradientTransformation, *, average: float = 0.0) -> TrainState:
    """The state before the first step; `average` is that of `make_train_step`."""

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
        raw=jax.tree.map(jnp.copy, params) if average else None,
    )


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    skip: int,
    average: float = 0.0,
    shardings: Any = None,
) -> Callable:
    """Compiles `(state, frozen, batch) -> (state, metrics)`; the state is donated, the frozen tree is not.

    The key of a step is folded from its number, so that a resumed run draws what the uninterrupted one drew. A step
    whose loss or gradient is not finite changes nothing but the counters.

    Args:
      loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`.
      optimizer: Updates the parameters.
      seed: Seed of the steps' random keys.
      skip: Non-finite batches before `failed` is set.
      average: Share of the steps so far over which the kept parameters are averaged. With `t` steps before, a step
        counts as 1 / (1 + average * t), so the window grows with the training: the power function average of Karras
        et al. 2024 (arXiv 2312.02696, section 3.1), whose gamma is 1 / average - 1. With 0 nothing is averaged.
      shardings: Where the state lies, and the mesh that activations are pinned to; by default wherever it is.
    """

    mesh = None if shardings is None else jax.tree.leaves(shardings)[0].mesh

    def train_step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trained = state.raw if average else state.params
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, frozen, batch, key)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params, raw = optax.apply_updates(trained, updates), None
        if average:
            share, raw = 1 / (1 + average * state.step), params
            params = jax.tree.map(lambda mean, new: mean + share.astype(mean.dtype) * (new - mean), state.params, raw)
        params, raw, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, raw, opt_state),
            (state.params, state.raw, state.opt_state),
        )
        step, skipped = state.step + 1, state.skipped + ~finite
        one_too_many = ~finite & (skipped == skip + 1)
        state = state.replace(
            step=step,
            params=params,
            raw=raw,
            opt_state=opt_state,
            skipped=skipped,
            failed=jnp.where(one_too_many, step, state.failed),
        )
        guard = {"skipped": skipped, "failed": state.failed}
        return state, {"loss": loss, "gradient_norm": norm, **metrics, **guard}

    return jax.jit(train_step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def fit(
    program: Program,
    folder: Path,
    stage: str,
    *,
    training: TrainingConfig,
    console: Console,
    ids: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    profile: int = 0,
    saved: Callable[[], None] | None = None,
) -> FitResult:
    """Trains to the end, from the newest checkpoint in the stage's folder if there is one.

    Args:
      program: What to train.
      folder: Run folder; checkpoints go to `<folder>/<stage>/checkpoints`.
      stage: Name of the stage.
      training: Mesh, checkpoints and the numerical guard.
      console: Terminal.
      ids: Names rows of users and of items, for a batch that is written down because it cannot be trained on.
      profile: Steps to trace, after the first few.
      saved: Called when a checkpoint is whole; training waits for both.

    Raises:
      NonFiniteError: More batches than `training.skip_non_finite` had a non-finite loss or gradient.
      CheckpointError: A checkpoint could not be written, or the newest one cannot be read.
      Stopped: SIGTERM or SIGINT came; a checkpoint has been written.
    """
    mesh, data = make_mesh(training.mesh), program.data(program.optim)
    optimizer = make_optimizer(program.optim, data.steps)
    average = program.optim.average
    state = make_state(program.start(program.init()), optimizer, average=average)
    shardings = layout(state, mesh)
    state, frozen = place(state, shardings), program.frozen()
    frozen = place(frozen, layout(frozen, mesh))
    train_step = make_train_step(
        program.loss_fn,
        optimizer,
        seed=program.seed,
        skip=training.skip_non_finite,
        average=average,
        shardings=shardings,
    )
    validate, checkpoints = program.validate(), folder / stage / "checkpoints"
    with Checkpointer(checkpoints, keep=training.keep) as checkpointer, StopRequest() as request:
        latest = checkpointer.latest()
        if latest is not None:
            # Up to version 0.2 nothing was averaged; a training that was cut off then is averaged from there on.
            state = checkpointer.restore(latest, state, copied={"raw": "params"})
        start = int(state.step)
        if latest not in (None, start):
            raise CheckpointError(f"{checkpoints / str(latest)}: holds step {start}; it was renamed or exchanged")
        with (
            Writer(folder, stage, resumed_step=start, enabled=is_primary()) as writer,
            Terminal(stage, data.steps, console) as terminal,
            closing(Profile(folder / stage / "profile", profile)) as trace,
        ):
            loop = _Loop(
                program=program, data=data, mesh=mesh, shardings=shardings, training=training, folder=folder,
                stage=stage, ids=ids, validate=validate, checkpointer=checkpointer, writer=writer,
                terminal=terminal, start=start, saved=saved,
            )  # fmt: skip
            if latest is None and loop.done(state, start):
                # Without an epoch the initial parameters are what the stage leaves.
                checkpointer.save(start, state, best_step=start)
            elif latest is not None and not loop.done(state, start):
                terminal.line(f"resuming at step {start:,} of {data.steps:,}")
            began = time.perf_counter()
            state, step = loop.run(state, frozen, train_step, request, trace)
            seconds = time.perf_counter() - began
            if validate and int(state.best_step) == step > data.steps_per_epoch:
                terminal.line("the best step is the last one: more epochs would rank better (optim.epochs)")
    best_step, params = int(state.best_step), local(state.params, mesh)
    best = params if best_step == step else restore_params(checkpoints, best_step, params)
    rate = (step - start) * data.batch_size / max(seconds - loop.validation_seconds, 1e-9)
    return FitResult(
        params=best,
        best_step=best_step,
        metrics=validate(best) if validate else {},
        steps=step,
        items_per_second=rate if step > start else 0.0,
        seconds=seconds,
    )


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The steps of one `fit`: it logs, validates and saves in an order from which every crash can be resumed.

    Metrics of a step are fetched while the next one runs: `pending` holds them until then.
    """

    program: Program
    data: TrainingData
    mesh: Mesh
    shardings: TrainState
    training: TrainingConfig
    folder: Path
    stage: str
    ids: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    validate: Callable[[Any], Metrics] | None
    checkpointer: Checkpointer
    writer: Writer
    terminal: Terminal
    start: int
    saved: Callable[[], None] | None = None
    pending: tuple[int, dict[str, jax.Array]] | None = None
    logged_at: float = 0.0
    logged_step: int = 0
    validation_seconds: float = 0.0

    def done(self, state: TrainState, step: int) -> bool:
        """Whether the last step was made, or patience is spent."""
        patience = self.program.optim.patience
        return step == self.data.steps or (bool(patience) and int(state.stale) >= patience)

    def run(
        self, state: TrainState, frozen: Any, train_step: Callable, request: StopRequest, trace: Profile
    ) -> tuple[TrainState, int]:
        """Trains until done; returns the last state and its step.

        Raises:
          Stopped: A signal came; a checkpoint has been written.
        """
        step, done, stopping = self.start, self.done(state, self.start), False
        validate_at = max(1, self.program.optim.validate_every) * self.data.steps_per_epoch
        batches = iter(()) if done else self.data.iterate(step)
        self.logged_at, self.logged_step, saved_at = time.perf_counter(), step, time.perf_counter()
        metrics: dict[str, jax.Array] = {}
        while not (done or stopping):
            trace.before(step - self.start)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = place_batch(next(batches), self.mesh)
                if jax.default_backend() == "cpu":
                    # A step that waits there is given its temporaries at once, beside those of the one that runs.
                    jax.block_until_ready(metrics)
                state, metrics = train_step(state, frozen, batch)
            step += 1
            if trace.after(step - self.start, metrics):
                where = self.folder / self.stage / "profile"
                self.terminal.line(f"trace of {trace.steps} steps in {where}; open it with xprof")
            self._log()
            at_validation = step % validate_at == 0 or step == self.data.steps
            at_log = step % LOG_EVERY == 0 or at_validation
            if at_log:
                self.pending = step, metrics
            if at_validation:
                self._log()
                state = self._select(state, step, float(metrics["loss"]))
                done = self.done(state, step)
            due, stopping = time.perf_counter() - saved_at >= self.training.save_every_seconds, bool(request.received)
            if jax.process_count() > 1:
                # All processes do alike, and ask each other only where they wait for the device anyway.
                due, stopping = agree(np.array([due, stopping])) if at_log else (False, False)
            if due or stopping or at_validation:
                # What training resumes from has to be sound, and the metrics up to it on disk.
                self._log()
                self._check(metrics)
                self.writer.sync()
                self.checkpointer.save(step, state, best_step=int(state.best_step))
                if self.saved:
                    self.checkpointer.wait()
                    self.saved()
                saved_at = time.perf_counter()
        if stopping:
            self.checkpointer.wait()
            raise Stopped(
                f"{request.received or 'a signal'} came; stage {self.stage} is saved at step {step:,} of "
                f"{self.data.steps:,}. Run the same command again to resume"
            )
        return state, step

    def _check(self, metrics: dict[str, Any]) -> None:
        if failed := int(metrics["failed"]):
            allowed = self.training.skip_non_finite
            raise refuse_batch(self.folder, self.stage, failed, self.data, allowed=allowed, ids=self.ids)

    def _log(self) -> None:
        if self.pending is None:
            return
        at, values = self.pending[0], jax.device_get(self.pending[1])
        self._check(values)
        now = time.perf_counter()
        rate = (at - self.logged_step) * self.data.batch_size / (now - self.logged_at)
        self.pending, self.logged_at, self.logged_step = None, now, at
        # Without skipped batches there is nothing to say about them.
        shown = {name: float(value) for name, value in values.items() if name != "failed"}
        shown = {name: value for name, value in shown.items() if name != "skipped" or value}
        self.writer.write(at, {**shown, "items_per_second": rate})
        self.terminal.step(at, loss=shown["loss"], items_per_second=rate)

    def _select(self, state: TrainState, step: int, loss: float) -> TrainState:
        """Validates, and notes in the state whether this step is the best; of equal values the newest is kept."""
        before, name = time.perf_counter(), self.program.score
        scores = self.validate(local(state.params, self.mesh)) if self.validate else {}
        value = float(agree(np.asarray(scores[name], np.float32))) if self.validate else 0.0
        if scores:
            self.writer.write(step, {f"valid/{key}": value for key, value in scores.items()})
        improved = value >= float(state.best)
        scalars: dict[str, Any] = {"stale": np.int32(0 if improved else int(state.stale) + 1)}
        if improved:
            scalars |= {"best": np.float32(value), "best_step": np.int32(step)}
        state = state.replace(**place(scalars, {name: getattr(self.shardings, name) for name in scalars}))
        self.terminal.line(
            f"epoch {step // self.data.steps_per_epoch:>3}  step {step:>6,}  loss {loss:.4f}"
            + (f"  {name} {value:.4f}{'  best' if improved else ''}" if self.validate else "")
        )
        self.logged_at = time.perf_counter()
        self.validation_seconds += self.logged_at - before
        return state
