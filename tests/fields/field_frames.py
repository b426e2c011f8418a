"""A catalogue in memory, with what the fields stage reads of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from nqf.data.schema import Field, Schema

FIELDS = (
    Field(name="title", modality="text", columns=("title",)),
    Field(name="brand", modality="category", columns=("brand",)),
    Field(name="price", modality="number", columns=("price",), log=True),
    Field(name="released", modality="time", columns=("released",)),
    Field(name="place", modality="geo", columns=("lat", "lon")),
    Field(name="picture", modality="image", columns=("picture",)),
    Field(name="features", modality="vector", columns=("features",)),
)
DTYPES = {
    "title": pl.String,
    "brand": pl.List(pl.String),
    "price": pl.Float64,
    "released": pl.Int64,
    "place": pl.List(pl.Float64),
    "picture": pl.String,
    "features": pl.List(pl.Float32),
}
WORDS = "red blue green small large soft cotton linen silk shirt dress scarf coat hat glove winter summer".split()


class FrameCatalogue:
    """Quacks like `nqf.data.catalogue.Catalogue`."""

    def __init__(self, frame: pl.DataFrame, fields: tuple[Field, ...] = FIELDS, title: str | None = "title"):
        self.frame = frame
        self.schema = Schema(fields=fields, title=title)
        self.item_ids = frame["item_id"].to_list()

    def __len__(self) -> int:
        return len(self.frame)

    def chunks(self, columns: list[str], rows: int) -> Iterator[pl.DataFrame]:
        for start in range(0, len(self.frame), rows):
            yield self.frame.select(columns)[start : start + rows]


def random_frame(items: int, seed: int, pictures: Path | None = None) -> pl.DataFrame:
    """Items with all modalities, a fifth of the values missing and many of them shared."""
    rng = np.random.default_rng(seed)
    paths = [None]
    if pictures is not None:
        pictures.mkdir(exist_ok=True)
        for index, color in enumerate(("red", "navy", "teal", "gold")):
            paths.append(str(pictures / f"{index}.png"))
            Image.new("RGB", (12 + index, 9), color).save(paths[-1])

    def some(values: list) -> list:
        return [None if rng.random() < 0.2 else value for value in values]

    columns = {
        "title": [" ".join(rng.choice(WORDS, 3)) for _ in range(items)],
        "brand": [list(rng.choice(["acme", "bolt", "cord"], rng.integers(1, 3))) for _ in range(items)],
        "price": list(rng.lognormal(3, 1, items).round(0)),
        "released": list(rng.integers(0, 1_700_000_000, items) // 10_000_000 * 10_000_000),
        "place": [[float(lat), float(lat) * 2] for lat in rng.integers(-80, 80, items)],
        "picture": list(rng.choice(paths, items)),
        "features": [[float(x), 1.0, -float(x)] for x in rng.integers(0, 9, items)],
    }
    frame = {"item_id": [f"{seed}-{row}" for row in range(items)]}
    frame |= {name: pl.Series(some(values), dtype=DTYPES[name]) for name, values in columns.items()}
    return pl.DataFrame(frame)
