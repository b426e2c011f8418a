"""What the entry points share: errors as one paragraph, with the traceback only on request."""

from __future__ import annotations

import sys
from collections.abc import Callable

# Errors whose message is written for the person at the terminal; anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError)


def guard(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs an entry point; turns an expected error into its message on stderr and exit status 1."""
    if "--debug" in arguments:
        main(arguments)
        return
    try:
        main(arguments)
    except _EXPECTED as error:
        # The message of a KeyError is the repr of its argument.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}\n(--debug shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from None
