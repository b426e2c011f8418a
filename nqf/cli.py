"""What the entry points share: the terminal, and errors as one paragraph with the traceback only on request."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nqf.config import ConfigError, from_tree, hints_of

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

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
        if (code := getattr(error, "exit_code", None)) is not None:
            # Not a fault: training that was asked to stop (nqf.training.stop).
            print(f"stopped: {text}", file=sys.stderr)
            raise SystemExit(code) from None
        print(f"error: {text}\n(--debug shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


def parse(cls: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None, description: str = "") -> T:
    """Parses a command line into a section (`nqf.config.section`), which checks types, ranges and combinations.

    Args:
      cls: The section; its docstring is the help.
      arguments: The command line.
      prog: The command, for the help.
      default: What holds for options that are not given; by default the section's defaults.
      description: Head of the help, where it is not that of the docstring.

    Raises:
      ConfigError: An option's value cannot be used; names option and key.
    """
    import tyro
    from tyro.constructors import MISSING, ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def as_tree(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type):
            return None
        texts, given = documented(info.type), info.default if isinstance(info.default, info.type) else info.type
        fields = [
            StructFieldSpec(name=name, type=hint, default=getattr(given, name, MISSING), helptext=texts[name])
            for name, hint in hints_of(info.type).items()
        ]
        # The sections are made of the whole tree at once, as those of a YAML file, so that errors can tell the key.
        return StructConstructorSpec(instantiate=dict, fields=tuple(fields))

    head = description or inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[0].strip()
    tree = tyro.cli(cls, args=arguments, prog=prog, default=default, description=head, registry=registry)
    try:
        return from_tree(cls, tree)
    except ConfigError as error:
        option = f"--{error.key.replace('_', '-')}"
        key = error.key if option == f"--{error.key}" else f"{error.key} ({option})"
        raise ConfigError(error.problem, key=key, where="command line") from None


def documented(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of its attributes, each as one line.

    Of a section without an entry, the first line of its own docstring.
    """
    texts = {name: inspect.cleandoc(hint.__doc__ or "").partition("\n")[0] for name, hint in hints_of(cls).items()}
    for base in reversed(cls.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")[2]
        found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
        texts |= {name: " ".join(text.split()) for name, text in found}
    return texts


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
