"""Whose a run folder is: what nqf did not make is neither replaced nor deleted, and a finished stage outlives the start
of its successor."""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from rich.console import Console

from nqf import files, train
from nqf.config import Config
from nqf.stages import folder as folders
from nqf.stages import graph as stages
from nqf.stages.artifacts import status
from nqf.stages.graph import NAMES, open_for_training, run_stage, stage_of, take_over
from nqf.stages.records import StageError, read_artifact
from nqf.stages.run import Run

ROAD = tuple(name for name in NAMES if name != "sasrec")
CONFIG = Config()


class Crash(Exception):
    pass


def train_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config = CONFIG, crash: str = "", restart: bool = False
) -> list[str]:
    """Runs the road with stages that cost nothing, each writing what it is declared to; those that ran."""
    ran = []

    def make(run: Run, stage: Any) -> dict[str, Any]:
        ran.append(stage.name)
        for name in (*stage.also, f"{stage.name}/checkpoints" if stage.program else f"{stage.name}/tokens.npy"):
            (run.folder / name).mkdir(parents=True, exist_ok=True)
        (run.folder / stage.name / "whose.txt").write_text(repr(run.config.item.margin))
        if stage.name == crash:
            raise Crash
        return {"best_step": 1}

    monkeypatch.setattr(stages, "_make", make)
    run = open_for_training(config, folder, Console(quiet=True), stages=ROAD, restart=restart)
    for name in ROAD:
        run_stage(run, name, restart=restart)
    return ran


def changed(margin: float) -> Config:
    return dataclasses.replace(CONFIG, item=dataclasses.replace(CONFIG.item, margin=margin))


def test_a_shop_is_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]) -> None:
    shop = tmp_path / "shop"
    (shop / "data").mkdir(parents=True)
    (shop / "data" / "orders.csv").write_text("user_id,item_id\n1,2\n")
    (shop / "config.yaml").write_text("mine: true\n")
    (shop / "data" / "config.yaml").write_text("name: shop\n")
    monkeypatch.chdir(shop)
    with pytest.raises(StageError, match=r"not a run folder and not empty .it holds config.yaml, data"):
        train.main(["--config", "data/config.yaml", "--run", ".", "--stage", "fields"])
    assert (shop / "config.yaml").read_text() == "mine: true\n"
    assert (shop / "data" / "orders.csv").read_text() == "user_id,item_id\n1,2\n"
    assert sorted(path.name for path in shop.iterdir()) == ["config.yaml", "data"]
    record(
        "training into a folder of one's own, with tables and a configuration in it",
        tried=1,
        survived=1,
        seen="refused before anything is written, with what the folder holds",
    )


@pytest.mark.parametrize("name", ["user", "data", "joint", "tokens"])
def test_a_folder_of_ones_own_in_a_run_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, record: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    folders.mark_run_folder(run)
    (run / name).mkdir()
    (run / name / "notes.txt").write_text("mine")
    with pytest.raises(StageError, match=rf"{name}: not made by nqf; move it away"):
        train_with(monkeypatch, run)
    assert (run / name / "notes.txt").read_text() == "mine"
    record(
        "a folder of somebody's own in a run folder, under the name of a stage or of the data",
        tried=1,
        survived=1,
        seen="refused with the folder; it stays",
    )


@pytest.mark.parametrize("name", ["data", "item"])
def test_nothing_is_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, record: Callable[..., None]
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    folders.mark_run_folder(run)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(StageError, match=rf"{name}: a link"):
        train_with(monkeypatch, run)
    assert (elsewhere / "precious").read_text() == "mine"
    assert list(elsewhere.iterdir()) == [elsewhere / "precious"]
    record(
        "a link in a run folder where a stage or the data would be written",
        tried=1,
        survived=1,
        seen="refused with the link; what it leads to stays",
    )


