"""The stages as a graph: what is missing or stale, why, and running it."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nqf.config import Config, load_config, save_config
from nqf.data.load import prepare
from nqf.fields.build import build
from nqf.interop.encoders import encoder_factories
from nqf.training.artifacts import (
    STAGES,
    StageError,
    differences,
    fingerprint,
    parts_of,
    read_artifact,
    status,
    write_artifact,
    write_json,
)
from nqf.training.item_stage import make_tokens, train_items
from nqf.training.joint_stage import train_joint
from nqf.training.run import Run
from nqf.training.user_stage import train_users
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


_RUN = {
    "fields": build_fields,
    "item": train_items,
    "tokens": make_tokens,
    "user": train_users,
    "joint": train_joint,
}


def open_for_training(config: Config, folder: Path, console: Console) -> Run:
    """Makes the run folder and saves the resolved configuration in it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    # Read back, so that training sees exactly what later commands will see.
    return Run(folder=folder, config=load_config(folder / "config.yaml"), console=console)


def run_stage(run: Run, stage: str) -> bool:
    """Runs one stage if it is missing or stale.

    A stage that was cut off goes on from its newest checkpoint if nothing it depends on has changed; otherwise what
    it left is deleted.

    Returns:
      Whether anything was run.

    Raises:
      StageError: A stage before it is missing or stale.
    """
    for earlier in STAGES[: STAGES.index(stage)]:
        reason = status(run.config, earlier, run.folder)
        if reason:
            raise StageError(
                f"stage '{stage}' needs stage '{earlier}', but {_because(reason)}. "
                f"Run --stage {earlier} first, or --stage all to run everything that is missing or stale."
            )
    reason = status(run.config, stage, run.folder)
    if not reason:
        run.console.print(f"[bold]{stage}[/bold]  up to date", highlight=False)
        return False
    run.console.print(f"[bold]{stage}[/bold]  running: {reason}", highlight=False)
    parts = parts_of(run.config, stage, run.folder)
    folder = run.folder / stage
    _discard_other_start(run, folder, stage, parts)
    started = time.perf_counter()
    result = _RUN[stage](run)
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    result["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_artifact(run.folder, stage, parts, result)
    run.console.print(f"[bold]{stage}[/bold]  done in {result['wall_seconds']:.1f} s", highlight=False)
    return True


def _discard_other_start(run: Run, folder: Path, stage: str, parts: dict[str, Any]) -> None:
    """Deletes what a start under other settings left; keeps what this one can go on from.

    The fields stage is kept in any case: its cache is content-addressed and decides value by value.
    """
    marker = folder / "started.json"
    (folder / "stage.json").unlink(missing_ok=True)
    if folder.is_dir() and stage != "fields":
        left = json.loads(marker.read_text()) if marker.is_file() else None
        if left is None or fingerprint(left) != fingerprint(parts):
            changed = "; ".join(differences(left, parts)[:3]) if left else "it left no record of its settings"
            run.console.print(f"[bold]{stage}[/bold]  discarding an earlier start: {changed}", highlight=False)
            shutil.rmtree(folder)
    write_json(marker, parts)


def run_all(run: Run) -> None:
    """Runs every stage that is missing or stale, in order."""
    for stage in STAGES:
        run_stage(run, stage)


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
    return read_artifact(run.folder, stage).result


def _because(reason: str) -> str:
    return reason if reason == "it has not been run" else f"it is stale ({reason})"
