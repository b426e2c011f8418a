"""Where figures of a run go: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from nqf import files


class Writer:
    """Writes one stage's metrics. Use as a context manager.

    Lines of metrics.jsonl carry the stage, the step and the wall time in unix seconds. A stage that resumes drops
    the lines beyond its checkpoint first, so that the file has neither gaps nor doubles.

    Args:
      folder: Run folder.
      stage: Name of the stage.
      resumed_step: Step that training resumes from; 0 for a fresh start.
      enabled: Whether anything is written; false in all but one of several processes.
    """

    def __init__(self, folder: Path, stage: str, *, resumed_step: int, enabled: bool = True) -> None:
        self._stage, self._enabled = stage, enabled
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _keeps(line, stage, resumed_step)]
            files.write_text(path, "".join(f"{line}\n" for line in kept))
        # Unbuffered, so that nothing is left to fail when it is closed.
        self._path, self._file = path, open(path, "ab", buffering=0, opener=_not_through_links)
        # Imported here, as only training pays for it.
        self._board = _summary_writer()(str(folder / "tensorboard" / stage), purge_step=resumed_step + 1)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._enabled:
            self._file.close()
            # An earlier error says more than what follows from it.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._board.close()

    def sync(self) -> None:
        """Returns when the lines are on disk, so that no checkpoint is ahead of them."""
        if self._enabled:
            with self._naming_file():
                os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self._path}: could not be written ({error}). The checkpoints are whole; make room, then run the "
                "same command again"
            ) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and the same scalars to TensorBoard; JSON has no infinity, so that becomes null."""
        if not self._enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **finite}
        rest = f"{json.dumps(line)}\n".encode()
        with self._naming_file():
            # A disk that is nearly full takes a part before it refuses.
            while rest:
                rest = rest[self._file.write(rest) :]
        for name, value in metrics.items():
            self._board.add_scalar(f"{self._stage}/{name}", value, step)


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _summary_writer() -> Any:
    """tensorboardX's writer, imported without torch, whose arrays it would take, too: where torch is installed, that
    costs each training seconds and hundreds of MiB."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = cast(Any, None)
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter


def _keeps(line: str, stage: str, resumed_step: int) -> bool:
    try:
        record = json.loads(line)
        return record["stage"] != stage or record["step"] <= resumed_step
    except (ValueError, TypeError, KeyError, RecursionError):
        # A line cut off by a crash, or one that no stage wrote.
        return False


class Terminal:
    """Progress of a stage: a bar with items/s and loss on a terminal, plain lines elsewhere.

    Args:
      stage: Name of the stage.
      total: Steps of the stage.
      console: Where to write.
    """

    def __init__(self, stage: str, total: int, console: Console) -> None:
        self._console = console
        self._stage, self._note, self._compiled = stage, "", False
        self._progress = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._task = self._progress.add_task(stage, total=total, note="")

    def __enter__(self) -> Terminal:
        jax.monitoring.register_event_duration_secs_listener(self._event)
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        jax.monitoring.unregister_event_duration_listener(self._event)

    def _event(self, event: str, duration_secs: float, **_: str | int) -> None:
        # jax tells when something has ended: where it ends to lower a program, XLA begins to compile it.
        if event.endswith("/jaxpr_to_mlir_module_duration"):
            if self._progress:
                self._progress.update(self._task, note="compiling…")
            elif not self._compiled:
                self.line("compiling…")
            self._compiled = True
        elif event.endswith("/backend_compile_duration") and self._progress:
            self._progress.update(self._task, note=self._note)

    def step(self, step: int, *, loss: float, items_per_second: float) -> None:
        """Moves the bar; says nothing where there is no terminal."""
        self._note = f"loss {loss:.4f}  {items_per_second:,.0f} items/s"
        if self._progress:
            self._progress.update(self._task, completed=step, note=self._note)

    def line(self, text: str) -> None:
        """Writes a line that stays."""
        self._console.print(f"[bold]{self._stage}[/bold]  {text}", highlight=False)


class Encoding:
    """Progress of the fields stage: a bar per table on a terminal, nothing elsewhere.

    Args:
      console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self._progress = None
        self._tasks: dict[str, TaskID] = {}
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=console,
            )  # fmt: skip

    def __enter__(self) -> Encoding:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def step(self, name: str, done: int, total: int) -> None:
        """Moves the bar of one table; `done` of `total` items have been read."""
        if self._progress:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=done)
