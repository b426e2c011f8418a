"""Public data sets by name: where their publishers keep them, under which license, and how they become tables."""

from __future__ import annotations

import dataclasses
import gzip
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import yaml

from nqf import files
from nqf.config import Config, from_tree
from nqf.data import amazon
from nqf.data.errors import DataError
from nqf.data.readers import read_json_lines
from nqf.data.schema import nearest
from nqf.files import whole, write_text
from nqf.interop.images import ImageReader
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
_BEAUTY_LICENSE = """\
Amazon product data of 2014, Beauty, 5-core, J. McAuley, UC San Diego (https://jmcauley.ucsd.edu/data/amazon/).
The publisher states no license for the data. Reviews and pictures belong to their authors and to the sellers; treat
them as research material that may not be passed on. To cite: McAuley, Targett, Shi, van den Hengel, "Image-based
recommendations on styles and substitutes", SIGIR 2015."""
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
      prepare: Makes items.parquet and interactions.parquet from (downloads, output, scratch folder); None if nqf
        reads the files.
    """

    base: str
    files: tuple[str, ...]
    license: str
    prepare: Callable[[Path, Path, Path], None] | None = None


def source_of(name: str) -> Source:
    """The data set of a name: `ml-100k`, `ml-1m`, `goodbooks`, `amazon-beauty` or `amazon-2023:CATEGORY`.

    Raises:
      DataError: Unknown; suggests the nearest name.
    """
    kind, _, category = name.partition(":")
    if kind == "amazon-2023":
        if category not in AMAZON_CATEGORIES:
            raise DataError(f"unknown category '{category}' of amazon-2023{nearest(category, AMAZON_CATEGORIES)}")
        return Source(
            base="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/",
            files=(f"meta_categories/meta_{category}.jsonl.gz", f"review_categories/{category}.jsonl.gz"),
            license=_AMAZON_LICENSE,
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
    pictures: Callable[[str, int, int], None] | None = None,
) -> Source:
    """Downloads a data set and writes tables, schema.yaml, config.yaml and LICENSE.txt, ready to train.

    Args:
      name: As `source_of`.
      output: Folder; what was downloaded into it before is used again, and a schema.yaml or config.yaml stays.
      base: Address to take the files from instead of the publisher's.
      patience: Tries and waits of each download.
      progress: Called with the file's name, the bytes that are there and the bytes of the whole file.
      pictures: Asks for the pictures that the items link to; called with "pictures", those that were tried, and all.

    Raises:
      DataError: A file is unavailable, or is not what it ought to be; or the folder holds something else; or the items
        link to no pictures.
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
    if pictures is not None:
        if source.prepare is None:
            raise DataError("--pictures: nqf reads these files as they are; their links are for a CLIP model")
        _pictures(output, pictures)
    write_text(output / "LICENSE.txt", source.license + "\n")
    plain, config = _recipe(name, source)
    pictured = plain + "  image: {modality: image, column: image_path}\n"
    schema = output / "schema.yaml"
    # They are there to be changed; what this function wrote is not yet.
    if not schema.exists() or schema.read_text(encoding="utf-8") in (plain, pictured):
        write_text(schema, plain if pictures is None else pictured)
    if not (output / "config.yaml").exists():
        head = f"# Written by: python -m nqf.data fetch {name}\n# Train with: python -m nqf.train --config THIS_FILE\n"
        write_text(output / "config.yaml", head + config)
    return source


def _recipe(name: str, source: Source) -> tuple[str, str]:
    """Texts of schema.yaml and config.yaml: those of the shipped configuration, where there is one."""
    if source.prepare is None:
        items, interactions = (f"downloads/{Path(file).name}" for file in source.files)
        data = f"  format: amazon-2023\n  items: {items}\n  interactions: {interactions}\n  schema: schema.yaml\n"
        return amazon.schema_text(), f"name: {name.replace(':', '-')}\ndata:\n{data}"
    text = (files.shipped() / f"{name}.yaml").read_text(encoding="utf-8")
    schema = from_tree(Config, yaml.safe_load(text)).data.schema or ""
    config = text[text.index("name:") :].replace(f"data/{name}/", "").replace(schema, "schema.yaml")
    return (files.shipped() / schema).read_text(encoding="utf-8"), config


