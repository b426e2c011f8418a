"""The planner: the largest batch, and what it refuses. Its prediction is measured by benchmarks/planned_peak.py."""

import dataclasses
import math
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from nqf import train
from nqf.config import ConfigError
from nqf.stages.plan import Plan, program_of
from nqf.stages.records import StageError
from nqf.stages.run import open_run
from nqf.training.devices import TARGETS, Target

PLAN = Plan(
    stage="item",
    trainable=1,
    frozen=0,
    batch_size=10,
    steps=1,
    flops=8e12,
    state=100,
    tables=50,
    activations=1_000,
    peak=1_150,
    moved=2_000,
    sent=3e9,
    fixed=150,
    per_example=100.0,
    examples=1_000,
)


def test_the_largest_batch_is_where_the_line_meets_the_memory():
    assert PLAN.largest_batch(PLAN.peak) == PLAN.batch_size
    assert PLAN.largest_batch(2_199) == 20
    assert PLAN.largest_batch(149) == 0
    assert PLAN.largest_batch(10**9) == PLAN.examples


def test_a_step_takes_as_long_as_what_it_has_least_of() -> None:
    target = Target(kind="x", count=8, memory=1, flops=1e12, bandwidth=1e3, link=1e9)
    assert PLAN.seconds(target) == (3.0, "traffic")
    assert PLAN.seconds(dataclasses.replace(target, link=1e12)) == (2.0, "memory")
    assert PLAN.seconds(dataclasses.replace(target, link=1e12, bandwidth=1e9)) == (1.0, "products")
    # What the program does not tell is no bound.
    assert dataclasses.replace(PLAN, sent=math.nan).seconds(target) == (2.0, "memory")


def test_every_target_can_be_asked_for() -> None:
    assert set(typing.get_args(typing.get_type_hints(train.TrainArguments)["device"])) == {"", *TARGETS}


def test_devices_that_are_not_here_are_planned_for_and_not_trained_on() -> None:
    with pytest.raises(ConfigError, match="--plan alone"):
        train.main(["--config", "quickstart", "--device", "8xh200"])


@pytest.mark.slow
@pytest.mark.ci
def test_a_plan_for_eight_devices_says_that_it_is_an_estimate(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "nqf.train", "--run", str(tiny_run), "--plan", "--stage", "joint"]
    options = ["--device", "8xh200", "--training.mesh.fsdp", "8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("8 x H200", "estimated", "8 simulated CPUs", "131.32 GiB", "sent in a step", "ms a step, at least"):
        assert words in done.stdout
    done = subprocess.run([*command, "--device", "h200", "--training.mesh.fsdp", "8"], capture_output=True, text=True)
    assert done.returncode and "does not make the 1 devices" in done.stderr


def test_without_a_fields_stage_the_plan_says_what_to_run(tiny_run, tmp_path):
    run = dataclasses.replace(open_run(tiny_run), folder=tmp_path)
    with pytest.raises(StageError, match="--stage fields"):
        program_of(run, "item")


@pytest.mark.slow
@pytest.mark.ci
def test_every_training_stage_is_planned_from_the_command_line_without_training(tiny_run, tmp_path):
    run = tmp_path / "run"
    base = [sys.executable, "-m", "nqf.train", "--config", str(tiny_run / "config.yaml"), "--run", str(run)]
    for options in (["--stage", "fields"], ["--plan", "--memory-gib", "0.5"]):
        done = subprocess.run([*base, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for word in ("item", "user", "joint", "0.50 GiB", "field cache"):
        assert word in done.stdout
    assert not any((run / stage).exists() for stage in ("item", "tokens", "user", "joint"))
