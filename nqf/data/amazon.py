"""Amazon Reviews 2023: metadata and reviews, raw or as the hub's `datasets` exports them, in any kind of table.

Source: Hou et al., "Bridging Language and Items for Retrieval and Recommendation" (arXiv 2403.03952).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nqf import files
from nqf.config import DialectConfig
from nqf.data.errors import DataError
from nqf.data.nested import unpacked
from nqf.data.readers import Columns, open_table, pick, spool
from nqf.data.schema import some
from nqf.data.text import PLAIN

DETAILS = ("brand", "style", "color", "size", "material")
"""Entries of `details` (there capitalized) that are columns of their own, as in the reference's item dictionary."""


def schema_text() -> str:
    """The schema of all categories: configs/schemas/amazon-2023.yaml."""
    return (files.shipped() / "schemas" / "amazon-2023.yaml").read_text(encoding="utf-8")


def is_metadata(names: Collection[str]) -> bool:
    """Whether the columns of a table are those of Amazon's metadata."""
    return {"parent_asin", "details", "title"} <= set(names)


def read_items(path: Path, scratch: Path, columns: Columns, dialect: DialectConfig = PLAIN) -> pl.LazyFrame:
    """Opens a metadata file; columns as `flatten` names them.

    Raises:
      DataError: As `nqf.data.readers.open_table`, or no column parent_asin.
    """
    table = open_table(path, dialect)
    if "parent_asin" not in table.names:
        raise DataError(f"{path}: no column 'parent_asin', as Amazon's metadata has; it has {some(table.names)}")
    rows = (flatten(row, row.get("parent_asin"), columns) for row in table.records())
    return spool(pick(rows, list(columns)), columns, scratch, list(columns))


def read_reviews(path: Path, scratch: Path, columns: Columns, dialect: DialectConfig = PLAIN) -> pl.LazyFrame:
    """Opens a review file as interactions: the item is the parent product, the review its title and text.

    Raises:
      DataError: As `nqf.data.readers.open_table`, or no column of users or items.
    """
    table = open_table(path, dialect)
    if "user_id" not in table.names or not {"parent_asin", "asin"} & set(table.names):
        raise DataError(
            f"{path}: no columns user_id and parent_asin, as Amazon's reviews have; it has {some(table.names)}"
        )
    rows = (_interaction(row) for row in table.records())
    return spool(pick(rows, list(columns)), columns, scratch, list(columns))


def flatten(row: Mapping[str, Any], item_id: str | None, columns: Columns) -> dict[str, Any]:
    """One item as a flat row.

    Args:
      row: Metadata object.
      item_id: Its id.
      columns: Columns to make: keys of the object; `main_image`, the large main picture; `brand`, `style`, `color`,
        `size` and `material` from its details where it has no such key; `details.X` for any other detail.
    """
    details = _nested(row.get("details"))
    details = details if isinstance(details, dict) else {}
    flat: dict[str, Any] = {"item_id": item_id}
    for name in columns:
        if name == "item_id":
            continue
        value = row.get(name)
        if value is None and name == "main_image":
            value = _main_image(_nested(row.get("images")))
        elif value is None and name in DETAILS:
            value = details.get(name.capitalize())
        elif value is None and name.startswith("details."):
            value = details.get(name.removeprefix("details."))
        flat[name] = value
    return flat


def _nested(value: Any) -> Any:
    """What a cell holds, where an export has made a text of it."""
    return unpacked(value) if isinstance(value, str) else value


def _main_image(images: Any) -> str | None:
    if isinstance(images, dict):
        # `datasets` turns a list of objects into an object of lists.
        columns = {key: list(values) for key, values in images.items() if isinstance(values, (list, tuple))}
        images = [dict(zip(columns, row, strict=True)) for row in itertools.zip_longest(*columns.values())]
    images = [image for image in images if isinstance(image, dict)] if isinstance(images, (list, tuple)) else []
    ordered = sorted(images, key=lambda image: image.get("variant") != "MAIN")
    links = (image.get(size) for image in ordered for size in ("large", "hi_res", "thumb"))
    return next((link for link in links if isinstance(link, str) and link), None)


def review_text(row: Mapping[str, Any]) -> str:
    """Title and text of a review, a line each; empty where there is neither."""
    words: Iterator[str] = (row[key].strip() for key in ("title", "text") if isinstance(row.get(key), str))
    return "\n".join(word for word in words if word)


def _interaction(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "user_id": row.get("user_id"),
        "item_id": row.get("parent_asin") or row.get("asin"),
        "timestamp": row.get("timestamp"),
        "rating": row.get("rating"),
        "review": review_text(row),
    }
