"""One process at a time works on a run folder. The lock is the kernel's and goes with its owner, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from nqf.stages.artifacts import StageError
from nqf.training.mesh import is_primary


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made if missing; of several processes of one run, the first holds it for all.

    Raises:
      StageError: Another process holds it; names that process.
    """
    if not is_primary():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A link in its place could make this truncate any file.
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = " ".join(file.read(1_000).split()) or "another process"
            raise StageError(
                f"{folder}: in use by {owner}; wait until it has finished, or end it. Its lock goes with it"
            ) from None
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.orig_argv)})"[:900])
        file.flush()
        yield
        file.truncate(0)
