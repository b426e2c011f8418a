"""Every dense Qwen3 and Qwen3-Embedding that is published: its config.json as it stands there, its folder by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from nqf.interop.huggingface import load_qwen3  # noqa: E402
from nqf.interop.settings import check_qwen3, check_sizes  # noqa: E402
from nqf.models.qwen3 import Qwen3Config  # noqa: E402

# Of the config.json files on the hub: width, feed-forward width, layers, heads, rows, whether embeddings are tied.
PUBLISHED = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 151_936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 151_936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 151_936, True),
    "Qwen3-8B": (4096, 12_288, 36, 32, 151_936, False),
    "Qwen3-14B": (5120, 17_408, 40, 40, 151_936, False),
    "Qwen3-32B": (5120, 25_600, 64, 64, 151_936, False),
    "Qwen3-Embedding-0.6B": (1024, 3072, 28, 16, 151_669, True),
    "Qwen3-Embedding-4B": (2560, 9728, 36, 32, 151_665, True),
    "Qwen3-Embedding-8B": (4096, 12_288, 36, 32, 151_665, False),
}
SHRUNK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "head_dim": 16,
}


def published(name: str) -> dict[str, Any]:
    """The keys that these files have."""
    width, mlp, layers, heads, rows, tied = PUBLISHED[name]
    embedding = "Embedding" in name
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643 if embedding else 151_645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 32_768 if name == "Qwen3-Embedding-0.6B" else 40_960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3" if embedding else "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": rows,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_configuration_is_the_one_of_that_name(name: str) -> None:
    tree, where = published(name), Path(name) / "config.json"
    check_sizes(tree, where=where)
    check_qwen3(tree, where)
    named = getattr(Qwen3Config, name.lower().replace("-", "_").replace(".", "_"))
    assert Qwen3Config.from_hf(tree) == named()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_its_folder_is_read_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the hub's cache lays a repository that was downloaded.
    repository = tmp_path / f"models--Qwen--{name}"
    folder = repository / "snapshots" / "0123456789abcdef"
    tree = published(name) | SHRUNK
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**tree)
    # Embedding models are saved as bare decoders, untied ones without the projection.
    kind = transformers.Qwen3Model if "Embedding" in name else transformers.Qwen3ForCausalLM
    kind(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(tree))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(folder.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    module, params = load_qwen3(f"Qwen/{name}")
    ids = np.random.default_rng(0).integers(0, 90, (2, 7))
    # Read again: a model that was bfloat16 for a moment has lost digits of its rotary frequencies.
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    decoder = model if "Embedding" in name else model.model
    with torch.no_grad():
        expected = decoder(input_ids=torch.tensor(ids)).last_hidden_state
    np.testing.assert_allclose(module.apply({"params": params}, ids), expected, atol=1e-4)
    assert ("lm_head" in params) == (kind is transformers.Qwen3ForCausalLM and not tree["tie_word_embeddings"])
