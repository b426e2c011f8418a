"""The planner: the largest batch, and what it refuses. Its prediction is measured by benchmarks/planned_peak.py."""

import dataclasses
import subprocess
import sys

import pytest

from nqf.stages.plan import Plan, program_of
from nqf.stages.records import StageError
from nqf.stages.run import open_run

PLAN = Plan(
    stage="item",
    trainable=1,
    frozen=0,
    batch_size=10,
    steps=1,
    flops=1.0,
    state=100,
    tables=50,
    activations=1_000,
    peak=1_150,
    fixed=150,
    per_example=100.0,
    examples=1_000,
)


def test_the_largest_batch_is_where_the_line_meets_the_memory():
    assert PLAN.largest_batch(PLAN.peak) == PLAN.batch_size
    assert PLAN.largest_batch(2_199) == 20
    assert PLAN.largest_batch(149) == 0
    assert PLAN.largest_batch(10**9) == PLAN.examples


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
