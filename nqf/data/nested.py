"""Values that hold several: lists and dictionaries, as such or written into a text as Python, numpy or JSON do."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from typing import Any

from nqf.data.schema import USUAL_SEPARATOR, Field

_ADJACENT = re.compile(r"""['"]\s+[uU]?['"]""")
_ARRAY = re.compile(r"\[\s*{0}(\s+{0})*\s*\]".format(r"(-?\d[\d.eE+-]*|nan|True|False)"))
_ERRORS = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError)


class Parted(list[str]):
    """A text that was taken apart at blanks, and the text, for fields that are taken apart otherwise."""

    text: str = ""


def parse_json(text: str) -> Any:
    """`json.loads`, with a question mark for half a surrogate pair, which JSON can hold and UTF-8 cannot.

    Texts that were cut in the middle of an emoji end in one.
    """
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    return value


def parse_python(text: str) -> Any:
    """The value of a Python literal.

    Strings side by side are the elements of a printed numpy array, not parts of one string as in a program.

    Raises:
      ValueError, SyntaxError, TypeError, RecursionError, MemoryError: Not a literal.
    """
    text = text.encode("utf-8", errors="replace").decode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = ast.literal_eval(text)
        if isinstance(value, list) and _ADJACENT.search(text) and all(isinstance(part, str) for part in value):
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            strings = [token.string for token in tokens if token.type == tokenize.STRING]
            value = [ast.literal_eval(string) for string in strings] if len(strings) > len(value) else value
    return value


def unpacked(text: str) -> Any:
    """The list or dictionary that a text holds as JSON or Python; the text itself if it holds none."""
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] not in ("[]", "{}", "()"):
        return text
    for parse in (parse_json, parse_python, _parse_array):
        try:
            value = parse(stripped)
        except _ERRORS:
            continue
        if isinstance(value, (set, tuple)):
            value = sorted(value, key=str) if isinstance(value, set) else list(value)
        if isinstance(value, (list, dict)):
            return value
    return text


def _parse_array(text: str) -> list[float]:
    """The numbers or truth values of a printed numpy array."""
    if not _ARRAY.fullmatch(text):
        raise ValueError("not an array")
    words = {"True": True, "False": False}
    return [words[part] if part in words else _number(part) for part in text[1:-1].split()]


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def elements(value: Any) -> list[str]:
    """The values that a list or dictionary holds, those of inner lists included, without missing ones.

    An object that has a `name` stands for it (tags and genres are published so); any other for `key: value` of each
    of its entries.
    """
    if value is None or value != value:
        return []
    if isinstance(value, (list, tuple)):
        return [element for part in value for element in elements(part)]
    if isinstance(value, dict):
        if isinstance(value.get("name"), str):
            return [value["name"]]
        return [f"{key}: {scalar(part)}" for key, part in value.items() if part is not None and part == part]
    return [scalar(value)]


def scalar(value: Any) -> str:
    """A value as text: what JSON has as JSON writes it, strings without quotes, bytes decoded or in hexadecimal."""
    if isinstance(value, (bool, int, float, list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=_text)
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return str(value)


def plain(value: Any, field: Field | None) -> str | list[str] | None:
    """A value as a field needs it: a list of texts for categories and vectors, a text for everything else.

    Args:
      value: As the table holds it.
      field: The field; None for ids, times, ratings and reviews, whose texts are never taken apart.
    """
    if field is None and type(value) is str:
        return value or None
    modality = None if field is None else field.modality
    if isinstance(value, Parted) and (field is None or modality == "text" or _separated(value.text, field)):
        value = value.text
    # NaN, which JSON as Python writes it can hold, is not itself.
    if value is None or value == "" or value != value:
        return None
    if modality == "vector":
        if isinstance(value, (list, tuple)):
            # A hole in a vector must not make it shorter.
            return [scalar(element) if element is not None and element == element else "" for element in value]
        return scalar(value).strip(" []()\t\n").replace(",", " ").split()
    if isinstance(value, str) and modality in ("category", "text", "image"):
        found = unpacked(value)
        # A title such as [7] is no list of words.
        numbers = isinstance(found, list) and any(isinstance(part, (int, float)) for part in found)
        value = found if modality == "category" or not numbers else value
    if field is not None and modality == "category":
        if not isinstance(value, str):
            return elements(value)
        return _split(value, field.separator) if field.multi_valued else [value]
    if isinstance(value, (list, tuple, dict)):
        values = elements(value)
        return " ".join(values[:1] if modality == "image" else values) or None
    return scalar(value)


def _separated(text: str, field: Field) -> bool:
    """Whether a field has a separator of its own; the usual one is one only where it occurs."""
    return field.multi_valued and (field.separator != USUAL_SEPARATOR or USUAL_SEPARATOR in text)


def _split(text: str, separator: str) -> list[str]:
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] != "[]":
        return text.split(separator)
    # A list in no known notation, such as Java's [a, b].
    parts = [part.strip() for part in stripped[1:-1].split(separator)]
    return [part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part for part in parts]
