"""`python -m nqf.export` on the shared tiny run, whose backbone was trained whole.

Adapters of a pretrained backbone: tests/training/test_pretrained_joint.py.
"""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from nqf import export
from nqf.interop.huggingface import golden_difference, load_qwen3
from nqf.interop.tokenizer import load_tokenizer
from nqf.serving.recommender import Recommender

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recommender(tiny_run: Path) -> Recommender:
    return Recommender.load(tiny_run)


def exported(run: Path, format: str, folder: Path) -> Path:
    export.main([str(run), "--format", format, "--output", str(folder)])
    assert folder.is_dir() and not list(folder.parent.glob("*.unfinished"))
    return folder


def test_index_ranks_as_the_recommender(tiny_run: Path, recommender: Recommender, tmp_path: Path) -> None:
    folder = exported(tiny_run, "index", tmp_path / "a" / "index")
    vectors, ids = np.load(folder / "vectors.npy"), json.loads((folder / "ids.json").read_text())
    about = json.loads((folder / "index.json").read_text())
    assert (
        vectors.dtype == np.float32 and vectors.shape == (about["items"], about["width"]) and len(ids) == len(vectors)
    )
    np.testing.assert_array_equal(vectors, recommender.item_vectors)
    assert ids == recommender.item_ids
    # The program of its page, for the first user: vectors and counts, without what the user has.
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(program, {})
    user = recommender.user_ids[0]
    expected = recommender.recommend(user=user, k=10)["item_id"].to_list()
    assert printed.getvalue() == f"{user} {expected}\n"


def test_index_leaves_removed_items_out(
    tiny_run: Path, recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = np.arange(len(recommender.item_ids)) % 3 > 0
    recommender = Recommender.load(tiny_run)
    recommender.remove_items(recommender.item_ids[::3])
    monkeypatch.setattr(Recommender, "load", lambda run: recommender)
    folder = exported(tiny_run, "index", tmp_path / "index")
    kept = [item for row, item in enumerate(recommender.item_ids) if row % 3]
    assert json.loads((folder / "ids.json").read_text()) == kept
    np.testing.assert_array_equal(np.load(folder / "vectors.npy"), recommender.item_vectors[available])


def test_parquet_holds_items_and_users(tiny_run: Path, recommender: Recommender, tmp_path: Path) -> None:
    folder = exported(tiny_run, "parquet", tmp_path / "tables")
    items, users = (pl.read_parquet(folder / f"{name}.parquet") for name in ("items", "users"))
    assert items["item_id"].to_list() == recommender.item_ids and items.schema["vector"].inner == pl.Float32
    np.testing.assert_allclose(items["vector"].to_numpy(), recommender.item_vectors, atol=1e-6)
    # What a known user is recommended follows from the two tables, where counts add nothing.
    recommender = Recommender.load(tiny_run)
    recommender.score = dataclasses.replace(recommender.score, cooccurrence=0.0)
    scores = users["vector"].to_numpy()[7] @ items["vector"].to_numpy().T
    frame = recommender.recommend(user=users["user_id"][7], k=5, repeats=True)
    assert [recommender.item_ids[row] for row in np.argsort(-scores)[:5]] == frame["item_id"].to_list()


def test_whole_backbone_as_a_hugging_face_folder(tiny_run: Path, tmp_path: Path) -> None:
    folder = exported(tiny_run, "huggingface", tmp_path / "model")
    model, params = load_qwen3(folder)
    for name in ("golden.safetensors", "golden_texts.safetensors"):
        assert golden_difference(folder, model, {"params": params}, name=name) < 1e-5
    ours, runs = load_tokenizer(folder), load_tokenizer(tiny_run / "joint" / "tokenizer")
    assert ours.encode(["a lamp"], add_eos=True) == runs.encode(["a lamp"], add_eos=True)
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(program, {})
    assert float(printed.getvalue()) < 1e-4


def test_what_cannot_be_written_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trained whole.*--format huggingface"):
        exported(tiny_run, "peft", tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: exists already"):
        exported(tiny_run, "index", tmp_path / "full")
    with pytest.raises(RuntimeError, match="no run here"):
        exported(tmp_path, "index", tmp_path / "index")
    # Nothing is left behind.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_errors_are_one_paragraph(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nqf.export", str(tmp_path / "none"), "--format", "index", "--output"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, str(tmp_path / "x")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "no run here" in done.stderr and len(done.stderr.splitlines()) == 2
