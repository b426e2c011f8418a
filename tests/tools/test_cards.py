"""Cards: what they show, and that nothing in an item can break out of them."""

from pathlib import Path

import polars as pl
from PIL import Image

from nqf.data.catalogue import Catalogue
from nqf.data.schema import schema_from_tree
from nqf.tools.report.cards import Card, cards_html, item_cards, thumbnail


def test_cards_of_a_catalogue(tmp_path: Path) -> None:
    Image.new("RGB", (24, 12), "red").save(tmp_path / "red.png")
    pl.DataFrame(
        {
            "item_id": ["a", "b"],
            "title": ["A <b>bold</b> title", None],
            "tags": [["x", "y"], None],
            "price": [12.5, None],
            "made": [1_600_000_000, None],
            "image": [str(tmp_path / "red.png"), str(tmp_path / "gone.png")],
        }
    ).write_parquet(tmp_path / "items.parquet")
    fields = {"title": "text", "tags": "category", "price": "number", "made": "time", "image": "image"}
    catalogue = Catalogue(tmp_path / "items.parquet", schema_from_tree({"title": "title", "fields": fields}))
    first, second, unknown = item_cards(catalogue, ["a", "b", "new"], lines=3)
    assert first.lines == ("x, y", "price 12.5", "made 2020-09-13")
    assert first.picture.startswith("data:image/png;base64,")
    assert second == Card(item_id="b", title="b")
    assert unknown == Card(item_id="new", title="new")
    page = cards_html([("For <you>", [first, second])])
    assert "<b>bold" not in page
    assert "A &lt;b&gt;bold&lt;/b&gt; title" in page
    assert "For &lt;you&gt;" in page
    assert page.count("<img") == 1


def test_pictures_that_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for path in (None, "https://example.org/x.png", str(tmp_path / "bad.png"), str(tmp_path)):
        assert thumbnail(path) == ""
