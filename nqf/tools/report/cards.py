"""Items as cards with pictures: a self-contained piece of HTML for notebooks and reports."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import io
from collections.abc import Sequence

import polars as pl
from PIL import Image, ImageOps

from nqf.data.catalogue import Catalogue
from nqf.data.schema import Field
from nqf.fields.image import open_picture

_SIDE = 112
_STYLE = """
.nqf-cards {font: 13px/1.35 system-ui, sans-serif; color: #1c2430; margin: 0 0 14px}
.nqf-cards h4 {font-size: 13px; font-weight: 600; margin: 0 0 6px; color: #475569}
.nqf-cards .row {display: flex; flex-wrap: wrap; gap: 10px}
.nqf-cards .card {width: 132px; border: 1px solid #dbe2ea; border-radius: 8px; background: #fff; overflow: hidden}
.nqf-cards .card.marked {border-color: #0f9d7a; box-shadow: 0 0 0 1px #0f9d7a}
.nqf-cards .picture {height: 112px; display: flex; align-items: center; justify-content: center; background: #f1f4f8;
  color: #94a3b8; font-size: 28px; font-weight: 600}
.nqf-cards .picture img {width: 112px; height: 112px; object-fit: contain}
.nqf-cards .text {padding: 7px 9px 9px}
.nqf-cards .title {font-weight: 600; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; min-height: 35px}
.nqf-cards .line {color: #64748b; font-size: 12px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis}
.nqf-cards .note {color: #0f7a60; font-size: 12px; font-weight: 600}
"""


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


def item_cards(catalogue: Catalogue, item_ids: Sequence[str], *, lines: int = 2) -> list[Card]:
    """Cards of some items of a catalogue.

    Args:
      catalogue: The items; an id that it lacks gets a card with the id alone.
      item_ids: Which ones, in which order.
      lines: Categories, numbers and times that are shown at most.
    """
    fields = catalogue.schema.fields
    images = [field.name for field in fields if field.modality == "image"]
    shown = [field for field in fields if field.modality in ("category", "number", "time")]
    table = pl.scan_parquet(catalogue.path).filter(pl.col("item_id").is_in(list(item_ids)))
    rows = {row["item_id"]: row for row in table.collect().iter_rows(named=True)}
    cards = []
    for item_id in item_ids:
        row = rows.get(item_id, {})
        values = [_value(field, row[field.name]) for field in shown if row.get(field.name) is not None]
        picture = next((uri for name in images if (uri := thumbnail(row.get(name)))), "")
        cards.append(
            Card(item_id=item_id, title=row.get("title") or item_id, picture=picture, lines=tuple(values[:lines]))
        )
    return cards


def cards_html(rows: Sequence[tuple[str, Sequence[Card]]]) -> str:
    """Rows of cards, each under a heading; no file or address outside of the text is needed to show them."""
    parts = [f"<style>{_STYLE}</style>"]
    for heading, cards in rows:
        body = "".join(_card(card) for card in cards)
        parts.append(f'<div class="nqf-cards"><h4>{html.escape(heading)}</h4><div class="row">{body}</div></div>')
    return "\n".join(parts)


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


def _card(card: Card) -> str:
    title = html.escape(card.title)
    picture = f'<img src="{card.picture}" alt="{title}">' if card.picture else html.escape(card.title[:1].upper())
    lines = "".join(f'<div class="line">{html.escape(line)}</div>' for line in card.lines)
    note = f'<div class="note">{html.escape(card.note)}</div>' if card.note else ""
    text = f'<div class="title">{title}</div>{lines}{note}'
    return (
        f'<div class="card{" marked" if card.marked else ""}" title="{html.escape(card.item_id)}">'
        f'<div class="picture">{picture}</div><div class="text">{text}</div></div>'
    )


def _value(field: Field, value: object) -> str:
    if field.modality == "category":
        return ", ".join(value)
    if field.modality == "time":
        return f"{field.name} {datetime.datetime.fromtimestamp(value, datetime.UTC):%Y-%m-%d}"
    # Without commas: 1994 may be a year.
    return f"{field.name} {value:.6g}"
