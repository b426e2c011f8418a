"""Loads BERT text encoders (MiniLM, BGE, E5) from Hugging Face folders with sentence-transformers' settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nqf.interop.tensors import assemble, layer_norm, linear, open_tensors, read_json, resolve_folder
from nqf.models.bert import Bert, BertConfig
from nqf.ops.products import DotGeneral

# Heads that sentence vectors do not need, and constant positions that old files hold.
_UNUSED = r"(pooler|cls)\..*|embeddings\.position_ids"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """How token vectors become a text's vector.

    Attributes:
      pooling: `mean` over tokens or `cls`, the first token's vector.
      normalize: Whether vectors are brought to unit norm.
      max_length: Longest text in tokens, special tokens included; longer ones are cut.
      lower_case: Whether texts are lower-cased before the tokenizer sees them.
      prompt: Put before every text (`default_prompt_name`).
    """

    pooling: str
    normalize: bool
    max_length: int
    lower_case: bool = False
    prompt: str = ""


def load_bert(
    name: str | Path, *, dtype: Any = jnp.float32, dot_general: DotGeneral = None
) -> tuple[Bert, dict[str, Any], SentenceSettings]:
    """Loads a BERT text encoder.

    Args:
      name: Local folder or hub name.
      dtype: Type of the parameters and of the computation.
      dot_general: The projections' product; see `nqf.models.bert.Bert`.

    Returns:
      The module, its parameters and the folder's sentence settings.

    Raises:
      ValueError: Another model, unreadable files, or tensors that do not fit; all of them are named.
    """
    folder = resolve_folder(name)
    try:
        config = BertConfig.from_hf(read_json(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    shapes, read = open_tensors(folder)
    # Folders saved with a head have every tensor of the encoder under `bert.`.
    prefix = "bert." if any(key.startswith("bert.") for key in shapes) else ""
    full_names = {key.removeprefix(prefix): key for key in shapes}
    module = Bert(config=config, dtype=dtype, dot_general=dot_general)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = assemble(
        bert_table(config),
        jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"],
        {key: shapes[full] for key, full in full_names.items()},
        lambda key: read(full_names[key]),
        where=str(folder),
        ignore=_UNUSED,
        dtype=dtype,
    )
    return module, params, sentence_settings(folder, config.max_position_embeddings)


def bert_table(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Table of `nqf.models.bert.Bert` for `nqf.interop.tensors`."""
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    table = {f"embeddings.{name}.weight": (name, "embedding") for name in names}
    table |= layer_norm("embeddings.LayerNorm", ("embedding_norm",))
    for layer in range(config.num_hidden_layers):
        source, attention, output = f"encoder.layer.{layer}", f"layer_{layer}_attention", f"layer_{layer}_output"
        for name in ("query", "key", "value"):
            table |= linear(f"{source}.attention.self.{name}", (attention, name))
        table |= linear(f"{source}.attention.output.dense", (attention, "dense"))
        table |= layer_norm(f"{source}.attention.output.LayerNorm", (attention, "LayerNorm"))
        table |= linear(f"{source}.intermediate.dense", (output, "intermediate"))
        table |= linear(f"{source}.output.dense", (output, "dense"))
        table |= layer_norm(f"{source}.output.LayerNorm", (output, "LayerNorm"))
    return table


def sentence_settings(folder: Path, positions: int) -> SentenceSettings:
    """Reads `modules.json`, the pooling's `config.json` and `sentence_bert_config.json`.

    Args:
      folder: Model folder. Without `modules.json`, sentence-transformers pools by the mean and does not normalise.
      positions: Longest text that the model has positions for, in tokens.

    Raises:
      ValueError: A module or a pooling other than mean and first token; it would give other vectors.
    """
    pooling, normalize, prompt = "mean", False, ""
    path = folder / "modules.json"
    if path.is_file():
        try:
            modules = [
                (str(entry["type"]).rsplit(".", 1)[-1], entry["path"]) for entry in json.loads(path.read_bytes())
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a list of modules ({error!r})") from error
        for kind, where in modules:
            if kind == "Pooling":
                pooling = _pooling(folder / where / "config.json")
            elif kind not in ("Transformer", "Normalize"):
                raise ValueError(f"{path}: module '{kind}' is not supported")
        normalize = any(kind == "Normalize" for kind, _ in modules)
    limits = folder / "sentence_bert_config.json"
    limits = read_json(limits) if limits.is_file() else {}
    prompts = folder / "config_sentence_transformers.json"
    prompts = read_json(prompts) if prompts.is_file() else {}
    if prompts.get("default_prompt_name"):
        prompt = prompts["prompts"][prompts["default_prompt_name"]]
    return SentenceSettings(
        pooling=pooling,
        normalize=normalize,
        max_length=min(limits.get("max_seq_length") or positions, positions),
        lower_case=bool(limits.get("do_lower_case", False)),
        prompt=prompt,
    )


def _pooling(path: Path) -> str:
    # Most folders have a flag per mode, some name the mode.
    config = read_json(path)
    chosen = {key.removeprefix("pooling_mode_") for key, value in config.items() if value is True} - {"include_prompt"}
    if isinstance(config.get("pooling_mode"), str):
        chosen = {config["pooling_mode"]}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}
    if len(chosen) != 1 or not chosen <= set(names):
        raise ValueError(f"{path}: pooling {', '.join(sorted(chosen)) or 'unknown'} is neither mean nor first token")
    return names[chosen.pop()]
