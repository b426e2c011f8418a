"""Candidate embeddings of the reference system."""

from pathlib import Path

import numpy as np
import pytest

from nqf.data.errors import DataError
from nqf.interop.unirec.embeddings import read_candidate_embeddings, write_candidate_embeddings


def test_embeddings_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"B": [1, 2.5], "A": [-1e-3, 0]}')
    item_ids, vectors = read_candidate_embeddings(tmp_path / "e.json")
    assert item_ids == ["B", "A"]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.float32([[1, 2.5], [-1e-3, 0]]))


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_written_is_read(count: int, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    ids = ['a "quoted" one', "é", "B", "C", "D"][:count]
    write_candidate_embeddings(tmp_path / "e.json", ids, vectors)
    found, again = read_candidate_embeddings(tmp_path / "e.json")
    assert found == ids
    np.testing.assert_array_equal(again, vectors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected an object at the top, found list"),
        ("{}", "there is no embedding"),
        ('{"a": []}', "item 'a': expected some numbers"),
        ('{"a": 1}', "item 'a': expected 1 numbers"),
        ('{"a": [1, 2], "b": [1]}', "item 'b': expected 2 numbers"),
        ('{"a": [1, NaN]}', "item 'a': not all numbers are finite"),
        ('{"a": ["x"]}', "item 'a': not a list of numbers"),
        ('{"a": {"error": "no image"}}', "item 'a': not a list of numbers"),
    ],
)
def test_damage_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_candidate_embeddings(tmp_path / "e.json")
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        read_candidate_embeddings(tmp_path / "nowhere.json")
