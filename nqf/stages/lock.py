"""One process at a time works on a run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from nqf import files
from nqf.training.mesh import is_primary


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made if missing; of several processes of one run, the first holds it for all.

    Raises:
      InUseError: Another process holds it; names that process.
    """
    if not is_primary():
        yield
        return
    with files.locked(folder):
        yield
