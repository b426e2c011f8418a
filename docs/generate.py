"""Writes docs/configuration.md from the dataclasses in nqf/config.py: `python docs/generate.py`."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path

from nqf.cli import documented
from nqf.config import Config, hints_of, range_of

_HEAD = """\
# Configuration

Generated from `nqf/config.py` by `python docs/generate.py`; do not edit.

A YAML file gives any subset of these keys; what it leaves out has the default. Every key is also an option of
`python -m nqf.train`: `joint.optim.learning_rate` is `--joint.optim.learning-rate`. The command line wins over the
file, and the resolved configuration is saved as `config.yaml` in the run folder.

Everything is checked before anything is read or written: an unknown key (the error suggests the nearest one), a value
of the wrong type or out of its range, and values that cannot work together, such as heads that do not divide a width.
Ranges are wide; a value inside may still be a bad one. `nan` and `inf` are in none.
"""


def kind(hint: object) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {kind(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else kind(argument) for argument in arguments)
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}[hint]


def plain(value: object) -> str:
    """A default as YAML writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(plain, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value).replace("\n", "\\n")
    return f'"{text}"' if isinstance(value, str) and (not text or "\\n" in text) else text


def section(value: object, path: str) -> list[str]:
    """Heading and table of a dataclass with the defaults that `value` holds, then of what is nested in it."""
    cls = type(value)
    about, texts = inspect.cleandoc(cls.__doc__).partition("Attributes:")[0], documented(cls)
    hints, ranges = typing.get_type_hints(cls), hints_of(cls)
    rows, nested = [], []
    for field in dataclasses.fields(value):
        default, name = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(default):
            nested += section(default, name)
            continue
        cells = (
            f"`{name}`",
            kind(hints[field.name]),
            range_of(ranges[field.name]),
            f"`{plain(default)}`",
            texts[field.name],
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    title = f"## {path or 'Top level'}" if path.count(".") == 0 else f"### {path}"
    about = " ".join(about.split("\n\n")[0].split())
    head = ["| key | value | range | default | meaning |", "|---|---|---|---|---|"]
    return [title, "", about, "", *head, *rows, "", *nested]


def page() -> str:
    """The whole page."""
    return _HEAD + "\n" + "\n".join(section(Config(), "")).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
