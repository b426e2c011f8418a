"""What a stage reads of the configuration is what it says it reads, so that no key is forgotten in a fingerprint."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

from nqf.config import Config
from nqf.stages.graph import NAMES, stage_of, up_to
from nqf.stages.run import Run, open_run

# How the work is done, which is no part of a result but for the rounding of sums.
HOW = ("training", "evaluation.batch_size")
# Keys that rule which of a stage's checkpoints is the best one, and none of them: they may be chosen on validation
# after training, which would be stale at every trial if they counted.
SELECTS = ("evaluation.repeats", "evaluation.new_item_weight")


@contextmanager
def watched(config: Config) -> Iterator[set[str]]:
    """The dotted keys whose values are read of one configuration."""
    read: set[str] = set()
    paths: dict[int, str] = {}
    classes: set[type] = set()

    def number(section: Any, prefix: str) -> None:
        paths[id(section)] = prefix
        classes.add(type(section))
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                number(value, f"{prefix}{field.name}.")

    number(config, "")

    def getattribute(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if (
            not name.startswith("_")
            and id(self) in paths
            and not dataclasses.is_dataclass(value)
            and not callable(value)
        ):
            read.add(paths[id(self)] + name)
        return value

    try:
        for cls in classes:
            cls.__getattribute__ = getattribute
        yield read
    finally:
        for cls in classes:
            del cls.__getattribute__


def unshared(config: Any) -> Any:
    """A copy in which no two sections are one object, as defaults are."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return type(config)(**{name: unshared(v) if dataclasses.is_dataclass(v) else v for name, v in values.items()})


def exercise(run: Run, name: str) -> None:
    """Does everything with a stage that reads the configuration, on shapes where those suffice."""
    stage = stage_of(name)
    if stage.make is not None:
        stage.make(run)
        return
    program = stage.program(run, False)
    params = program.start(program.init())
    data = program.data(program.optim)
    jax.eval_shape(program.loss_fn, params, program.frozen(), data.batches[0], jax.random.key(0))
    metrics = program.validate()(params)
    program.report(params, metrics)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_that_no_fingerprint_holds(tiny_run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    run = dataclasses.replace(run, config=unshared(run.config))
    with watched(run.config) as read:
        exercise(run, name)
    known = [key for stage in up_to(name) for key in stage.reads]
    assert read
    forgotten = {
        key for key in read if not any(key == part or key.startswith(f"{part}.") for part in (*known, *HOW, *SELECTS))
    }
    assert not forgotten


def test_the_watch_sees_a_key_that_is_read() -> None:
    config = unshared(Config())
    with watched(config) as read:
        assert config.item.qformer.width and config.user.qformer
    assert read == {"item.qformer.width"}
