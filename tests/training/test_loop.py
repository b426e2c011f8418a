"""The loop on a model of one matrix: guard, saves, stops and what a resumed loop writes."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from nqf.config import MeshConfig, OptimConfig, TrainingConfig
from nqf.pipelines.datasets import TrainingData
from nqf.training import loop
from nqf.training.checkpoint import CheckpointError, restore_params
from nqf.training.guard import NonFiniteError
from nqf.training.loop import FitResult, fit, make_state, make_train_step
from nqf.training.program import Program
from nqf.training.stop import Stopped

BATCH, EPOCHS, PER_EPOCH = 4, 3, 30


class Batch(dict):
    """A batch of the toy problem, as the guard expects one."""

    def items(self) -> np.ndarray:
        return self["rows"]


jax.tree_util.register_pytree_with_keys(
    Batch,
    lambda batch: ([(jax.tree_util.DictKey(name), batch[name]) for name in sorted(batch)], sorted(batch)),
    lambda names, leaves: Batch(zip(names, leaves, strict=True)),
)


def toy_data() -> TrainingData:
    count = BATCH * PER_EPOCH
    x = np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)
    examples = (
        grain.MapDataset.range(count)
        .seed(0)
        .shuffle()
        .batch(BATCH, drop_remainder=True, batch_fn=lambda rows: np.asarray(rows, np.int64))
        .repeat(EPOCHS)
    )
    return TrainingData(
        batches=examples.map(lambda rows: Batch(rows=rows.astype(np.int32), x=x[rows])),
        examples=examples,
        users=np.arange(count),
        workers=0,
        steps=len(examples),
        steps_per_epoch=PER_EPOCH,
        batch_size=BATCH,
    )


DATA = toy_data()
PARAMS = {"dense": {"kernel": np.full((3, 2), 0.5, np.float32)}}


def toy_loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
    noise = jax.random.normal(key, (BATCH, 2))
    error = batch["x"] @ params["dense"]["kernel"] - frozen["target"] + 0.1 * noise
    return jnp.mean(jnp.square(error)), {"largest": jnp.max(jnp.abs(error))}


def poisoned(step: int) -> Callable:
    """The loss, not a number on the batch of one step."""
    rows = DATA.batches[step - 1]["rows"]

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        value, metrics = toy_loss(params, frozen, batch, key)
        return jnp.where(jnp.all(batch["rows"] == rows), jnp.nan, value), metrics

    return loss


def run_fit(
    folder: Path,
    *,
    loss_fn: Callable = toy_loss,
    at_validation: Callable[[int], None] = lambda count: None,
    score: Callable[[int], float] | None = None,
    select: bool = True,
    data: TrainingData = DATA,
    average: float = 0.1,
    **training: Any,
) -> FitResult:
    """Trains the toy; `at_validation` is called with the number of the validation."""
    count = 0

    def validate(params: Any) -> dict[str, float]:
        nonlocal count
        count += 1
        at_validation(count)
        return {"score": -float(jnp.sum(jnp.abs(params["dense"]["kernel"]))) if score is None else score(count)}

    program = Program(
        module=nn.Dense(2),
        init=lambda: PARAMS,
        frozen=lambda: {"target": np.float32(2.0)},
        variables=lambda params: {"params": params},
        loss_fn=loss_fn,
        data=lambda optim: data,
        optim=OptimConfig(batch_size=BATCH, epochs=EPOCHS, learning_rate=0.05, average=average),
        seed=0,
        validate=lambda: validate if select else None,
        score="score",
        report=lambda params, metrics: {},
    )
    return fit(program, folder, "toy", training=TrainingConfig(**training), console=Console(quiet=True), ids=ids_of)


def ids_of(users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    return {"user_ids": np.array([f"u{user}" for user in users]), "item_ids": np.array([f"i{item}" for item in items])}


def test_without_a_selection_the_newest_parameters_are_kept(tmp_path: Path) -> None:
    # The first validation is the best one, and would be kept.
    chosen = run_fit(tmp_path / "selected", score=lambda count: -count)
    newest = run_fit(tmp_path / "newest", select=False)
    assert (chosen.best_step, newest.best_step) == (PER_EPOCH, EPOCHS * PER_EPOCH)
    assert newest.metrics == {}
    assert not any("valid" in key for line in lines(tmp_path / "newest") for key in line)
    kept = restore_params(tmp_path / "newest" / "toy" / "checkpoints", newest.best_step, PARAMS)
    np.testing.assert_array_equal(kept["dense"]["kernel"], newest.params["dense"]["kernel"])


def lines(folder: Path) -> list[dict]:
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "items_per_second")} for line in kept]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "toy" / "checkpoints").iterdir() if path.name.isdecimal())


def wait_for(folder: Path, step: int) -> None:
    """Until an asynchronous save is whole."""
    while step not in saved(folder):
        time.sleep(0.01)


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_fit(folder)


class Cut(Exception):
    """What stands in for a crash in the middle of a validation."""


def cut(at: int) -> Callable[[int], None]:
    def check(count: int) -> None:
        if count == at:
            raise Cut

    return check


def test_without_an_epoch_the_initial_parameters_stay(tmp_path: Path) -> None:
    for _ in range(2):
        result = run_fit(tmp_path, data=dataclasses.replace(DATA, steps=0))
        assert result.steps == result.best_step == 0 and result.metrics == {"score": -3.0}
        assert_equal(result.params, PARAMS)
        assert_equal(restore_params(tmp_path / "toy" / "checkpoints", 0, PARAMS), PARAMS)


def test_metrics_are_logged_at_fixed_steps(whole: tuple[Path, FitResult]) -> None:
    steps = [line["step"] for line in lines(whole[0]) if "loss" in line]
    # Every twentieth step, and each end of an epoch.
    assert steps == [20, 30, 40, 60, 80, 90]
    assert [line["step"] for line in lines(whole[0]) if "valid/score" in line] == [30, 60, 90]


@pytest.mark.parametrize("seconds", [0.05, 1e9])
def test_crash_loses_no_line_and_doubles_none(
    whole: tuple[Path, FitResult], tmp_path: Path, seconds: float, record: Callable[..., None]
) -> None:
    for at in (1, 2, 3):
        with pytest.raises(Cut):
            run_fit(tmp_path, at_validation=cut(at), save_every_seconds=seconds)
    result = run_fit(tmp_path, save_every_seconds=seconds)
    assert lines(tmp_path) == lines(whole[0])
    assert (result.best_step, result.metrics, result.steps) == (whole[1].best_step, whole[1].metrics, 90)
    assert_equal(result.params, whole[1].params)
    record(
        f"crashes in three validations of one stage, one after the other, with a save every {seconds:g} s",
        tried=3,
        survived=3,
        seen="nothing: no line of the metrics is lost or double, parameters and best step are the same",
    )


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    result = run_fit(tmp_path, score=lambda count: [1.0, 3.0, 2.0, 3.0][count - 1], save_every_seconds=0.05)
    assert saved(tmp_path) == [60, 90]
    assert result.best_step == 60
    assert_equal(result.params, restore_params(tmp_path / "toy" / "checkpoints", 60, PARAMS))
    # Of equal scores the later one counts.
    assert run_fit(tmp_path / "ties", score=lambda count: 1.0).best_step == 90


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops(
    whole: tuple[Path, FitResult], tmp_path: Path, number: signal.Signals, record: Callable[..., None]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(
        Stopped, match=rf"{number.name} came; stage toy is saved at step 30 of 90.*same command"
    ) as raised:
        run_fit(tmp_path, at_validation=lambda count: os.kill(os.getpid(), number))
    assert raised.value.exit_code == 75
    assert signal.getsignal(number) == before
    assert saved(tmp_path) == [30]
    result = run_fit(tmp_path)
    assert lines(tmp_path) == lines(whole[0])
    assert_equal(result.params, whole[1].params)
    record(
        f"{number.name} in the middle of a stage",
        tried=1,
        survived=1,
        seen=f"“{str(raised.value).split('. ')[0]}” and exit status 75; the same command continues to the same bytes",
    )


def test_full_disk_leaves_the_previous_checkpoint(
    whole: tuple[Path, FitResult], tmp_path: Path, record: Callable[..., None]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(count: int) -> None:
        if count == 2:
            wait_for(tmp_path, 30)
            # From here on, no file can grow beyond this; of all that is written, only a checkpoint's metadata does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))

    try:
        with pytest.raises(CheckpointError, match=r"could not be written \(.*\); the checkpoint of step 30 is whole"):
            run_fit(tmp_path, at_validation=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved(tmp_path) == [30]
    result = run_fit(tmp_path)
    assert lines(tmp_path) == lines(whole[0])
    assert_equal(result.params, whole[1].params)
    record(
        "a disk that is full when a checkpoint is written",
        tried=1,
        survived=1,
        seen="an error that names the folder and the step whose checkpoint is whole; with room again, the same command "
        "continues to the same bytes",
    )


def test_full_disk_is_named_where_the_metrics_hit_it(
    whole: tuple[Path, FitResult], tmp_path: Path, record: Callable[..., None]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(count: int) -> None:
        if count == 2:
            wait_for(tmp_path, 30)
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))

    try:
        with pytest.raises(OSError, match=r"metrics.jsonl: could not be written .* make room"):
            run_fit(tmp_path, at_validation=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved(tmp_path) == [30]
    # The line that was cut off is dropped and written again.
    run_fit(tmp_path)
    assert lines(tmp_path) == lines(whole[0])
    record(
        "a disk that is full when metrics are written",
        tried=1,
        survived=1,
        seen="an error that names metrics.jsonl; the half line is dropped and written again by the same command",
    )


def test_non_finite_loss_stops_and_names_the_batch(
    whole: tuple[Path, FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    for _ in range(2):
        # Again: it continues from before the batch and meets it again.
        with pytest.raises(
            NonFiniteError, match=r"stage toy: the loss or its gradient is not finite at step 47.*non-finite-47"
        ):
            run_fit(tmp_path, loss_fn=poisoned(47))
        assert saved(tmp_path) == [30]
    stored = np.load(tmp_path / "toy" / "non-finite-47.npz", allow_pickle=False)
    batch = DATA.batches[46]
    np.testing.assert_array_equal(stored["x"], batch["x"])
    assert stored["user_ids"].tolist() == [f"u{row}" for row in batch["rows"]]
    assert stored["item_ids"].tolist() == [f"i{row}" for row in np.sort(batch["rows"])]
    # The replay: the loss on the stored batch is what it was.
    assert not np.isfinite(poisoned(47)(PARAMS, {"target": 2.0}, stored, jax.random.key(0))[0])
    # With the fault fixed, the run ends as if it had never been.
    assert_equal(run_fit(tmp_path).params, whole[1].params)
    record(
        "a loss that is not a number, twice",
        tried=2,
        survived=2,
        seen="an error with stage, step and the file that holds the batch and its ids; nothing was learned from it",
    )


def test_non_finite_batches_may_be_left_out(tmp_path: Path, record: Callable[..., None]) -> None:
    result = run_fit(tmp_path, loss_fn=poisoned(47), skip_non_finite=1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    counts = {line["step"]: line.get("skipped") for line in lines(tmp_path) if "loss" in line}
    assert counts == {20: None, 30: None, 40: None, 60: 1, 80: 1, 90: 1}
    json.dumps(lines(tmp_path), allow_nan=False)
    record(
        "a loss that is not a number, with `training.skip_non_finite`",
        tried=1,
        survived=1,
        seen="`skipped` in the metrics from then on; parameters and optimizer are as if the batch had not been",
    )


def step_of(loss_fn: Callable, skip: int = 0) -> tuple[Callable, Any]:
    optimizer = optax.adam(0.1)
    return make_train_step(loss_fn, optimizer, seed=0, skip=skip), make_state(PARAMS, optimizer)


def test_bad_step_changes_nothing_but_counters() -> None:
    step, state = step_of(poisoned(1), skip=1)
    before = jax.device_get(state)
    frozen = {"target": np.float32(2.0)}
    state, metrics = step(state, frozen, DATA.batches[0])
    assert not np.isfinite(metrics["loss"])
    assert_equal(jax.device_get((state.params, state.opt_state)), (before.params, before.opt_state))
    assert (int(state.step), int(state.skipped), int(state.failed)) == (1, 1, 0)
    state, _ = step(state, frozen, DATA.batches[1])
    assert not np.array_equal(state.params["dense"]["kernel"], PARAMS["dense"]["kernel"])
    state, _ = step(state, frozen, DATA.batches[0])
    # The second one is one too many; later ones do not move the step that is named.
    state, _ = step(state, frozen, DATA.batches[0])
    assert (int(state.step), int(state.skipped), int(state.failed)) == (4, 3, 3)
    assert step._cache_size() == 1


def test_kept_parameters_are_the_power_function_average_of_the_raw_ones() -> None:
    """Against the recursion of Karras et al. 2024, by hand in float64, and against the plain run of the same steps."""
    optimizer, share, frozen = optax.adam(0.1), 0.25, {"target": np.float32(2.0)}
    step = make_train_step(poisoned(4), optimizer, seed=0, skip=1, average=share)
    plain = make_train_step(poisoned(4), optimizer, seed=0, skip=1)
    state, alone = make_state(PARAMS, optimizer, average=share), make_state(PARAMS, optimizer)
    mean = np.zeros((3, 2))
    for number in range(12):
        state, metrics = step(state, frozen, DATA.batches[number])
        alone, expected = plain(alone, frozen, DATA.batches[number])
        # What is averaged changes nothing of what is trained.
        assert_equal(jax.device_get((state.raw, metrics)), jax.device_get((alone.params, expected)))
        if number != 3:  # A step that is left out is none of the average either.
            mean += (np.asarray(state.raw["dense"]["kernel"], np.float64) - mean) / (1 + share * number)
        np.testing.assert_allclose(state.params["dense"]["kernel"], mean, rtol=1e-6)
        assert number == 0 or np.abs(mean - state.raw["dense"]["kernel"]).max() > 1e-3
    assert alone.raw is None and int(state.skipped) == 1


def test_a_training_of_a_version_without_averages_resumes(tmp_path: Path) -> None:
    """Its checkpoints have no raw parameters: from there on, what it kept is where both begin."""

    class Enough(Exception):
        pass

    def stop(count: int) -> None:
        if count == 2:
            raise Enough

    with pytest.raises(Enough):
        run_fit(tmp_path, at_validation=stop, average=0.0)
    assert "raw" not in stored_names(tmp_path / "toy" / "checkpoints" / "30")
    shutil.copytree(tmp_path, tmp_path.with_name("plain"))
    averaged, plain = run_fit(tmp_path), run_fit(tmp_path.with_name("plain"), average=0.0)
    assert averaged.steps == plain.steps == EPOCHS * PER_EPOCH
    names = stored_names(tmp_path / "toy" / "checkpoints" / "90")
    assert {"raw", "params"} <= names
    assert np.abs(averaged.params["dense"]["kernel"] - plain.params["dense"]["kernel"]).max() > 1e-4


def stored_names(checkpoint: Path) -> set[str]:
    return set(ocp.metadata(str(checkpoint), "state").metadata)


def test_non_finite_gradient_of_a_finite_loss_is_caught() -> None:
    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        # The root's slope at zero is infinite.
        return jnp.sqrt(jnp.sum(jnp.square(params["dense"]["kernel"] - 0.5))), {}

    step, state = step_of(loss)
    state, metrics = step(state, {}, DATA.batches[0])
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert int(metrics["failed"]) == 1
    assert_equal(jax.device_get(state.params), PARAMS)


def test_mesh_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for mesh in (MeshConfig(fsdp=3), MeshConfig(data=2)):
        with pytest.raises(ValueError, match=r"training.mesh: .* does not make the 1 devices"):
            run_fit(tmp_path, mesh=mesh)


def test_exchanged_checkpoint_is_refused(tmp_path: Path, record: Callable[..., None]) -> None:
    with pytest.raises(Cut):
        run_fit(tmp_path, at_validation=cut(2))
    checkpoints = tmp_path / "toy" / "checkpoints"
    (checkpoints / "30").rename(checkpoints / "60")
    with pytest.raises(CheckpointError, match="60: holds step 30"):
        run_fit(tmp_path)
    record(
        "a checkpoint under another step's name",
        tried=1,
        survived=1,
        seen="an error that says which step it holds",
    )


def test_log_interval_is_what_the_tests_assume() -> None:
    assert loop.LOG_EVERY == 20


def test_a_training_does_not_import_torch(tmp_path: Path) -> None:
    """tensorboardX takes torch's arrays, too, and imports it where it is installed."""
    code = (
        "import sys; from pathlib import Path; from nqf.training.writer import Writer;"
        "Writer(Path(sys.argv[1]), 'item', resumed_step=0); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard" / "item").iterdir())
