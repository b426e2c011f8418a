"""`nqf completion SHELL`: a script that completes the commands, options and choices of `nqf` in a shell."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import sys
from typing import Annotated, Any, Literal

import tyro

from nqf.cli import COMMANDS, program


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionArguments:
    """Prints the completion script of a shell. For bash: source <(nqf completion bash).

    Attributes:
      shell: Shell to print the script of.
      debug: Show the traceback of an error.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command."""
    options = tyro.cli(CompletionArguments, args=arguments, prog=program("completion"))
    commands = [Annotated[arguments_of(name), tyro.conf.subcommand(name)] for name in COMMANDS]
    whole: Any = functools.reduce(operator.or_, commands)
    tyro.cli(whole, args=["--tyro-print-completion", options.shell], prog="nqf")


def arguments_of(command: str) -> Any:
    """The options of a command: `TrainArguments` of the module in which `main` of `train` is written."""
    written = importlib.import_module(COMMANDS[command][0]).main.__module__
    return getattr(sys.modules[written], f"{command.capitalize()}Arguments")
