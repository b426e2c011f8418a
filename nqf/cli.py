"""The command `nqf`, and what its commands share: the terminal, and errors as one paragraph without a traceback."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import hashlib
import importlib
import inspect
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

T = TypeVar("T")

COMMANDS = {
    "train": ("nqf.train", "train a run, stage by stage, and evaluate it"),
    "evaluate": ("nqf.evaluate", "rank the whole catalogue for every user, beside all baselines"),
    "recommend": ("nqf.recommend", "recommend items for a user, a history or everybody"),
    "serve": ("nqf.serve", "serve a run over HTTP, with a page"),
    "items": ("nqf.items", "add, change or remove items of a trained run"),
    "embed": ("nqf.embed", "make vectors of texts with a pretrained encoder"),
    "export": ("nqf.export", "write a run in other formats: PEFT, Hugging Face, vLLM, vectors"),
    "compare": ("nqf.compare", "compare the models of several runs, user by user"),
    "ablate": ("nqf.ablate", "train and tabulate every variant of a study"),
    "report": ("nqf.report", "write a page about an evaluated run"),
    "audit": ("nqf.audit", "look for leaks in the data before training"),
    "data": ("nqf.data.__main__", "fetch a public data set, or look at tables of your own"),
    "completion": ("nqf.tools.completion", "print the completion script of a shell"),
}
"""Command: module with its `main`, and a line about it."""

# Errors whose message is written for the person at the terminal; anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, KeyError, OSError, RuntimeError, FloatingPointError, MemoryError, csv.Error)
_LONGEST_MESSAGE = 2_000
# All but line feed and tab; 0x9b starts an escape sequence by itself.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(arguments: list[str] | None = None) -> None:
    """Runs `nqf COMMAND ...`; nothing heavy is imported before the command is known."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        guard(lambda _: print(_usage()), rest)
    elif name == "--version":
        from nqf import __version__

        print(f"nqf {__version__}")
    elif name in COMMANDS:
        guard(lambda rest: importlib.import_module(COMMANDS[name][0]).main(rest), rest)
    else:
        from nqf.data.schema import nearest

        said = f"error: unknown command '{name}'{nearest(name, COMMANDS)}" if name else _usage()
        print(said, file=sys.stderr)
        # As for an unknown option.
        raise SystemExit(2)


def _usage() -> str:
    lines = [f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()]
    how = program("").strip(" .")
    return "\n".join(
        [
            f"usage: {how} COMMAND ...",
            "",
            *lines,
            "",
            f"{how} COMMAND --help explains a command, --version prints the version.",
        ]
    )


def program(command: str) -> str:
    """How a command was called, for its help: `nqf train`, `python -m nqf train` or `python -m nqf.train`."""
    called = Path(sys.argv[0])
    if called.stem == "nqf":
        return f"nqf {command}"
    return f"python -m nqf {command}" if called.parts[-2:] == ("nqf", "__main__.py") else f"python -m nqf.{command}"


def configuration(given: str | Path, folder: str = "") -> Path:
    """The file that a command means by a configuration: the one of that path, or else a shipped one of that name.

    `quickstart` and `configs/quickstart.yaml` both name the shipped quick start where there is no such file. What was
    taken is said on stderr unless it is the given path.

    Args:
      given: Path, or name of a shipped configuration.
      folder: Folder of the shipped configurations to look in, `studies` for those of `nqf ablate`.

    Raises:
      ConfigError: Neither a file nor a shipped configuration.
    """
    path = Path(given)
    if path.is_file():
        return path
    from nqf import files
    from nqf.config import ConfigError
    from nqf.data.schema import nearest

    known = {file.stem: file for file in sorted((files.shipped() / folder).glob("*.yaml"))}
    name = path.name.removesuffix(".yaml")
    if name not in known or path.parent not in (Path(), Path("configs"), Path("configs", folder), Path(folder)):
        raise ConfigError(f"{path}: no such configuration file, and none of that name is shipped{nearest(name, known)}")
    print(f"{path}: not a file here; taking {known[name]}, shipped with nqf", file=sys.stderr)
    return known[name]


def guard(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs an entry point; turns an expected error into one paragraph on stderr and exit status 1."""
    keep_compiled_programs()
    if "--debug" in arguments:
        main(arguments)
        return
    quiet_libraries()
    try:
        try:
            main(arguments)
        finally:
            # Not at the end of the interpreter, where an error cannot be told apart.
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _unread():
            raise SystemExit(_told(error)) from None
        # The interpreter flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # What a shell reports for a program whose reader left, as `head` does.
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # What a shell reports for a program that Ctrl-C ended.
        raise SystemExit(130) from None
    except (*_EXPECTED, *_errors_of_polars()) as error:
        raise SystemExit(_told(error)) from None


def _unread() -> bool:
    """Whether nobody reads the standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _told(error: Exception) -> int:
    """Tells an error in one paragraph; the exit status."""
    # The message of a KeyError is the repr of its argument.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = printable(" ".join(str(message).split())) or ("out of memory" if isinstance(error, MemoryError) else "")
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:1_200]} (…) {text[-500:]}"
    if (code := getattr(error, "exit_code", None)) is not None:
        # Not a fault: training that was asked to stop (nqf.training.stop).
        print(f"stopped: {text}", file=sys.stderr)
        return code
    print(f"error: {text}\n(--debug shows the traceback)", file=sys.stderr)
    return 1


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

    from nqf.config import ConfigError, from_tree, hints_of

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
    from nqf.config import hints_of

    texts = {name: inspect.cleandoc(hint.__doc__ or "").partition("\n")[0] for name, hint in hints_of(cls).items()}
    for base in reversed(cls.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("Attributes:")[2]
        found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
        texts |= {name: " ".join(text.split()) for name, text in found}
    return texts


def _errors_of_polars() -> tuple[type[Exception], ...]:
    """What polars raises, if it was imported: only files can be the cause that reach it."""
    polars = sys.modules.get("polars")
    return () if polars is None else (polars.exceptions.PolarsError,)


def printable(text: str) -> str:
    """A text with control characters spelled out, so that no id or title moves the cursor or colors the terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


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


def quiet_libraries() -> None:
    """Keeps raw log lines of XLA, absl and file systems off the terminal; what fails there is raised, too.

    To be called before jax is imported. `TF_CPP_MIN_LOG_LEVEL=0` in the environment shows those of XLA, `--debug` all.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("fsspec", "gcsfs", "s3fs"):
        # Tracebacks of what they try again.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next allocation.

    XLA's CPU backend allocates the temporaries of each step again. glibc gives blocks of that size back to the kernel
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

    class Plain(Console):
        """A console for which control characters and :names: of emoji are text, and that leaves errors to `guard`."""

        def on_broken_pipe(self) -> None:
            raise  # Called where the error is handled.

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    console = Plain(highlight=False, emoji=False, quiet=quiet)
    return console if console.is_terminal else Plain(highlight=False, emoji=False, soft_wrap=True, quiet=quiet)
