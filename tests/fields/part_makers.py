"""Processes that build a cache, or help with it, with a slow encoder whose vectors tell what it was given at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from field_frames import FIELDS, FrameCatalogue

from nqf.config import FieldsConfig
from nqf.fields.build import assist, build

CONFIG = FieldsConfig(chunk_rows=16, category_width=8)
ROOT = Path(__file__).parents[2]


class Slow:
    """A pretrained encoder's stand-in. Values encoded together change each other, as rounding may in batches."""

    width = 3

    def __init__(self, log: Path | None = None, seconds: float = 0.0, revision: str = "1", lost: tuple[str, ...] = ()):
        self.identity = {"kind": "slow", "revision": revision}
        self._log, self._seconds, self._lost = log, seconds, lost

    def encode(self, values: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps(values) + "\n")
        time.sleep(self._seconds)
        total = sum(map(len, values))
        rows = [[len(value) + at / 64, total / 512, ord(value[0]) / 100] for at, value in enumerate(values)]
        ok = np.array([not any(word in value for word in ("bad", *self._lost)) for value in values])
        return np.array(rows, np.float32), ok

    def save(self, directory: Path) -> None:
        (directory / "encoder.json").write_text(json.dumps(self.identity))


def factories(*arguments, **options) -> dict[str, Callable]:
    return {"text": lambda field, config: Slow(*arguments, **options)}


def catalogue(items: int = 150) -> FrameCatalogue:
    """Titles with repeats, missing and unreadable ones; candidates' texts are a second table that is encoded."""
    titles = [None if row % 11 == 0 else f"{'bad ' if row % 37 == 5 else ''}{row % 101} shirt" for row in range(items)]
    frame = pl.DataFrame({"item_id": [str(row) for row in range(items)], "title": pl.Series(titles, dtype=pl.String)})
    brands = pl.Series("brand", [[f"b{row % 7}"] for row in range(items)], dtype=pl.List(pl.String))
    return FrameCatalogue(frame.with_columns(brands), FIELDS[:2])


def start(role: str, cache: Path, log: Path, seconds: float) -> subprocess.Popen:
    """Starts a process that builds a cache or assists until there is one."""
    return subprocess.Popen(
        [sys.executable, __file__, role, str(cache), str(log), str(seconds)], cwd=ROOT, stderr=subprocess.PIPE
    )


def main(role: str, cache: Path, log: Path, seconds: float) -> None:
    made = factories(log, seconds)
    if role == "build":
        build(catalogue(), cache, CONFIG, factories=made)
        return
    while not (cache / "manifest.json").exists():
        list(assist(catalogue(), cache, CONFIG, factories=made))
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
