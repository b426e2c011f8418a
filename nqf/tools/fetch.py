"""Public data sets by name: where their publishers keep them, under which license, and how they become tables."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl

from nqf.data import amazon
from nqf.data.errors import DataError
from nqf.data.schema import nearest
from nqf.files import whole, write_text
from nqf.tools.download import PATIENCE, RECORD, Patience, download, unpack

AMAZON_CATEGORIES = tuple(
    """All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Automotive Baby_Products Beauty_and_Personal_Care
    Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics Gift_Cards
    Grocery_and_Gourmet_Food Handmade_Products Health_and_Household Health_and_Personal_Care Home_and_Kitchen
    Industrial_and_Scientific Kindle_Store Magazine_Subscriptions Movies_and_TV Musical_Instruments Office_Products
    Patio_Lawn_and_Garden Pet_Supplies Software Sports_and_Outdoors Subscription_Boxes Tools_and_Home_Improvement
    Toys_and_Games Unknown Video_Games""".split()
)
_AMAZON_LICENSE = """\
Amazon Reviews 2023, McAuley Lab, UC San Diego (https://amazon-reviews-2023.github.io).
The publishers state no license for the data. Reviews and pictures belong to their authors and to the sellers; treat
them as research material that may not be passed on. The publishers ask to cite: Hou, Li, He, Yan, Chen, McAuley,
"Bridging Language and Items for Retrieval and Recommendation", arXiv 2403.03952, 2024."""
_MOVIELENS_LICENSE = """\
MovieLens, GroupLens Research, University of Minnesota (https://grouplens.org/datasets/movielens/).
For research under the conditions of the README beside this file, in short: no statement that suggests an endorsement,
no redistribution without permission, no commercial use without permission, and acknowledgment in publications:
Harper, Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4):19, 2015, doi 10.1145/2827872."""
_GOODBOOKS_LICENSE = """\
goodbooks-10k, Zygmunt Zajac (https://github.com/zygmuntz/goodbooks-10k).
Creative Commons Attribution-ShareAlike 4.0 International, https://creativecommons.org/licenses/by-sa/4.0/.
The cover pictures that books.csv links to are not part of it."""
_MOVIES_SCHEMA = """\
title: title
fields:
  title: text
  genres: category
  year: {modality: number, log: false}
"""
_BOOKS_SCHEMA = """\
title: title
fields:
  title: text
  authors: {modality: category, multi_valued: true, separator: ","}
  shelves: category
  year: {modality: number, log: false}
  language: category
  # Totals of the day of the crawl: they know the future of every interaction.
  average_rating: {modality: number, after_the_fact: true}
  rating_number: {modality: number, log: true, after_the_fact: true}
"""
# Shelves that tell of the reader or the copy rather than of the book.
_OWN_SHELVES = r"read|own|favou?rit|book|kindle|library|wish|buy|shelf|audio|default|star|novels?$|^\W|^\d+$"
_SHELVES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A data set of a publisher.

    Attributes:
      base: Address that the files' names are appended to.
      files: Names below `base`.
      license: What the publisher states, and what to cite.
      schema: Text of schema.yaml.
      data: Further lines of the configuration's data section.
      prepare: Makes items.parquet and interactions.parquet from (downloads, output, scratch folder); None if nqf
        reads the files.
    """

    base: str
    files: tuple[str, ...]
    license: str
    schema: str
    data: dict[str, str]
    prepare: Callable[[Path, Path, Path], None] | None = None


def source_of(name: str) -> Source:
    """The data set of a name: `ml-100k`, `ml-1m`, `goodbooks` or `amazon-2023:CATEGORY`.

    Raises:
      DataError: Unknown; suggests the nearest name.
    """
    kind, _, category = name.partition(":")
    if kind == "amazon-2023":
        if category not in AMAZON_CATEGORIES:
            raise DataError(f"unknown category '{category}' of amazon-2023{nearest(category, AMAZON_CATEGORIES)}")
        reviews, meta = f"review_categories/{category}.jsonl.gz", f"meta_categories/meta_{category}.jsonl.gz"
        return Source(
            base="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/",
            files=(meta, reviews),
            license=_AMAZON_LICENSE,
            schema=amazon.schema_text(),
            data={
                "format": "amazon-2023",
                "items": f"downloads/{Path(meta).name}",
                "interactions": f"downloads/{Path(reviews).name}",
            },
        )
    if name not in _SOURCES:
        raise DataError(f"unknown data set '{name}'{nearest(name, (*_SOURCES, 'amazon-2023:All_Beauty'))}")
    return _SOURCES[name]


def fetch(
    name: str,
    output: Path,
    *,
    base: str | None = None,
    patience: Patience = PATIENCE,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Source:
    """Downloads a data set and writes tables, schema.yaml, config.yaml and LICENSE.txt, ready to train.

    Args:
      name: As `source_of`.
      output: Folder; what was downloaded into it before is used again, and a schema.yaml or config.yaml stays.
      base: Address to take the files from instead of the publisher's.
      patience: Tries and waits of each download.
      progress: Called with the file's name, the bytes that are there and the bytes of the whole file.

    Raises:
      DataError: A file is unavailable, or is not what it ought to be; or the folder holds something else.
    """
    source = source_of(name)
    downloads = output / "downloads"
    if (
        not (downloads / RECORD).is_file()
        and output.exists()
        and {path.name for path in output.iterdir()} - {"downloads"}
    ):
        raise DataError(f"{output}: holds files that were not fetched; give another --output, or an empty folder")
    for file in source.files:
        target = downloads / Path(file).name
        report = None if progress is None else lambda done, total, name=target.name: progress(name, done, total)
        url = (base or source.base).rstrip("/") + "/" + file
        download(url, target, patience=patience, progress=report)
    if source.prepare is not None:
        with tempfile.TemporaryDirectory() as scratch:
            source.prepare(downloads, output, Path(scratch))
    write_text(output / "LICENSE.txt", source.license + "\n")
    data = "".join(f"  {key}: {value}\n" for key, value in {**source.data, "schema": "schema.yaml"}.items())
    config = (
        f"# Written by: python -m nqf.data fetch {name}\n"
        f"# Train with: python -m nqf.train --config THIS_FILE\n"
        f"name: {name.replace(':', '-')}\ndata:\n{data}"
    )
    for file, text in (("schema.yaml", source.schema), ("config.yaml", config)):
        # They are there to be changed.
        if not (output / file).exists():
            write_text(output / file, text)
    return source


def _movies_100k(downloads: Path, output: Path, scratch: Path) -> None:
    archive = downloads / "ml-100k.zip"
    unpack(archive, ("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.genre"), scratch)
    unpack(archive, ("ml-100k/README",), output)
    names = [line.split("|")[0] for line in _lines(scratch / "u.genre")]
    rows = []
    for line in _lines(scratch / "u.item"):
        parts = line.split("|")
        if len(parts) != 5 + len(names):
            raise DataError(f"{archive}: u.item: {len(parts)} columns, expected {5 + len(names)}: {line[:80]!r}")
        genres = [name for name, flag in zip(names, parts[5:], strict=True) if flag == "1" and name != "unknown"]
        rows.append((parts[0], parts[1], genres))
    events = pl.read_csv(
        scratch / "u.data", separator="\t", has_header=False, new_columns=["user_id", "item_id", "rating", "timestamp"]
    )
    _write_movies(rows, events, output)


def _movies_1m(downloads: Path, output: Path, scratch: Path) -> None:
    unpack(downloads / "ml-1m.zip", ("ml-1m/ratings.dat", "ml-1m/movies.dat"), scratch)
    unpack(downloads / "ml-1m.zip", ("ml-1m/README",), output)
    rows = []
    for line in _lines(scratch / "movies.dat"):
        item_id, title, genres = line.split("::")
        rows.append((item_id, title, genres.split("|")))
    # polars takes separators of one byte only.
    plain = (scratch / "ratings.dat").read_bytes().replace(b"::", b"\t")
    events = pl.read_csv(
        io.BytesIO(plain), separator="\t", has_header=False, new_columns=["user_id", "item_id", "rating", "timestamp"]
    )
    _write_movies(rows, events, output)


def _write_movies(rows: list[tuple[str, str, list[str]]], events: pl.DataFrame, output: Path) -> None:
    items = pl.DataFrame(
        rows, schema={"item_id": pl.String, "title": pl.String, "genres": pl.List(pl.String)}, orient="row"
    )
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64)
    items.with_columns(year=year).pipe(_write, output / "items.parquet")
    events.with_columns(pl.col("user_id", "item_id").cast(pl.String)).pipe(_write, output / "interactions.parquet")


def _write(table: pl.DataFrame, path: Path) -> None:
    with whole(path) as file:
        table.write_parquet(file)


def _lines(path: Path) -> list[str]:
    """Lines of a MovieLens file, which is Latin-1."""
    return [line for line in path.read_text(encoding="latin-1").split("\n") if line.strip()]


def _books(downloads: Path, output: Path, scratch: Path) -> None:
    tags = pl.read_csv(downloads / "tags.csv")
    shelves = (
        pl.read_csv(downloads / "book_tags.csv")
        .join(tags, on="tag_id")
        .filter(~pl.col("tag_name").str.contains(_OWN_SHELVES))
        .sort("count", descending=True)
        .group_by("goodreads_book_id", maintain_order=True)
        .agg(pl.col("tag_name").head(_SHELVES).alias("shelves"))
    )
    books = pl.read_csv(downloads / "books.csv", infer_schema_length=None).join(
        shelves, on="goodreads_book_id", how="left"
    )
    books.select(
        pl.col("book_id").cast(pl.String).alias("item_id"),
        "title",
        "authors",
        "shelves",
        pl.col("original_publication_year").cast(pl.Int64).alias("year"),
        pl.col("language_code").alias("language"),
        "average_rating",
        pl.col("ratings_count").alias("rating_number"),
    ).sort(pl.col("item_id").cast(pl.Int64)).pipe(_write, output / "items.parquet")
    # The file is in the order of time and has no times.
    pl.read_csv(downloads / "ratings.csv").select(
        pl.col("user_id").cast(pl.String), pl.col("book_id").cast(pl.String).alias("item_id"), "rating"
    ).pipe(_write, output / "interactions.parquet")


_TABLES = {"format": "table", "items": "items.parquet", "interactions": "interactions.parquet"}
_SOURCES = {
    "ml-100k": Source(
        base="https://files.grouplens.org/datasets/movielens/",
        files=("ml-100k.zip",),
        license=_MOVIELENS_LICENSE,
        schema=_MOVIES_SCHEMA,
        data=_TABLES,
        prepare=_movies_100k,
    ),
    "ml-1m": Source(
        base="https://files.grouplens.org/datasets/movielens/",
        files=("ml-1m.zip",),
        license=_MOVIELENS_LICENSE,
        schema=_MOVIES_SCHEMA,
        data=_TABLES,
        prepare=_movies_1m,
    ),
    "goodbooks": Source(
        base="https://raw.githubusercontent.com/zygmuntz/goodbooks-10k/master/",
        files=("books.csv", "tags.csv", "book_tags.csv", "ratings.csv"),
        license=_GOODBOOKS_LICENSE,
        schema=_BOOKS_SCHEMA,
        data=_TABLES,
        prepare=_books,
    ),
}
