"""Traces of a few training steps, to be opened with xprof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

WARM_UP = 3
"""Steps before the trace, which compile and fill the pipeline."""


class Profile:
    """Traces some steps of a loop; does nothing if `steps` is 0.

    Args:
      folder: Where the trace goes, as `plugins/profile/<time>/*.xplane.pb`.
      steps: How many steps.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder, self.steps, self._running = folder, steps, False

    def before(self, done: int) -> None:
        """To be called before the step after `done` steps of this process."""
        if self.steps and done == WARM_UP:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, done: int, metrics: Any) -> bool:
        """To be called after each step with what it returned; True where the trace has just been written."""
        if self._running and done == WARM_UP + self.steps:
            jax.block_until_ready(metrics)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
