"""Folders that may not be written, and a picture that would fill the memory."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from nqf import files
from nqf.config import Config
from nqf.fields.image import MAX_PIXELS, open_picture
from nqf.stages.graph import open_for_training


@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """A folder that may only be read, seen by a user whom file modes bind."""
    folder = Path(tempfile.mkdtemp())
    (folder / "run").mkdir()
    user = os.geteuid()
    os.chmod(folder, 0o755)
    os.chmod(folder / "run", 0o555)
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder / "run"
    finally:
        os.seteuid(user)
        os.chmod(folder / "run", 0o755)
        shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_named(record: Callable[..., None]) -> None:
    with nobody() as run:
        with pytest.raises(PermissionError, match=r"nothing was written: '.*results\.json'"):
            files.write_text(run / "results.json", "{}")
        with pytest.raises(PermissionError, match=r"\.nqf\.json"):
            open_for_training(Config(), run, Console(quiet=True))
        with pytest.raises(PermissionError, match=r"\.lock"), files.locked(run):
            pass
        assert not list(run.iterdir())
    record(
        "a run folder that may not be written: a file, the start of a run, the lock",
        tried=3,
        survived=3,
        seen="an error that names the file; nothing is left in the folder",
    )


def test_a_picture_that_would_fill_the_memory_is_not_opened(tmp_path: Path, record: Callable[..., None]) -> None:
    path = tmp_path / "bomb.png"
    side = int(MAX_PIXELS**0.5) + 1_000
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 2_000_000
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"), open_picture(str(path)):
        pass
    record(
        "a small picture file of very many pixels",
        tried=1,
        survived=1,
        seen="the picture counts as missing, and the warning says how many pixels it has",
    )
