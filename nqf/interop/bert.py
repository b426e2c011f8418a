"""Loads BERT text encoders (MiniLM, BGE, E5) from Hugging Face folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nqf.interop.settings import BERT, check_sizes, understood
from nqf.interop.tensors import (
    assemble,
    layer_norm,
    linear,
    list_tensors,
    read_json,
    resolve_folder,
    weight_files,
)
from nqf.models.bert import Bert, BertConfig
from nqf.ops.products import DotGeneral

# Heads that sentence vectors do not need, and constant positions that old files hold.
_UNUSED = r"(bert\.)?((pooler|cls)\..*|embeddings\.position_ids)"

_LAYER_NORM = {"gamma": "weight", "beta": "bias"}


def load_bert(
    name: str | Path, *, dtype: Any = jnp.float32, dot_general: DotGeneral = None
) -> tuple[Bert, dict[str, Any]]:
    """Loads a BERT text encoder.

    Args:
      name: Local folder or hub name.
      dtype: Type of the parameters and of the computation.
      dot_general: The projections' product; see `nqf.models.bert.Bert`.

    Returns:
      The module and its parameters.

    Raises:
      ValueError: Another model, unreadable files, or tensors that do not fit; all of them are named.
    """
    folder = resolve_folder(name)
    where = folder / "config.json"
    tree = read_json(where)
    check_sizes(tree, where=where)
    try:
        config = BertConfig.from_hf(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    understood(tree, BERT, where=where)
    # Folders saved with a head have every tensor of the encoder under `bert.`.
    tensors = list_tensors(weight_files(folder), skip=_UNUSED)
    prefix = "bert." if any(key.startswith("bert.") for key in tensors) else ""
    full_names = {_renamed(key.removeprefix(prefix)): key for key in tensors}
    module = Bert(config=config, dtype=dtype, dot_general=dot_general)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = assemble(
        bert_table(config),
        jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"],
        {key: tensors[full].shape for key, full in full_names.items()},
        lambda key: tensors[full_names[key]].read(),
        where=str(folder),
        dtype=dtype,
    )
    return module, params


def _renamed(name: str) -> str:
    """Scale and shift of old files, named as in TensorFlow, by their names in PyTorch."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_LAYER_NORM[m[1]]}", name)


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
