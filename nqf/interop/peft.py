"""LoRA adapters in PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nqf.interop.huggingface import Pooling, check_tensors, list_tensors, write_golden
from nqf.interop.tensors import read_json
from nqf.interop.tokenizer import Tokenizer
from nqf.models.qwen3 import LORA_TARGETS, Qwen3, Qwen3Config

_WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight"
)
_EMBEDDING = re.compile(r"base_model\.model\.(?:model\.)?(?:embed_tokens|lm_head)\..*")
# Options of adapter_config.json that change the mathematics and are not implemented.
_REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "lora_bias",
    "trainable_token_indices",
)


def _abstract(config: Qwen3Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return traverse_util.flatten_dict(
        jax.eval_shape(lambda ids: Qwen3(config).init(jax.random.key(0), ids)["lora"], ids)
    )


def _name(path: tuple[str, ...], layer: int, prefix: str) -> str:
    return f"{prefix}layers.{layer}.{path[1]}.{path[2]}.lora_{path[3][-1].upper()}.weight"


def load_adapter(
    folder: str | Path, config: Qwen3Config, *, ignore_embeddings: bool = False
) -> tuple[Qwen3Config, dict[str, Any]]:
    """Reads a PEFT adapter folder.

    Args:
      folder: Local folder.
      config: Configuration of the base.
      ignore_embeddings: Leave out whole embedding tables that the folder holds (peft writes them when the
        vocabulary was resized) instead of refusing it. UniRec's placeholders are such rows, always overwritten.

    Returns:
      The configuration with rank, alpha, dropout and targets, and the `lora` collection, float32.

    Raises:
      ValueError: No adapter, a variant of LoRA that is not implemented, or tensors that do not fit the base; all
        of them are named.
    """
    folder = Path(folder)
    where = folder / "adapter_config.json"
    tree = read_json(where)
    errors = [] if tree.get("peft_type") == "LORA" else [f"peft_type is {tree.get('peft_type')!r}, not 'LORA'"]
    errors += [f"{key} is not supported" for key in _REFUSED if tree.get(key)]
    if tree.get("bias", "none") != "none":
        errors.append(f"bias {tree['bias']!r} is not supported")
    errors += [f"no '{key}'" for key in ("r", "lora_alpha") if key not in tree]
    if errors:
        raise ValueError(f"{where}: " + "; ".join(errors))
    tensors = list_tensors([folder / _WEIGHTS])
    if ignore_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not _EMBEDDING.fullmatch(name)}

    # The targets are read off the tensors: the configuration may name them by a pattern.
    matches = {name: _KEY.fullmatch(name) for name in tensors}
    found = {match[3] for match in matches.values() if match}
    rank = tree["r"]
    config = dataclasses.replace(
        config,
        lora_rank=rank,
        # Rank-stabilized LoRA divides alpha by the root of the rank (arXiv 2312.03732).
        lora_alpha=float(tree["lora_alpha"]) * (math.sqrt(rank) if tree.get("use_rslora") else 1.0),
        lora_dropout=float(tree.get("lora_dropout") or 0.0),
        lora_targets=tuple(name for name in LORA_TARGETS if name in found),
    )
    if not config.lora_targets:
        raise ValueError(f"{folder / _WEIGHTS}: no adapter of a Qwen3 projection ({', '.join(LORA_TARGETS)})")
    abstract, layers, prefix = _abstract(config), config.num_hidden_layers, "base_model.model."
    known = {_canonical(match) if match else name: name for name, match in matches.items()}
    check_tensors(
        {_name(path, layer, prefix): leaf.shape[:0:-1] for path, leaf in abstract.items() for layer in range(layers)},
        {canonical: tensors[name].shape for canonical, name in known.items()},
        where=str(folder / _WEIGHTS),
    )
    lora = {}
    for path, leaf in abstract.items():
        host = np.empty(leaf.shape, np.float32)
        for layer in range(layers):
            for rows, block in tensors[known[_name(path, layer, prefix)]].blocks():
                host[layer].T[rows] = block
        lora[path] = jnp.asarray(host)
    return config, traverse_util.unflatten_dict(lora)


def _canonical(match: re.Match[str]) -> str:
    layer, block, name, matrix = match.groups()
    return _name(("layers", block, name, f"lora_{matrix.lower()}"), int(layer), "base_model.model.")


def save_adapter(
    folder: str | Path, config: Qwen3Config, lora: Any, *, base: str = "", causal_lm: bool = False
) -> None:
    """Writes a PEFT adapter folder.

    Args:
      folder: Where to.
      config: Configuration of the model, with its rank, alpha, dropout and targets.
      lora: The `lora` collection.
      base: Folder or hub name of the base, for `base_model_name_or_path`.
      causal_lm: Whether the adapter is for `Qwen3ForCausalLM` instead of the bare `Qwen3Model`.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model.model." if causal_lm else "base_model.model."
    tensors = {
        _name(path, layer, prefix): np.ascontiguousarray(np.asarray(leaf[layer], np.float32).T)
        for path, leaf in traverse_util.flatten_dict(lora).items()
        for layer in range(config.num_hidden_layers)
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_lm else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.lora_targets),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def export_adapter(
    folder: str | Path,
    model: Qwen3,
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    golden: Mapping[str, Any],
    base: str,
    pooling: Pooling = "last",
) -> None:
    """Writes a PEFT adapter folder with the tokenizer and golden inputs and vectors.

    Args:
      folder: Where to.
      model: The module, with adapters.
      variables: `params` and `lora`.
      tokenizer: Its tokenizer.
      golden: Inputs of the golden file, for `write_golden`.
      base: Folder or hub name of the base.
      pooling: How a sequence's vector is made.

    Raises:
      ValueError: The model has no adapters.
    """
    if not model.config.lora_rank:
        raise ValueError("the model has no adapters; export it as a merged Hugging Face folder")
    save_adapter(folder, model.config, variables["lora"], base=base)
    tokenizer.save(folder)
    write_golden(folder, model, variables, golden, pooling=pooling)
