"""A disk that is full: one paragraph with the file, and nothing half written, in what serving writes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from nqf import files

FULL = """
import resource, sys

name, limit, *rest = sys.argv[1:]
# For nqf, a file that may not grow is a disk without room.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
from nqf import cli, items, recommend

cli.guard({"items": items, "recommend": recommend}[name].main, rest)
"""


def run_full(limit: int, name: str, *arguments: str) -> subprocess.CompletedProcess:
    # The cache of compiled programs is not what is tried.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", FULL, name, str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if not path.name.startswith(".lock")}


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "kind"), [(40, "csv"), (40, "parquet"), (3_000, "parquet")])
def test_items_add(tiny_run: Path, tmp_path: Path, limit: int, kind: str, record: Callable[..., None]) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    table = tmp_path / f"new.{kind}"
    new = pl.DataFrame({"item_id": [f"new-{row}" for row in range(2_000)], "title": "Walnut desk"})
    new.write_csv(table) if kind == "csv" else new.write_parquet(table)
    before = listing(run)
    done = run_full(limit, "items", "add", str(run), str(table))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.strip().splitlines()
    # What is read from text goes through a file of its own first.
    file = tempfile.gettempdir() if kind == "csv" else str(run / "items")
    assert len(message) == 2 and "File too large" in message[0] and file in message[0], message
    assert {name: size for name, size in listing(run).items() if Path(name).name != "items"} == before
    record(
        "a disk that is full when items are added",
        tried=1,
        survived=1,
        seen="an error with the file; the run is as it was",
    )


@pytest.mark.ci
@pytest.mark.slow
def test_recommend_all(tiny_run: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    target = tmp_path / "out" / "all.parquet"
    target.parent.mkdir()
    target.write_text("what was there")
    done = run_full(1_000, "recommend", str(tiny_run), "--all", str(target))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and str(target) in done.stderr
    assert os.listdir(target.parent) == ["all.parquet"] and target.read_text() == "what was there"
    record(
        "a disk that is full when recommendations for all are written",
        tried=1,
        survived=1,
        seen="an error with the file; what was there stays",
    )


def test_words_of_libraries_are_errors_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device: nothing was written") as caught:
        with files.whole(tmp_path / "a") as file:
            file.write(b"half")
            raise RuntimeError("parquet: underlying IO error: No space left on device (os error 28)")
    assert caught.value.errno == 28 and caught.value.filename == str(tmp_path / "a")
    with pytest.raises(RuntimeError, match="something else"), files.whole(tmp_path / "a"):
        raise RuntimeError("something else")
    assert not list(tmp_path.iterdir())
