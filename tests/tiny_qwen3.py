"""Tiny random Qwen3 models of transformers, in folders."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Neither hidden_size / heads nor a divisor of it.
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def random_model(*, causal_lm: bool = True, tied: bool = True, seed: int = 0) -> Any:
    """A model with every parameter random: norms of ones would hide a scale that is mixed up or left out."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager")
    model = (transformers.Qwen3ForCausalLM if causal_lm else transformers.Qwen3Model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.2 if "proj" in name else 1.0)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Saves a model; returns the folder."""
    model.save_pretrained(folder, **options)
    return folder
