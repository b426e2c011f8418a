"""The stages as a graph: what is missing or stale and why, running it, and restoring what is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nqf import files
from nqf.config import DATA_PATHS, Config, config_text, load_config
from nqf.data import addresses
from nqf.stages import folder as folders
from nqf.stages.artifacts import (
    STARTED,
    VERSION,
    comparable,
    cut_off,
    differences,
    parts_of,
    stale,
    started,
    status,
    versions,
    write_artifact,
)
from nqf.stages.fields import FIELDS, assist_fields
from nqf.stages.item import ITEM
from nqf.stages.joint import JOINT
from nqf.stages.records import RECORD, StageError, altered_file, check_files, read_artifact, read_record
from nqf.stages.run import Run
from nqf.stages.sasrec import SASREC
from nqf.stages.score import COUNTS, SCORE
from nqf.stages.stage import Stage
from nqf.stages.tokens import TOKENS
from nqf.stages.user import USER
from nqf.training.mesh import barrier, is_primary

STAGES = (FIELDS, COUNTS, ITEM, TOKENS, USER, JOINT, SCORE, SASREC)
NAMES = tuple(stage.name for stage in STAGES)


def stage_of(name: str) -> Stage:
    """The stage of a name."""
    return next(stage for stage in STAGES if stage.name == name)


def up_to(name: str) -> tuple[Stage, ...]:
    """A stage and all that it builds on, first things first."""
    stage = stage_of(name)
    needed = {stage.name}.union(*({earlier.name for earlier in up_to(after)} for after in stage.after))
    return tuple(stage for stage in STAGES if stage.name in needed)


def served(name: str, folder: Path) -> tuple[Stage, ...]:
    """What serving reads of a run: a stage, all that it builds on, and the joint stage's score, where it has one."""
    scored = name == JOINT.name and read_artifact(folder, SCORE.name) is not None
    return up_to(SCORE.name if scored else name)


