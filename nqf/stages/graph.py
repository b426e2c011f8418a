"""The stages as a graph: what is missing or stale, why, and running it."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nqf.config import Config, config_text, load_config
from nqf.data.load import prepare
from nqf.fields.build import build
from nqf.interop.encoders import encoder_factories
from nqf.stages.artifacts import (
    STAGES,
    STARTED,
    StageError,
    check_files,
    cut_off,
    differences,
    parts_of,
    read_artifact,
    started,
    status,
    write_artifact,
    write_json,
    write_whole,
)
from nqf.stages.item import make_tokens, train_items
from nqf.stages.joint import train_joint
from nqf.stages.run import Run
from nqf.stages.user import train_users
from nqf.training.mesh import barrier, is_primary
from nqf.training.writer import Encoding


def build_fields(run: Run) -> dict[str, Any]:
    """Runs the fields stage: reads and splits the tables, then encodes what the cache lacks."""
    dataset = prepare(run.config.data, run.folder / "data")
    with Encoding(run.console) as encoding:
        cache = build(
            dataset.catalogue,
            run.folder / "fields",
            run.config.fields,
            factories=encoder_factories(run.config.fields),
            reviews=dataset.interactions.reviews,
            progress=encoding.step,
        )
    for warning in (*dataset.split.warnings, *cache.warnings):
        run.console.print(f"[yellow]warning[/yellow]  {warning}", highlight=False)
    return {
        "items": len(dataset.catalogue.item_ids),
        "users": len(dataset.interactions.user_ids),
        "interactions": len(dataset.interactions.items),
        "fields": {name: {"modality": cache.modalities[name], "width": cache.widths[name]} for name in cache.names},
        "data": dataset.report,
    }


_TRAINED = ("item", "user", "joint")
_RUN = {
    "fields": build_fields,
    "item": train_items,
    "tokens": make_tokens,
    "user": train_users,
    "joint": train_joint,
}


def open_for_training(
    config: Config, folder: Path, console: Console, *, stages: Sequence[str] = STAGES, restart: bool = False
) -> Run:
    """Makes the run folder and saves the resolved configuration in it.

    Args:
      config: The configuration; relative data paths start at the working directory.
      folder: Run folder.
      console: Terminal.
      stages: What is going to be run.
      restart: Whether starts under other settings are to be discarded.

    Raises:
      StageError: One of the stages was cut off under other settings; the folder stays as it is.
    """
    paths = {key: getattr(config.data, key) for key in ("items", "interactions", "schema")}
    paths = {key: str(Path(path).resolve()) for key, path in paths.items() if path is not None}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))
    if not restart:
        for stage in stages:
            _refuse_other_settings(config, folder, stage)
    if is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", config_text(config))
    barrier("config")
    # Read back, so that training sees exactly what later commands will see.
    return Run(folder=folder, config=load_config(folder / "config.yaml"), console=console, verify=True)


def run_stage(run: Run, stage: str, *, restart: bool = False) -> bool:
    """Runs one stage if it is missing or stale.

    A stage that was cut off goes on from its newest checkpoint. A stale one, and a start whose inputs are there no
    more, is deleted first.

    Args:
      run: The run.
      stage: Name of the stage.
      restart: Begin anew what was cut off.

    Returns:
      Whether anything was run.

    Raises:
      StageError: A stage before it is missing or stale, or it was cut off under other settings.
    """
    for earlier in STAGES[: STAGES.index(stage)]:
        reason = status(run.config, earlier, run.folder)
        if reason:
            raise StageError(
                f"stage '{stage}' needs stage '{earlier}', but {_because(reason)}. "
                f"Run --stage {earlier} first, or --stage all to run everything that is missing or stale."
            )
        check_files(run.folder, earlier)
    reason = status(run.config, stage, run.folder)
    if not reason:
        run.console.print(f"[bold]{stage}[/bold]  up to date", highlight=False)
        return False
    if not restart:
        _refuse_other_settings(run.config, run.folder, stage)
    run.console.print(f"[bold]{stage}[/bold]  running: {reason}", highlight=False)
    parts = parts_of(run.config, stage, run.folder)
    if is_primary():
        _clear(run, stage, restart)
        write_json(run.folder / stage / STARTED, started(parts))
    barrier(f"{stage} begins")
    begun = time.perf_counter()
    # The fields are made by one process for all.
    result = _RUN[stage](run) if stage != "fields" or is_primary() else {}
    result["wall_seconds"] = round(time.perf_counter() - begun, 1)
    result["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if is_primary():
        write_artifact(run.folder, stage, parts, result)
    barrier(f"{stage} ends")
    run.console.print(f"[bold]{stage}[/bold]  done in {result['wall_seconds']:.1f} s", highlight=False)
    return True


def _refuse_other_settings(config: Config, folder: Path, stage: str) -> None:
    """Refuses to go on with a stage that was cut off under other settings, which would lose what it learned.

    Changed inputs are no reason: the ones that it could go on with are there no more.
    """
    left = cut_off(folder, stage)
    if left is None or not (folder / stage / "checkpoints").is_dir():
        return
    lines = [line for line in differences(left, started(parts_of(config, stage, folder))) if "input " not in line]
    if lines:
        raise StageError(
            f"{folder / stage}: this stage was cut off under other settings, which would change its data or its model: "
            f"{'; '.join(lines)}. Restore them to go on from its newest checkpoint, or discard it with --restart"
        )


def _clear(run: Run, stage: str, restart: bool) -> None:
    """Deletes what an earlier start left, unless this one can go on from it.

    The fields stage is kept in any case: its cache is content-addressed and decides value by value.
    """
    folder = run.folder / stage
    finished, left = (folder / "stage.json").exists(), cut_off(run.folder, stage)
    changed = differences(left, started(parts_of(run.config, stage, run.folder))) if left else []
    if stage in _TRAINED and left is not None and not changed and not restart:
        return
    if not finished and (folder / "checkpoints").is_dir():
        why = "--restart" if restart else "; ".join(changed) or "it left no record of its settings"
        run.console.print(f"[bold]{stage}[/bold]  discarding an earlier start: {why}", highlight=False)
    # In this order, so that a kill in between leaves neither what looks finished nor what could be gone on from.
    (folder / STARTED).unlink(missing_ok=True)
    (folder / "stage.json").unlink(missing_ok=True)
    if stage != "fields" and folder.is_dir():
        shutil.rmtree(folder)


def require(run: Run, stage: str) -> dict[str, Any]:
    """The result of a finished, fresh stage.

    Raises:
      StageError: It is missing or stale.
    """
    for earlier in STAGES[: STAGES.index(stage) + 1]:
        reason = status(run.config, earlier, run.folder)
        if reason:
            raise StageError(
                f"{run.folder}: stage '{earlier}' cannot be used: {_because(reason)}. "
                f"Run python -m nqf.train --run {run.folder} --stage all."
            )
        check_files(run.folder, earlier)
    return read_artifact(run.folder, stage).result


def _because(reason: str) -> str:
    return reason if reason == "it has not been run" else f"it is stale ({reason})"
