"""What the entry points share: the terminal, and errors as one paragraph with the traceback only on request."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Errors whose message is written for the person at the terminal; anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError)


def guard(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs an entry point; turns an expected error into one paragraph on stderr and exit status 1."""
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


def terminal(*, quiet: bool = False) -> Console:
    """The console of an entry point: as wide as the terminal, or plain lines that are never broken elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, quiet=quiet)
