"""Items as cards with pictures: a self-contained piece of HTML for notebooks and reports."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup
from PIL import Image, ImageOps

from nqf.data.catalogue import Catalogue
from nqf.data.schema import Field, Schema
from nqf.fields.image import open_picture
from nqf.tools.templates import html

if TYPE_CHECKING:
    from nqf.serving.recommender import Recommender

_HERE = Path(__file__).parent
_SIDE = 112
STYLE = Markup((_HERE / "cards.css").read_text(encoding="utf-8"))
"""Style sheet of the cards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """An item.

    Attributes:
      item_id: Its id.
      title: Its title.
      picture: Thumbnail as a data URI; empty if there is none that can be read on this machine.
      lines: Further values, short.
      note: A line in color, such as a score; empty for none.
      marked: Whether the card stands out, as the item that was really chosen.
    """

    item_id: str
    title: str
    picture: str = ""
    lines: tuple[str, ...] = ()
    note: str = ""
    marked: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Shown:
    """What a notebook shows of `cards`.

    Attributes:
      html: Needs no file or address outside of it.
    """

    html: Markup

    def __repr__(self) -> str:
        return "<cards>"

    def _repr_html_(self) -> str:
        return str(self.html)


def item_cards(catalogue: Catalogue, item_ids: Sequence[str], *, lines: int = 2) -> list[Card]:
    """Cards of some items of a catalogue.

    Args:
      catalogue: The items; an id that it lacks gets a card with the id alone.
      item_ids: Which ones, in which order.
      lines: Categories, numbers and times that are shown at most.
    """
    table = pl.scan_parquet(catalogue.path, glob=False).filter(pl.col("item_id").is_in(list(item_ids)))
    return _cards(table.collect(), catalogue.schema, item_ids, lines)


def cards(
    recommender: Recommender,
    rows: Mapping[str, Sequence[str] | pl.DataFrame],
    *,
    marked: Collection[str] = (),
    lines: int = 2,
) -> Shown:
    """Items as cards with pictures: a notebook shows what stands in the last line of a cell.

    Args:
      recommender: It knows the items.
      rows: Heading to what stands under it: item ids, or a frame that the recommender gave, whose scores are shown.
      marked: Ids of the items that stand out, in a green frame.
      lines: Categories, numbers and times that are shown at most.

    Raises:
      ValueError: An unknown item id.
    """
    shown = []
    for heading, row in rows.items():
        ids = row["item_id"].to_list() if isinstance(row, pl.DataFrame) else list(row)
        made = _cards(recommender.items(ids), recommender.schema, ids, lines)
        notes = [""] * len(ids)
        if isinstance(row, pl.DataFrame) and "score" in row.columns:
            notes = [f"score {score:.2f}" for score in row["score"]]
        shown.append(
            (heading, [dataclasses.replace(card, note=note, marked=card.item_id in marked)
                       for card, note in zip(made, notes, strict=True)])
        )  # fmt: skip
    return Shown(html=cards_html(shown))


def _cards(table: pl.DataFrame, schema: Schema, item_ids: Sequence[str], lines: int) -> list[Card]:
    images = [field.name for field in schema.fields if field.modality == "image"]
    shown = [field for field in schema.fields if field.modality in ("category", "number", "time")]
    rows = {row["item_id"]: row for row in table.iter_rows(named=True)}
    made = []
    for item_id in item_ids:
        row = rows.get(item_id, {})
        values = [_value(field, row[field.name]) for field in shown if row.get(field.name) is not None]
        picture = next((uri for name in images if (uri := thumbnail(row.get(name)))), "")
        made.append(
            Card(item_id=item_id, title=row.get("title") or item_id, picture=picture, lines=tuple(values[:lines]))
        )
    return made


def cards_html(rows: Sequence[tuple[str, Sequence[Card]]], *, style: bool = True) -> Markup:
    """Rows of cards, each under a heading; no file or address outside of the text is needed to show them.

    Args:
      rows: Heading and cards of each row.
      style: Whether the text brings its own style sheet; a page with many of them has it once.
    """
    return html(_HERE / "templates" / "cards.html.j2", rows=rows, style=STYLE if style else "")


def thumbnail(path: str | None) -> str:
    """A local picture as a small PNG data URI; empty if it is missing, a link, too large or damaged."""
    if path is None:
        return ""
    try:
        with open_picture(path) as image:
            # Small drawings are enlarged without blur, photographs reduced with care.
            small = image.convert("RGB")
            method = Image.Resampling.NEAREST if max(small.size) < _SIDE else Image.Resampling.LANCZOS
            buffer = io.BytesIO()
            ImageOps.contain(small, (_SIDE, _SIDE), method).save(buffer, "PNG", optimize=True)
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _value(field: Field, value: Any) -> str:
    if field.modality == "category":
        return ", ".join(value)
    if field.modality == "time":
        return f"{field.name} {datetime.datetime.fromtimestamp(value, datetime.UTC):%Y-%m-%d}"
    # Without commas: 1994 may be a year.
    return f"{field.name} {value:.6g}"
