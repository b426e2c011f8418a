"""What the entry points share: the terminal, and errors as one paragraph with the traceback only on request."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Errors whose message is written for the person at the terminal; anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError)


def guard(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs an entry point; turns an expected error into one paragraph on stderr and exit status 1."""
    keep_compiled_programs()
    if "--debug" in arguments:
        main(arguments)
        return
    try:
        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # What a shell reports for a program that Ctrl-C ended.
        raise SystemExit(130) from None
    except _EXPECTED as error:
        # The message of a KeyError is the repr of its argument.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(message).split())
        if hasattr(error, "exit_code"):
            # Not a fault: training that was asked to stop (nqf.training.stop).
            print(f"stopped: {text}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        print(f"error: {text}\n(--debug shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


def keep_compiled_programs() -> None:
    """Lets jax keep compiled programs in the user's cache folder, 4 GiB at most, unless the environment names another.

    To be called before jax is imported. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cpu = Path("/proc/cpuinfo")
    flags = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1] if cpu.is_file() else []
    # Programs for one kind of CPU may crash on another that shares the home folder.
    kind = hashlib.sha256("".join(flags).encode()).hexdigest()[:8]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(base) / "nqf" / f"xla-{kind}")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next allocation.

    XLA's CPU backend allocates the temporaries of each step anew. glibc gives blocks of that size back to the kernel
    at once, which hands out zeroed pages again, one fault for each: a third of the time of a training step. To be
    called before anything starts a thread; does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # Of malloc.h.
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 64 << 20)
    # Other threads' arenas would map large blocks all the same.
    mallopt(arena_max, 1)


def terminal(*, quiet: bool = False) -> Console:
    """The console of an entry point: as wide as the terminal, or plain lines that are never broken elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, quiet=quiet)
