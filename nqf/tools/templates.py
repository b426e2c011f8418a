"""Jinja templates in which every value is text: nothing in the data becomes markup, and no control character stays."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# Controls but for tab and the ends of lines, and what turns the direction of the text that follows.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What means something in Markdown: anywhere, an underscore that is not between two letters or digits (of several in a
# row none is), in what becomes a link of itself, at the start of a line.
_SPECIAL = re.compile(
    r"[\\`*\[\]|~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[-+#=](?=[-+#=\s]|$)|"
    + "|".join(rf"(?<=^\d{{{digits}}})[.)](?=\s|$)" for digits in range(1, 10)),
    re.IGNORECASE,
)


def plain(value: Any) -> Any:
    """A text without control characters, which would move a terminal's cursor or turn a page; others as they are."""
    return _CONTROLS.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def html(path: Path, **values: Any) -> Markup:
    """Fills an HTML template; values are escaped, but for those that are `Markup` already.

    Raises:
      jinja2.UndefinedError: The template asks for a value that was not given.
    """
    return Markup(_environment(path.parent, markdown=False).get_template(path.name).render(**values))


def markdown(path: Path, **values: Any) -> str:
    """Fills a Markdown template; a value is one line of text, `value | code` a code span, `Markup` stays as it is.

    Raises:
      jinja2.UndefinedError: The template asks for a value that was not given.
    """
    return _environment(path.parent, markdown=True).get_template(path.name).render(**values)


def code_span(value: Any) -> Markup:
    """A value as a code span of Markdown, on one line; not for tables, where a bar ends the cell."""
    text = " ".join(plain(str(value)).split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in (text[0], text[-1]) else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def text_span(value: Any) -> Markup:
    """A value as one line of text in Markdown, in a cell of a table too; `Markup` stays as it is."""
    if isinstance(value, Markup):
        return value
    text = " ".join(plain(str(value)).split())
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return Markup(_SPECIAL.sub(r"\\\g<0>", text))


def _finalize(value: Any) -> Any:
    # What is missing is left to fail.
    return value if isinstance(value, jinja2.Undefined) else text_span(value)


@functools.cache
def _environment(folder: Path, *, markdown: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=not markdown,
        finalize=_finalize if markdown else plain,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    return environment
