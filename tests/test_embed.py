"""`python -m nqf.embed`: what it reads and writes, with a model that is a function of the text's length."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nqf import embed


@pytest.fixture
def calls(monkeypatch):
    calls = []

    def load(model, **options):
        calls.append((model, options))
        vectors = lambda texts: np.array([[len(text), 0.1] for text in texts], np.float32)  # noqa: E731
        return SimpleNamespace(width=2, embed=vectors)

    # In place of the module, so that neither weights nor a tokenizer are needed.
    monkeypatch.setitem(sys.modules, "nqf.interop.encoders", SimpleNamespace(load_text_embedder=load))
    return calls


def run(tmp_path, name: str, content: str, output: str, *options: str) -> Path:
    (tmp_path / name).write_text(content)
    arguments = ["--model", "some/model", "--input", str(tmp_path / name), "--output", str(tmp_path / output)]
    embed.main([*arguments, *options])
    return tmp_path / output


def test_lines_to_rows_in_order(calls, tmp_path) -> None:
    path = run(tmp_path, "x.txt", "four\nfifty\nform\ffeed\n", "x.npy", "--instruction", "find", "--dimensions", "2")
    vectors = np.load(path, allow_pickle=False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors[:, 0], [4, 5, 9])
    assert calls == [("some/model", {"instruction": "find", "dimensions": 2, "max_length": None})]
    assert not list(tmp_path.glob("*.tmp"))


def test_catalogue_to_the_references_json(calls, tmp_path, capsys) -> None:
    items = {
        "B1": "four",
        "B2": {"price": 3.0, "brand": "X", "title": "Soap", "main_image": "http://x/y.jpg", "features": ["a", "b"]},
        "B3": {"title": None, "price": 1},
        'B"4': {"title": "é"},
        "B5": None,
    }
    path = run(tmp_path, "items.json", json.dumps(items), "vectors.json")
    document = "Soap\nbrand: X\nfeatures: a, b"
    found = json.loads(path.read_text())
    assert list(found) == ["B1", "B2", 'B"4']
    assert [row[0] for row in found.values()] == [4, len(document), 1]
    assert all(np.float32(row[1]) == np.float32(0.1) for row in found.values())
    assert "2 of 5 items" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "output", "reason"),
    [
        ("x.txt", "a\n\n \nb", "x.npy", "line 2 is empty .2 in all"),
        ("x.txt", "", "x.npy", "line 1 is empty"),
        ("x.txt", "a", "x.json", "needs ids"),
        ("x.txt", "a", "x.csv", "written to .npy or .json"),
        ("x.txt", "a", "none/x.npy", "no such folder"),
        ("x.json", "[1]", "x.npy", "expected an object"),
        ("x.json", "{", "x.npy", "not readable"),
        ("x.json", '{"a": 3}', "x.npy", "entry 'a'"),
        ("x.json", '{"a": {"price": 3}}', "x.npy", "no item has a text"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(calls, tmp_path, name, content, output, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        run(tmp_path, name, content, output)
    assert not calls and not (tmp_path / output).exists()


def test_help_and_unknown_options() -> None:
    command = [sys.executable, "-m", "nqf.embed"]
    root = Path(__file__).parents[1]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=root, check=True)
    assert "--model" in shown.stdout and "Qwen3-Embedding" in shown.stdout
    wrong = subprocess.run([*command, "--modle", "x"], capture_output=True, text=True, cwd=root)
    assert wrong.returncode == 2 and "--model" in wrong.stdout + wrong.stderr
