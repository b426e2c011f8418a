"""Tokenizers: training, end token, cutting, spare ids, and agreement with transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from nqf.interop.tokenizer import (
    END_TOKEN,
    SPARE_TOKENS,
    Tokenizer,
    load_text_tokenizer,
    load_tokenizer,
    text_encoder,
    train_byte_bpe,
)

TEXTS = ["The deep sea lamp", "deep deep sea", "a lamp for the deep sea, it's 1234", "Größe 日本\n\n  two  spaces"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_byte_bpe(iter(TEXTS * 4), 320)


@pytest.fixture
def folder(trained: Tokenizer, tmp_path: Path) -> Path:
    trained.save(tmp_path)
    return tmp_path


def test_any_text_survives(trained: Tokenizer) -> None:
    for text in [*TEXTS, "never seen: żółć 🦑 \x00\t", ""]:
        assert trained.decode(trained.encode([text])[0]) == text


def test_merges_are_learned(trained: Tokenizer) -> None:
    assert 265 < len(trained) <= 320
    assert len(trained.encode(["deep sea"])[0]) <= 3


def test_training_is_deterministic(trained: Tokenizer, folder: Path, tmp_path: Path) -> None:
    train_byte_bpe(iter(TEXTS * 4), 320).save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_save_and_load(trained: Tokenizer, folder: Path) -> None:
    again = load_tokenizer(folder)
    assert again.encode(TEXTS, add_eos=True) == trained.encode(TEXTS, add_eos=True)
    assert (again.eos_id, again.pad_id, again.rows) == (trained.eos_id, trained.pad_id, trained.rows)
    assert again.spare_ids(8) == trained.spare_ids(8)


def test_end_token_exactly_once(trained: Tokenizer) -> None:
    texts = [*TEXTS, "", END_TOKEN, f"a{END_TOKEN}", f"{END_TOKEN}{SPARE_TOKENS[0]} b"]
    for ids in trained.encode(texts, add_eos=True):
        assert ids[-1] == trained.eos_id and ids.count(trained.eos_id) == 1
    for ids in trained.encode(texts):
        assert not {trained.eos_id, *trained.spare_ids(8)} & set(ids)


@pytest.mark.parametrize("length", [1, 3, 50])
def test_cut_text_keeps_its_end_token(trained: Tokenizer, length: int) -> None:
    whole = trained.encode(TEXTS)
    assert min(map(len, whole)) >= 3  # So that lengths 1 and 3 cut every one.
    for cut, full in zip(trained.encode(TEXTS, max_length=length, add_eos=True), whole, strict=True):
        assert cut == [*full[: length - 1], trained.eos_id]
    for cut, full in zip(trained.encode(TEXTS, max_length=length), whole, strict=True):
        assert cut == full[:length]


def test_no_room_for_the_end_token(trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no room for 1 special"):
        trained.encode(["a"], max_length=0, add_eos=True)


def test_spare_ids_are_rows_first_then_special_tokens(folder: Path, trained: Tokenizer) -> None:
    assert trained.rows == len(trained)
    assert [trained.decode([id]) for id in trained.spare_ids(2)] == [SPARE_TOKENS[7], SPARE_TOKENS[6]]
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(trained) + 2}))
    wider = load_tokenizer(folder)
    assert wider.rows == len(trained) + 2
    assert wider.spare_ids(3) == [len(trained), len(trained) + 1, trained.spare_ids(1)[0]]
    with pytest.raises(ValueError, match="10 spare ids, 11 are needed"):
        wider.spare_ids(11)
    assert wider.eos_id not in wider.spare_ids(10)


def test_vocabulary_too_small() -> None:
    with pytest.raises(ValueError, match="below 265"):
        train_byte_bpe(TEXTS, 264)


def test_template_decides_the_end_token(folder: Path, trained: Tokenizer) -> None:
    # As Qwen3-Embedding, whose eos_token is the chat's <|im_end|> while the template appends <|endoftext|>.
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": SPARE_TOKENS[0]}))
    assert load_tokenizer(folder).eos_id == trained.eos_id
    # Without a template it is the eos_token, whether a name or an object.
    tree = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    spare = sorted(trained.spare_ids(8))[0]
    assert load_tokenizer(folder).eos_id == spare
    path.write_text(json.dumps({"eos_token": {"content": SPARE_TOKENS[0]}}))
    assert load_tokenizer(folder).eos_id == spare
    path.write_text("{}")
    with pytest.raises(ValueError, match="neither a template"):
        load_tokenizer(folder)


def test_damaged_and_absent(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not readable"):
        load_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("model_type", [None, "qwen3"])
def test_agrees_with_transformers(folder: Path, model_type: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    texts = [*TEXTS, "", "never seen: żółć 🦑 IT'S"]
    assert theirs(texts)["input_ids"] == ours.encode(texts, add_eos=True)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode(texts)
    cut = theirs(texts, truncation=True, max_length=4)["input_ids"]
    assert cut == ours.encode(texts, max_length=4, add_eos=True)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)


def test_a_pattern_without_end_is_refused(folder: Path, record: Callable[..., None]) -> None:
    """A Split pattern that goes back and forth panics in `tokenizers`, which is no `Exception`."""
    path = folder / "tokenizer.json"
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": pattern}))
    text = "a" * 60 + "b"
    with pytest.raises(ValueError, match=r"its tokenizer cannot read a text .*retry-limit") as raised:
        load_tokenizer(folder).encode([text])
    assert str(raised.value).startswith(str(folder))
    pytest.importorskip("transformers")
    encode = text_encoder(load_text_tokenizer(folder, options={}, max_length=99, lower_case=False), 99, where=folder)
    with pytest.raises(ValueError, match=r"its tokenizer cannot read a text"):
        encode([text])
    record(
        "a pattern in tokenizer.json that goes back and forth over a text without end",
        tried=2,
        survived=2,
        seen="refused with the folder",
    )