def test_files_of_ones_own_beside_a_stage_outlive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, tmp_path / "run")
    (tmp_path / "run" / "user" / "my notes.txt").write_text("mine")
    train_with(monkeypatch, tmp_path / "run", changed(0.7))
    kept = [path for path in (tmp_path / "run").rglob("my notes.txt")]
    assert [path.read_text() for path in kept] == ["mine"]


def test_a_mistyped_option_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    assert train_with(monkeypatch, run) == list(ROAD)
    before = read_artifact(run, "item")
    with pytest.raises(Crash):
        train_with(monkeypatch, run, changed(0.7), crash="item")
    # What was finished waits.
    assert (run / "previous" / "item" / "stage.json").is_file()
    assert (run / "previous" / "item" / "whose.txt").read_text() == "0.5"
    # The right option again: nothing is trained, and the other start is kept in its place.
    assert train_with(monkeypatch, run) == []
    assert read_artifact(run, "item") == before and status(CONFIG, stage_of("joint"), run) == ""
    assert (run / "previous" / "item" / "started.json").is_file()
    # And the other option resumes what it began.
    assert train_with(monkeypatch, run, changed(0.7)) == ["item", "tokens", "user", "joint", "score"]
    assert not list((run / "previous").glob("*/stage.json")) and not list((run / "previous").glob("*/started.json"))
    record(
        "a finished stage begun again with another option, stopped, and run with the first option again",
        tried=1,
        survived=1,
        seen="the finished stage comes back from `previous/` and nothing is trained",
    )


@pytest.mark.parametrize("at", range(3))
def test_a_kill_between_the_moves_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, record: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    train_with(monkeypatch, run)
    with pytest.raises(Crash):
        train_with(monkeypatch, run, changed(0.7), crash="item")
    moves, real = [], files.publish

    def publish(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            if len(moves) == at:
                raise Crash
            moves.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        with pytest.raises(Crash):
            train_with(patch, run)
    ran = train_with(monkeypatch, run)
    assert ran == [] and read_artifact(run, "item") is not None
    record(
        "a kill between the moves that bring a finished stage back from `previous/`",
        tried=1,
        survived=1,
        seen="nothing: the same command ends with the finished stage",
    )


def test_a_copy_of_a_stage_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_with(monkeypatch, tmp_path / "one")
    copied, real = [], files.publish

    def publish(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            copied.append(source)
            if len(copied) == 3:
                raise Crash
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", publish)
        with pytest.raises(Crash):
            take_over(CONFIG, tmp_path / "two", [tmp_path / "one"])
    take_over(CONFIG, tmp_path / "two", [tmp_path / "one"])
    assert all(status(CONFIG, stage_of(name), tmp_path / "two") == "" for name in ROAD)


def test_a_run_of_before_marks_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train_with(monkeypatch, run)
    (run / folders.MARK).unlink()
    assert train_with(monkeypatch, run) == []
    assert "data" in folders.owned(run)


def test_other_libraries_are_named_where_a_stage_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train_with(monkeypatch, run, crash="item")
    path = run / "item" / "started.json"
    started = json.loads(path.read_text())
    started["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(started))
    monkeypatch.setattr(stages, "_make", lambda run, stage: {"best_step": 1})
    console = Console(record=True, width=300, file=open(os.devnull, "w"))
    run_stage(Run(folder=run, config=CONFIG, console=console), "item")
    assert "item resumes under other libraries than it began with" in (text := console.export_text())
    assert "jax was '0.0.1'" in text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, record: Callable[..., None]
) -> None:
    def acquire(self: filelock.FileLock, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(files.InUseError, match=r"\.lock: its file system has no locks .*NQF_LOCKS=off"):
        with files.locked(tmp_path):
            pass
    monkeypatch.setenv("NQF_LOCKS", "off")
    with files.locked(tmp_path):
        pass
    record(
        f"a run folder on a file system without locks ({errno.errorcode[code]})",
        tried=1,
        survived=1,
        seen="the lock's file and the switch that leaves locks out",
    )
