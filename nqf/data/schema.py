"""The schema of a catalogue: which field has which modality and comes from which columns.

title: title
fields:
  title: text
  categories: {modality: category, multi_valued: true, separator: ","}
  price: {modality: number, column: price_usd, log: true}
  place: {modality: geo, columns: [lat, lon]}
  average_rating: {modality: number, after_the_fact: true}
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args

from nqf.config import MISSING_WORDS, ConfigError, Count, Weight, from_tree, read_yaml, section, shown, to_tree
from nqf.data.errors import DataError
from nqf.data.values import NUMBER_FORMATS, TIME_FORMATS, Format

Modality = Literal["text", "category", "number", "time", "geo", "image", "vector"]
USUAL_SEPARATOR = "|"
MODALITIES: tuple[str, ...] = get_args(Modality)


@section
class Field:
    """A field of the items.

    Attributes:
      name: Name in the canonical table, the field cache and all reports.
      modality: Decides how values are read and which encoder they get.
      columns: Column of the source table; latitude and longitude of a geo field.
      weight: Weight in the reconstruction loss.
      max_length: Most words of a text that are encoded; None leaves it to the encoder.
      log: Whether a number is scaled by its logarithm; None decides by the values' skewness.
      multi_valued: Whether a string of a category field holds several values.
      separator: What stands between them.
      format: How times and numbers are read (`nqf.data.values.Format`); empty decides from the whole column.
      after_the_fact: Known only after the interactions it would help to predict (a sales rank, an average rating
        of the day of the crawl); left out unless the configuration asks for it.
    """

    name: str
    modality: Modality
    columns: tuple[str, ...]
    weight: Weight = 1.0
    max_length: Count | None = None
    log: bool | None = None
    multi_valued: bool = False
    separator: str = USUAL_SEPARATOR
    format: tuple[Format, ...] = ()
    after_the_fact: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The fields of a catalogue.

    Attributes:
      fields: In the order of the file.
      title: Name of the text field that people recognize an item by; None if there is none.
      missing_words: Texts that stand for a missing value, in every field.
    """

    fields: tuple[Field, ...]
    title: str | None = None
    missing_words: tuple[str, ...] = MISSING_WORDS


def load_schema(path: str | Path) -> Schema:
    """Reads a schema YAML file.

    Raises:
      DataError: Missing file, malformed YAML, unknown key or modality (with the nearest known one), or options
        that do not belong to the modality.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such schema file; set data.schema to a YAML file that maps fields to modalities")
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    return schema_from_tree(tree, where=str(path))


def schema_from_tree(tree: Any, *, where: str = "schema") -> Schema:
    """Builds a schema from what a YAML file holds.

    Args:
      tree: Dictionary with `fields` and, optionally, `title`.
      where: Named in errors.

    Raises:
      DataError: As `load_schema`.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("fields"), dict) or not tree["fields"]:
        raise DataError(f"{where}: expected a key 'fields' with field names and their modality")
    for key in tree:
        if key not in ("title", "fields", "missing_words"):
            raise DataError(f"{where}: unknown key '{key}'{nearest(str(key), ('title', 'fields'))}")
    fields = tuple(_field(str(name), options, f"{where}: {name}") for name, options in tree["fields"].items())
    title = tree.get("title")
    texts = [field.name for field in fields if field.modality == "text"]
    if title is not None and title not in texts:
        raise DataError(f"{where}: title: {shown(title)} is not a text field{nearest(shown(title), texts)}")
    if title != "title" and any(field.name == "title" for field in fields):
        raise DataError(f"{where}: the field 'title' must be named by the key 'title', or be called something else")
    words = tree.get("missing_words", MISSING_WORDS)
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: missing_words: expected a list of texts, found {shown(words)}")
    return Schema(fields=fields, title=title, missing_words=tuple(words))


def schema_to_tree(schema: Schema) -> dict[str, Any]:
    """The dictionary that `schema_from_tree` reads; options that have their default value are left out."""
    fields = {}
    for field in schema.fields:
        plain = to_tree(Field(name=field.name, modality=field.modality, columns=field.columns))
        options = {key: value for key, value in to_tree(field).items() if value != plain[key]}
        fields[field.name] = {"modality": field.modality, "columns": list(field.columns), **options}
    words = {} if schema.missing_words == MISSING_WORDS else {"missing_words": list(schema.missing_words)}
    return {"title": schema.title, "fields": fields} | words


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    # The comparison is quadratic in the lengths, and both may be a hostile file's.
    close = difflib.get_close_matches(name[:200], [other for other in list(known)[:2_000] if len(other) <= 200], n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {some(known, 20)}" if known else "; there is none"


def some(names: Collection[str], most: int = 12, between: str = ", ") -> str:
    """The first of some names, each shortened, and how many there are besides: a message never grows with the data."""
    first = [name if len(name) <= 60 else f"{name[:59]}…" for name in itertools.islice(names, most)]
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return between.join([*first, *more])


def _field(name: str, options: Any, where: str) -> Field:
    if name == "item_id" or name.startswith("_"):
        raise DataError(f"{where}: a field must not be called 'item_id' or start with an underscore")
    options = {"modality": options} if isinstance(options, str) else options
    if not isinstance(options, dict):
        raise DataError(f"{where}: expected a modality or options, found {shown(options)}")
    options = {str(key): value for key, value in options.items()}
    if options.get("modality") not in MODALITIES:
        modality = options.get("modality")
        raise DataError(f"{where}: unknown modality {shown(modality)}{nearest(shown(modality), MODALITIES)}")
    if "column" in options and "columns" in options:
        raise DataError(f"{where}: give either column or columns")
    column = options.pop("column", name)
    if isinstance(options.get("format"), str):
        options["format"] = [options["format"]]
    known = [field.name for field in dataclasses.fields(Field) if field.name != "name"] + ["column"]
    for key in options:
        if key not in known:
            raise DataError(f"{where}: unknown option '{key}'{nearest(key, known)}")
    try:
        field = from_tree(Field, {"columns": [column], **options, "name": name}, where=where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    expected = 2 if field.modality == "geo" else 1
    if len(field.columns) != expected:
        advice = "columns: [latitude, longitude]" if expected == 2 else "one column"
        raise DataError(f"{where}: a {field.modality} field needs {advice}")
    wrong = [
        f"{key} belongs to {modality} fields"
        for key, modality in (("log", "number"), ("multi_valued", "category"), ("max_length", "text"))
        if options.get(key) and field.modality != modality
    ]
    formats = {"time": TIME_FORMATS, "number": NUMBER_FORMATS}.get(field.modality, ())
    for entry in field.format:
        if entry not in formats:
            wrong.append(f"format {entry} is none of a {field.modality} field{nearest(entry, formats)}")
    if not field.separator:
        wrong.append("separator must not be empty")
    if wrong:
        raise DataError(f"{where}: {'; '.join(wrong)}")
    return field
