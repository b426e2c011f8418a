"""Stopping on request: SIGTERM and Ctrl-C end the training after the step that runs, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(RuntimeError):
    """Training was asked to stop and has saved; the same command resumes from there."""

    # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again. Schedulers may requeue on it.
    exit_code = 75


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered; a second signal acts as if nobody listened.

    Attributes:
      received: Name of the signal that came, or empty.
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may listen; elsewhere the caller stops its threads by other means.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()
