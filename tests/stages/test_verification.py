"""What a command reads of a run is what the stages wrote: readers refuse what was altered and name the file."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from nqf import export, report
from nqf.fields.cache import CacheError
from nqf.serving.recommender import Recommender
from nqf.stages.assess import assess
from nqf.stages.graph import open_for_training, run_stage
from nqf.stages.records import StageError
from nqf.stages.run import open_run

Damage = Callable[[Path, Path], Path]


def half_zero(path: Path) -> Path:
    """Zeroes the second half of a file in place, which keeps its size."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    return path


def tokens(run: Path, other: Path) -> Path:
    return half_zero(run / "tokens" / "tokens.npy")


def values(run: Path, other: Path) -> Path:
    return half_zero(max((run / "fields" / "tables").glob("*-values-*"), key=lambda path: path.stat().st_size))


def interactions(run: Path, other: Path) -> Path:
    path = run / "data" / "interactions.parquet"
    frame = pl.read_parquet(path)
    # Of another data set with the same users and the same number of events.
    frame.with_columns(pl.col("item").shuffle(seed=0)).write_parquet(path)
    return path


def split(run: Path, other: Path) -> Path:
    path = run / "data" / "split.npz"
    arrays = dict(np.load(path))
    # The validation cases in place of the test cases.
    arrays |= {name.replace("valid", "test"): array for name, array in arrays.items() if "valid" in name}
    np.savez(path, **arrays)
    return path


def best_checkpoint(run: Path) -> Path:
    step = json.loads((run / "joint" / "stage.json").read_text())["result"]["best_step"]
    return run / "joint" / "checkpoints" / str(step)


def checkpoint(run: Path, other: Path) -> Path:
    """The checkpoint of another training with the same shapes."""
    folder, others = best_checkpoint(run), best_checkpoint(other)
    shutil.rmtree(folder)
    shutil.copytree(others, folder)
    return folder


DAMAGES: dict[str, Damage] = {
    "half of the item tokens zero": tokens,
    "half of a field's values zero": values,
    "other interactions": interactions,
    "validation cases as test cases": split,
    "a checkpoint of another training": checkpoint,
}


@pytest.fixture(scope="module")
def other_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same shapes whose joint stage had another learning rate."""
    folder = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(tiny_run, folder)
    config = open_run(folder).config
    optim = dataclasses.replace(config.joint.optim, learning_rate=0.01, epochs=config.joint.optim.epochs)
    config = dataclasses.replace(config, joint=dataclasses.replace(config.joint, optim=optim))
    run_stage(open_for_training(config, folder, Console(quiet=True)), "joint")
    return folder


def readers(run: Path) -> dict[str, Callable[[], object]]:
    opened = dataclasses.replace(open_run(run), console=Console(quiet=True))
    return {
        "recommend": lambda: Recommender.load(run),
        "evaluate": lambda: assess(opened),
        "report": lambda: report.main([str(run), "--output", str(run / "page.html")]),
        "export": lambda: export.main([str(run), "--format", "index", "--output", str(run / "index")]),
    }


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_what_was_altered(
    tiny_run: Path, other_run: Path, tmp_path: Path, damage: str, record: Callable[..., None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    altered = DAMAGES[damage](run, other_run)
    found = readers(run)
    for name, read in found.items():
        with pytest.raises((StageError, CacheError), match=r"altered|checksum") as raised:
            read()
        assert altered.name in str(raised.value), name
    record(
        f"a run with {damage}: recommend, evaluate, report and export",
        tried=len(found),
        survived=len(found),
        seen="refused with the file, whichever command opens it",
    )


@pytest.mark.ci
@pytest.mark.slow
def test_a_picture_replaced_in_place_makes_the_fields_stale(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    # The copy's catalogue names the pictures of the original: they are copied and named again.
    items = pl.read_parquet(run / "data" / "items.parquet")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    paths = items["image"].drop_nulls().unique().sort()[:2].to_list()
    assert all(Path(path).is_file() for path in paths)
    from nqf.stages.artifacts import pictures_digest

    before = pictures_digest(run)
    copies = [shutil.copy(path, pictures / Path(path).name) for path in paths]
    items.with_columns(image=pl.lit(str(copies[0]))).write_parquet(run / "data" / "items.parquet")
    one = pictures_digest(run)
    shutil.copy(copies[1], copies[0])
    assert len({before, one, pictures_digest(run)}) == 3