def _pictures(output: Path, progress: Callable[[str, int, int], None]) -> None:
    """Downloads the pictures that the items link to, and notes the path of each that is there and can be read."""
    items = pl.read_parquet(output / "items.parquet", glob=False)
    if "image_url" not in items.columns:
        raise DataError("--pictures: the publisher links to none; there are some with goodbooks and amazon-beauty")
    reader, found = ImageReader(cache=output / "pictures"), {}
    urls = items["image_url"].drop_nulls().unique(maintain_order=True).to_list()
    for done, (url, got) in enumerate(reader.read(urls, lambda image: image.size), start=1):
        if not isinstance(got, Exception):
            found[url] = str(reader.fetch(url).relative_to(output))
        progress("pictures", done, len(urls))
    paths = pl.col("image_url").replace_strict(found, default=None, return_dtype=pl.String)
    _write(items.with_columns(image_path=paths), output / "items.parquet")


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
        rows.append((parts[0], parts[1], ", ".join(genres)))
    _write_movies(rows, (scratch / "u.data").read_bytes(), output)


def _movies_1m(downloads: Path, output: Path, scratch: Path) -> None:
    unpack(downloads / "ml-1m.zip", ("ml-1m/ratings.dat", "ml-1m/movies.dat"), scratch)
    unpack(downloads / "ml-1m.zip", ("ml-1m/README",), output)
    rows = []
    for line in _lines(scratch / "movies.dat"):
        item_id, title, genres = line.split("::")
        rows.append((item_id, title, genres.replace("|", ", ")))
    # polars takes separators of one byte only.
    _write_movies(rows, (scratch / "ratings.dat").read_bytes().replace(b"::", b"\t"), output)


def _write_movies(rows: list[tuple[str, str, str]], ratings: bytes, output: Path) -> None:
    names = ["user_id", "item_id", "rating", "timestamp"]
    events = pl.read_csv(io.BytesIO(ratings), separator="\t", has_header=False, new_columns=names)
    items = pl.DataFrame(rows, schema=["item_id", "title", "categories"], orient="row")
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
        .agg(pl.col("tag_name").head(_SHELVES).str.join(", ").alias("categories"))
    )
    books = pl.read_csv(downloads / "books.csv", infer_schema_length=None).join(
        shelves, on="goodreads_book_id", how="left"
    )
    books.select(
        pl.col("book_id").cast(pl.String).alias("item_id"),
        "title",
        pl.col("authors").alias("brand"),
        "categories",
        pl.col("original_publication_year").cast(pl.Int64).alias("year"),
        pl.col("language_code").alias("language"),
        "average_rating",
        pl.col("ratings_count").alias("rating_number"),
        "image_url",
    ).sort(pl.col("item_id").cast(pl.Int64)).pipe(_write, output / "items.parquet")
    # The file is in the order of time and has no times.
    pl.read_csv(downloads / "ratings.csv").select(
        pl.col("user_id").cast(pl.String), pl.col("book_id").cast(pl.String).alias("item_id"), "rating"
    ).pipe(_write, output / "interactions.parquet")


def _beauty(downloads: Path, output: Path, scratch: Path) -> None:
    events = pl.read_ndjson(gzip.decompress((downloads / "reviews_Beauty_5.json.gz").read_bytes())).select(
        user_id="reviewerID", item_id="asin", rating="overall", timestamp="unixReviewTime"
    )
    # The other file is of all items of the shop.
    wanted = set(events["item_id"])
    items = [item for item in read_json_lines(downloads / "meta_Beauty.json.gz") if item.get("asin") in wanted]
    names = {"item_id": "asin", "title": "title", "brand": "brand", "price": "price", "image_url": "imUrl"}
    rows = [
        {name: item.get(key) for name, key in names.items()}
        # The first of the item's places in the shop, and the rank in the department that is named first.
        | {"categories": " > ".join((item.get("categories") or [[]])[0])}
        | {"sales_rank": next(iter((item.get("salesRank") or {}).values()), None)}
        for item in items
    ]
    _write(pl.DataFrame(rows, infer_schema_length=None, strict=False), output / "items.parquet")
    _write(events, output / "interactions.parquet")


_SOURCES = {
    "ml-100k": Source(
        base="https://files.grouplens.org/datasets/movielens/",
        files=("ml-100k.zip",),
        license=_MOVIELENS_LICENSE,
        prepare=_movies_100k,
    ),
    "ml-1m": Source(
        base="https://files.grouplens.org/datasets/movielens/",
        files=("ml-1m.zip",),
        license=_MOVIELENS_LICENSE,
        prepare=_movies_1m,
    ),
    "goodbooks": Source(
        base="https://raw.githubusercontent.com/zygmuntz/goodbooks-10k/master/",
        files=("books.csv", "tags.csv", "book_tags.csv", "ratings.csv"),
        license=_GOODBOOKS_LICENSE,
        prepare=_books,
    ),
    "amazon-beauty": Source(
        base="https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        files=("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        license=_BEAUTY_LICENSE,
        prepare=_beauty,
    ),
}
