"""Raw files of Amazon Reviews 2023: `meta_*.jsonl` and the review JSONL, gzipped or not.

Source: Hou et al., "Bridging Language and Items for Retrieval and Recommendation" (arXiv 2403.03952).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from nqf.data.readers import Columns, read_json_lines, spool

DETAILS = ("brand", "style", "color", "size", "material")
"""Entries of `details` (there capitalized) that are columns of their own, as in the reference's item dictionary."""


def read_items(path: Path, scratch: Path, columns: Columns) -> pl.LazyFrame:
    """Opens a metadata file; columns as `flatten` names them.

    Raises:
      DataError: No such file, or a line that is not a JSON object.
    """
    return spool(
        (flatten(row, row.get("parent_asin"), columns) for row in read_json_lines(path)), columns, scratch, "meta"
    )


def read_reviews(path: Path, scratch: Path, columns: Columns) -> pl.LazyFrame:
    """Opens a review file as interactions: the item is the parent product, the review its title and text.

    Raises:
      DataError: No such file, or a line that is not a JSON object.
    """
    return spool((_interaction(row) for row in read_json_lines(path)), columns, scratch, "reviews")


def flatten(row: Mapping[str, Any], item_id: str | None, columns: Columns) -> dict[str, Any]:
    """One item as a flat row.

    Args:
      row: Metadata object.
      item_id: Its id.
      columns: Columns to make: keys of the object; `main_image`, the large main picture; `brand`, `style`, `color`,
        `size` and `material` from its details where it has no such key; `details.X` for any other detail.
    """
    details = row.get("details") or {}
    flat: dict[str, Any] = {"item_id": item_id}
    for name in columns:
        if name == "item_id":
            continue
        value = row.get(name)
        if value is None and name == "main_image":
            value = _main_image(row.get("images") or [])
        elif value is None and name in DETAILS:
            value = details.get(name.capitalize())
        elif value is None and name.startswith("details."):
            value = details.get(name.removeprefix("details."))
        flat[name] = value
    return flat


def _main_image(images: list[Mapping[str, Any]]) -> str | None:
    ordered = sorted(images, key=lambda image: image.get("variant") != "MAIN")
    links = (image.get(size) for image in ordered for size in ("large", "hi_res", "thumb"))
    return next((link for link in links if link), None)


def _interaction(row: Mapping[str, Any]) -> dict[str, Any]:
    words: Iterator[str] = (row[key].strip() for key in ("title", "text") if isinstance(row.get(key), str))
    return {
        "user_id": row.get("user_id"),
        "item_id": row.get("parent_asin") or row.get("asin"),
        "timestamp": row.get("timestamp"),
        "rating": row.get("rating"),
        "review": "\n".join(word for word in words if word),
    }