def wanted(config: Config) -> tuple[str, ...]:
    """Names of the stages that `--stage all` runs."""
    return tuple(name for name in NAMES if name != SASREC.name or config.baselines.sasrec)


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made if missing; of several processes of one run, the first holds it for all.

    Raises:
      StageError: The folder is somebody else's.
      InUseError: Another process holds it; names that process.
    """
    if not is_primary():
        yield
        return
    folders.check_run_folder(folder)
    with files.locked(folder):
        yield


def open_for_training(
    config: Config, folder: Path, console: Console, *, stages: Sequence[str] = NAMES, restart: bool = False
) -> Run:
    """Makes the run folder and saves the resolved configuration in it.

    Args:
      config: The configuration; relative data paths start at the working directory.
      folder: Run folder.
      console: Terminal.
      stages: What is going to be run.
      restart: Whether starts under other settings are to be discarded.

    Raises:
      StageError: The folder is somebody else's, or one of the stages was cut off under other settings; nothing changes.
    """
    paths = {key: getattr(config.data, key) for key in ("items", "interactions", "schema")}
    paths = {key: str(Path(path).resolve()) for key, path in paths.items() if path and not files.is_address(path)}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths))
    folders.check_run_folder(folder)
    addresses.forget()
    if not restart:
        for name in stages:
            _refuse_other_settings(config, folder, stage_of(name))
    if is_primary():
        folders.mark_run_folder(folder)
        files.write_text(folder / "config.yaml", config_text(config))
    barrier("config")
    # Read back, so that training sees exactly what later commands will see, but for the credentials of addresses.
    saved = load_config(folder / "config.yaml")
    given = {key: path for key in DATA_PATHS if (path := getattr(config.data, key)) and files.is_address(path)}
    saved = dataclasses.replace(saved, data=dataclasses.replace(saved.data, **given))
    return Run(folder=folder, config=saved, console=console)


def run_stage(run: Run, name: str, *, restart: bool = False) -> bool:
    """Runs one stage if it is missing or stale.

    A stage that was cut off resumes from its newest checkpoint. What a finished one wrote under other settings moves
    to `previous/` and goes when the new one has finished; it comes back when it is what the settings ask for again.

    Args:
      run: The run.
      name: Name of the stage.
      restart: Begin again what was cut off.

    Returns:
      Whether anything was run.

    Raises:
      StageError: A stage before it is missing or stale, it was cut off under other settings, or its folder is
        somebody else's.
    """
    stage = stage_of(name)
    for earlier in up_to(name)[:-1]:
        if reason := status(run.config, earlier, run.folder):
            raise StageError(
                f"stage '{name}' needs stage '{earlier.name}', but {_because(reason)}. "
                f"Run --stage {earlier.name} first, or --stage all to run everything that is missing or stale."
            )
        check_files(run.folder, earlier.name)
    reason = status(run.config, stage, run.folder)
    if reason and is_primary() and folders.bring_back(run.folder, name, lambda folder: _usable(run, stage, folder)):
        run.console.print(f"[bold]{name}[/bold]  its previous version is what these settings make", highlight=False)
    barrier(f"{name} is looked at")
    reason = status(run.config, stage, run.folder)
    if not reason:
        run.console.print(f"[bold]{name}[/bold]  up to date", highlight=False)
        return False
    if not restart:
        _refuse_other_settings(run.config, run.folder, stage)
    run.console.print(f"[bold]{name}[/bold]  running: {reason}", highlight=False, markup=True)
    parts, finished = parts_of(run.config, stage, run.folder), read_record(run.folder / name)
    if is_primary():
        _make_room(run, stage, restart)
        files.write_json(run.folder / name / STARTED, started(parts) | {"versions": versions()})
    barrier(f"{name} begins")
    begun = time.perf_counter()
    try:
        result = _make(run, stage)
    except Exception:
        if finished and not stage.after and is_primary():
            _put_back(run, stage, finished)
        raise
    result["wall_seconds"] = round(time.perf_counter() - begun, 1)
    result["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if is_primary():
        write_artifact(run.folder, stage, parts if stage.after else _as_read(run, stage, parts), result)
        folders.remove_stage(run.folder / folders.PREVIOUS / name, stage.writes)
    barrier(f"{name} ends")
    if run.saved:
        run.saved()
    run.console.print(f"[bold]{name}[/bold]  done in {result['wall_seconds']:.1f} s", highlight=False)
    return True


def run_stages(run: Run, names: Sequence[str], *, restart: bool = False) -> None:
    """Runs some stages one after the other and says where it is; see `run_stage`."""
    for number, name in enumerate(names, start=1):
        run.console.print(f"stage {number} of {len(names)}", highlight=False)
        run_stage(run, name, restart=restart)


def _make(run: Run, stage: Stage) -> dict[str, Any]:
    if stage is FIELDS and not is_primary():
        # One process makes them for all; the others encode parts of its tables.
        assist_fields(run)
        return {}
    if stage.make is not None:
        return stage.make(run)
    # The trainer brings Grain and optax along, which whoever restores a stage need not wait for.
    from nqf.training.loop import fit

    assert stage.program is not None
    program = stage.program(run, False)
    result = fit(program, run.folder, stage.name, training=run.config.training, console=run.console, ids=run.ids,
                 profile=run.profile, saved=run.saved)  # fmt: skip
    return {
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "items_per_second": round(result.items_per_second, 1),
        **program.report(result.params, result.metrics),
    }


def _as_read(run: Run, stage: Stage, before: dict[str, Any]) -> dict[str, Any]:
    """Parts of a stage that has read the sources, with the pictures that the catalogue names, which are known now.

    Raises:
      StageError: A source is not what it was when the stage began, so that it is unknown which of both was read.
    """
    addresses.forget()
    parts = parts_of(run.config, stage, run.folder)
    kept = {key: value for key, value in before.items() if key != "pictures" and key in parts}
    if changed := differences(kept, {key: parts[key] for key in kept}):
        raise StageError(
            f"{run.folder}: {'; '.join(changed)} while stage '{stage.name}' was reading; run the command again"
        )
    # What does not answer any more was read all the same.
    return {key: value for key, value in before.items() if key.startswith(VERSION)} | parts


def _begun(run: Path, stage: Stage, parts: dict[str, Any], folder: Path) -> list[str] | None:
    """What differs between a start that was cut off in a folder and what is wanted; None if there is no such start."""
    left = cut_off(folder)
    if left is None:
        return None
    left = {key: value for key, value in left.items() if key != "versions"}
    return differences(comparable(left, stage, parts), started(parts))


def _refuse_other_settings(config: Config, folder: Path, stage: Stage) -> None:
    """Refuses to resume a stage that was cut off under other settings, which would lose what it learned.

    Changed inputs are no reason: the ones that it could resume with are there no more. Nor is it one where what was
    there before is what the settings ask for.
    """
    parts = parts_of(config, stage, folder)
    differing = _begun(folder, stage, parts, folder / stage.name)
    if differing is None or not (folder / stage.name / "checkpoints").is_dir():
        return
    lines = [line for line in differing if "input " not in line]
    previous = folder / folders.PREVIOUS / stage.name
    if lines and stale(read_record(previous), parts, stage):
        raise StageError(
            f"{folder / stage.name}: this stage was cut off under other settings, which would change its data or its "
            f"model: {'; '.join(lines)}. Restore them to resume from its newest checkpoint, or discard it with "
            "--restart"
        )


def _usable(run: Run, stage: Stage, folder: Path) -> bool:
    """Whether a folder holds a finished stage, or the start of one, under the present settings."""
    parts = parts_of(run.config, stage, run.folder)
    return not stale(read_record(folder), parts, stage) or _begun(run.folder, stage, parts, folder) == []


def _make_room(run: Run, stage: Stage, restart: bool) -> None:
    """Moves or deletes what an earlier run of the stage left, unless this one can resume from it."""
    folder = run.folder / stage.name
    folders.claim(run.folder, stage.name, *stage.also)
    differing = _begun(run.folder, stage, parts_of(run.config, stage, run.folder), folder)
    resumes = stage.program is not None or any(folder.glob("parts-*"))
    if resumes and differing == [] and not restart:
        _say_versions(run, stage.name)
        return
    if not stage.after:
        (folder / "stage.json").unlink(missing_ok=True)
        return
    if (folder / "stage.json").exists():
        folders.set_aside(run.folder, stage.name, stage.writes)
        return
    if (folder / "checkpoints").is_dir():
        why = "--restart" if restart else "; ".join(differing or []) or "it left no record of its settings"
        run.console.print(f"[bold]{stage.name}[/bold]  discarding an earlier start: {why}", highlight=False)
    folders.remove_stage(folder, stage.writes)


def _put_back(run: Run, stage: Stage, record: dict[str, Any]) -> None:
    """Gives a stage that works in place its record back where it failed before it replaced anything."""
    if altered_file(run.folder, record) is None:
        files.write_json(run.folder / stage.name / RECORD, record)


def _say_versions(run: Run, name: str) -> None:
    began = (cut_off(run.folder / name) or {}).get("versions")
    if began and (changed := differences(began, versions())):
        run.console.print(
            f"[yellow]warning[/yellow]  {name} resumes under other libraries than it began with, so its result can "
            f"differ from that of one run: {'; '.join(changed)}",
            highlight=False,
        )


def take_over(config: Config, folder: Path, others: Sequence[Path]) -> None:
    """Copies finished stages of other runs that a run of this configuration would make again.

    A copy appears whole or not at all, so that a kill in between costs nothing.

    Args:
      config: The configuration.
      folder: Run folder, made if missing.
      others: Run folders to copy from.
    """
    for stage in STAGES:
        if read_artifact(folder, stage.name) is not None:
            continue
        # The first stage's parts name the pictures of the catalogue that it made, and there is none in the folder yet.
        parts = {other: parts_of(config, stage, folder if stage.after else other) for other in others}
        made = (other for other in others if not stale(read_record(other / stage.name), parts[other], stage))
        if (other := next(made, None)) is not None:
            # The record comes with the stage's own folder, so that goes last.
            for name in (*stage.also, stage.name):
                folders.claim(folder, name)
                folders.copy(other / name, folder / name)


def require(run: Run, name: str) -> dict[str, Any]:
    """The result of a finished, fresh stage.

    Raises:
      StageError: It, or a stage that it builds on, is missing, stale or altered.
    """
    for stage in up_to(name):
        # What was made is used without whom it was made of: a service asks no address, and needs no credentials.
        if reason := status(run.config, stage, run.folder, ask=False):
            raise StageError(
                f"{run.folder}: stage '{stage.name}' cannot be used: {_because(reason)}. "
                f"Run python -m nqf.train --run {run.folder} --stage all."
            )
        check_files(run.folder, stage.name)
    artifact = read_artifact(run.folder, name)
    assert artifact is not None
    return artifact.result


def _because(reason: str) -> str:
    return reason if reason == "it has not been run" else f"it is stale ({reason})"
