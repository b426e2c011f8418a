"""Small valid inputs of every format, and ways to damage them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from nqf.config import DataConfig

FIELDS = {
    "title": "text",
    "tags": {"modality": "category", "multi_valued": True, "separator": " "},
    "price": "number",
    "released": "time",
    "place": {"modality": "geo", "columns": ["lat", "lon"]},
    "picture": "image",
    "v": "vector",
}
ITEMS = [
    {
        "item_id": f"i{row}",
        "title": f"Thing number {row} — naïve 名",
        "tags": f"t{row % 3} t{row % 5}",
        "price": f"{row + 0.5}",
        "released": f"{1_600_000_000 + row}",
        "lat": f"{row}.25",
        "lon": f"-{row}.5",
        "picture": f"p{row}.png",
        "v": f"{row} 1 2",
    }
    for row in range(12)
]
EVENTS = [
    {
        "user_id": f"u{user}",
        "item_id": f"i{(5 * user + turn) % 12}",
        "timestamp": str(1_700_000_000 + 100 * user + turn),
    }
    for user in range(8)
    for turn in range(4 + user % 3)
]
# Format in the configuration, ending of both files.
KINDS = {
    "csv": ("table", "csv"),
    "csv.gz": ("table", "csv.gz"),
    "tsv": ("table", "tsv"),
    "jsonl": ("table", "jsonl"),
    "jsonl.gz": ("table", "jsonl.gz"),
    "parquet": ("table", "parquet"),
    "recbole": ("recbole", "atomic"),
    "recbole.gz": ("recbole", "atomic.gz"),
    "amazon": ("amazon-2023", "jsonl"),
    "amazon.gz": ("amazon-2023", "jsonl.gz"),
    "unirec": ("unirec", "json"),
}


def write_tables(folder: Path, kind: str, items: list[dict] = ITEMS, events: list[dict] = EVENTS) -> DataConfig:
    """Writes the tables of a kind and the schema; the configuration that reads them."""
    form, ending = KINDS[kind]
    schema = folder / "schema.yaml"
    schema.write_text(yaml.safe_dump({"title": "title", "fields": FIELDS}), encoding="utf-8")
    paths = {"items": folder / f"items.{ending}", "interactions": folder / f"events.{ending}"}
    for (name, path), rows in zip(paths.items(), (items, events), strict=True):
        content = _content(form, ending.removesuffix(".gz"), name, rows)
        path.write_bytes(gzip.compress(content, mtime=0) if ending.endswith(".gz") else content)
    return DataConfig(format=form, schema=str(schema), **{key: str(path) for key, path in paths.items()})


def _content(form: str, ending: str, name: str, rows: list[dict]) -> bytes:
    if form == "unirec":
        if name == "items":
            return json.dumps({row["item_id"]: row for row in rows}, ensure_ascii=False).encode()
        return json.dumps(_samples(rows), ensure_ascii=False).encode()
    if form == "amazon-2023":
        rename = {"item_id": "parent_asin"}
        rows = [{rename.get(key, key): value for key, value in row.items()} for row in rows]
    if ending == "jsonl":
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    frame = pl.DataFrame(rows)
    if ending == "parquet":
        import io

        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        return buffer.getvalue()
    if ending == "csv":
        return frame.write_csv().encode()
    if form == "recbole":
        types = {"tags": "token_seq", "v": "float_seq"}
        frame = frame.rename({column: f"{column}:{types.get(column, 'token')}" for column in frame.columns})
    return frame.write_csv(separator="\t", quote_style="never").encode()


def _samples(rows: list[dict]) -> list[dict[str, Any]]:
    sequences: dict[str, list[str]] = {}
    for row in rows:
        sequences.setdefault(row["user_id"], []).append(row["item_id"])
    return [
        {"user_id": user, "history": items[:-1], "candidate": items, "ground_truth": items[-1]}
        for user, items in sequences.items()
    ]


JUNK = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\r", b"\t", b"\xe2\x80\xa8", b"\x1b[2J", b",,,", b"{", b"]",
    b"\\u0000", b"9" * 400, b"1e999", b"-nan", b"[" * 3_000, b'{"a":' * 3_000, b"../../x", b"A" * 70_000,
)  # fmt: skip


def damaged(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """One damage of a file's bytes: its kind and the bytes."""
    kind = rng.choice(["bits", "cut", "zeros", "junk", "twice", "lines", "encoding", "empty"])
    data, at = bytearray(content), rng.randrange(len(content))
    if kind == "bits":
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 32] = bytes(len(data[at : at + 32]))
    elif kind == "junk":
        data[at:at] = rng.choice(JUNK)
    elif kind == "twice":
        data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 200)]
    elif kind == "lines":
        lines = bytes(data).splitlines(keepends=True)
        rng.shuffle(lines)
        data = bytearray(b"".join(lines[: rng.randint(1, len(lines))]))
    elif kind == "encoding":
        text = content.decode("utf-8", errors="replace")
        codec = rng.choice(["utf-16", "latin-1", "utf-7", "cp1251"])
        half = len(text) // 2 if rng.random() < 0.5 else 0
        data = bytearray(text[:half].encode() + text[half:].encode(codec, errors="replace"))
    else:
        data.clear()
    return kind, bytes(data)
