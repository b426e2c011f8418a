"""Qwen3 in Hugging Face folders: loading, saving, merged exports, golden vectors and the embedding self-test."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Sharding

from nqf.files import read_json
from nqf.interop.settings import check_qwen3, check_sizes
from nqf.interop.tensors import GOLDEN, GOLDEN_TEXTS, TensorFile, list_tensors, resolve_folder, weight_files
from nqf.interop.tokenizer import Tokenizer
from nqf.models.lora import merge_lora
from nqf.models.qwen3 import Qwen3, Qwen3Config
from nqf.models.trees import flatten
from nqf.ops.pooling import last_token_pool, mean_pool

Pooling = Literal["last", "mean"]
# Size of a shard: the default of transformers' save_pretrained was 5 GB for years.
_SHARD = 5 * 10**9
_LISTED = 40
# What sentence-transformers calls the poolings.
_POOLING_FLAGS = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # XLA's CPU backend takes an array over without a copy where it starts at a multiple of 64 bytes.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_part(
    sources: Sequence[TensorFile], path: tuple[str, ...], shape: tuple[int, ...], index: Any, dtype: Any
) -> np.ndarray:
    """The part `index`, a slice of every axis, of a parameter, read straight into its type and layout."""
    ranges = [range(size)[part] for part, size in zip(index, shape, strict=True)]
    host = _aligned_empty(tuple(map(len, ranges)), np.dtype(dtype))
    stacked = path[0] == "layers"
    rows, *others = index[1:] if stacked else index
    if path[-1] == "kernel":
        # `Linear` weights are [out, in], kernels [in, out].
        rows, others = others[0], [rows]
    layers = ranges[0] if stacked else [0]
    for target, layer in zip(host if stacked else [host], layers, strict=True):
        target = target.T if path[-1] == "kernel" else target
        for place, block in sources[layer].blocks(rows):
            target[place] = block[:, *others]
    return host


def _abstract(config: Qwen3Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    model = Qwen3(dataclasses.replace(config, lora_rank=0))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, method="init_all"), ids)
    return flatten(shapes["params"])


def source_names(path: tuple[str, ...], layers: int, *, prefix: str) -> list[str]:
    """Hugging Face names of the tensors that a parameter is made of: one, or one per layer."""
    if path[0] == "layers":
        return [f"{prefix}layers.{layer}.{'.'.join(path[1:-1])}.weight" for layer in range(layers)]
    return [("" if path[0] == "lm_head" else prefix) + ".".join(path[:-1]) + ".weight"]


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Compares names and shapes.

    Raises:
      ValueError: Missing, surplus and wrongly shaped tensors, all in one message.
    """
    errors = [f"missing {name} {shape}" for name, shape in expected.items() if name not in found]
    errors += [f"surplus {name} {shape}" for name, shape in found.items() if name not in expected]
    errors += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if errors:
        shown = errors[:_LISTED] + ([f"... and {len(errors) - _LISTED} more"] if len(errors) > _LISTED else [])
        raise ValueError(f"{where}: {len(errors)} tensors do not fit the configuration:\n  " + "\n  ".join(shown))


def load_qwen3(
    name: str | Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None = None,
) -> tuple[Qwen3, dict[str, Any]]:
    """Loads a dense Qwen3 or Qwen3-Embedding.

    Each parameter is read straight into its final type and place; no second copy of the model is made in host memory.
    A process reads the parts that its own devices hold.

    Args:
      name: Local folder or hub name.
      dtype: Type of the parameters and of the computation.
      sharding: Where parameters go: one sharding, or a function of a parameter's path and shape; the default
        device if None.

    Returns:
      The module and its parameters: `model.apply({"params": params}, input_ids, attention_mask)` are the hidden
      states after the final norm.

    Raises:
      ValueError: Another model, unreadable files, or tensors that do not fit; all of them are named.
    """
    folder = resolve_folder(name)
    where = folder / "config.json"
    tree = read_json(where)
    check_sizes(tree, where=where)
    try:
        config = Qwen3Config.from_hf(tree, dtype=dtype, param_dtype=dtype)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        # The last three come of values that are not of their kind.
        raise ValueError(f"{where}: {error}") from error
    check_qwen3(tree, where)
    tensors = list_tensors(weight_files(folder))
    # Models saved with an output projection have the decoder under `model.`.
    prefix = "model." if any(key.startswith("model.") for key in tensors) else ""
    abstract = _abstract(config)
    head = ("lm_head", "kernel")
    if head in abstract and not prefix and "lm_head.weight" not in tensors:
        del abstract[head]  # An untied embedding model, saved without the projection that it does not use.
    if head not in abstract:
        tensors.pop("lm_head.weight", None)  # A second copy of a tied embedding.
    sources = {path: source_names(path, config.num_hidden_layers, prefix=prefix) for path in abstract}
    expected = {}
    for path, names in sources.items():
        shape = abstract[path].shape[1:] if path[0] == "layers" else abstract[path].shape
        expected |= dict.fromkeys(names, shape[::-1] if path[-1] == "kernel" else shape)
    check_tensors(expected, {key: tensor.shape for key, tensor in tensors.items()}, where=str(folder))

    params = {}
    for path, names in sources.items():
        shape = abstract[path].shape
        read = functools.partial(_read_part, [tensors[name] for name in names], path, shape, dtype=dtype)
        place = sharding(path, shape) if callable(sharding) else sharding
        if place is None:
            array = jax.device_put(read((slice(None),) * len(shape)))
        else:
            array = jax.make_array_from_callback(shape, place, read)
        # Waited for, so that one parameter at a time is in host memory on its way to an accelerator.
        params[path] = jax.block_until_ready(array)
    return Qwen3(config), traverse_util.unflatten_dict(params)


def hf_config(config: Qwen3Config, *, architecture: str, dtype: Any) -> dict[str, Any]:
    """The content of `config.json`, with the rotary base in the older and in the newer form."""
    return {
        "architectures": [architecture],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": 32_768,
        "attention_bias": False,
        "torch_dtype": jnp.dtype(dtype).name,
    }


def save_qwen3(
    folder: str | Path,
    config: Qwen3Config,
    params: Any,
    *,
    dtype: Any = None,
    extra_config: Mapping[str, Any] | None = None,
    shard_bytes: int = _SHARD,
) -> None:
    """Writes `config.json` and `.safetensors` files that `transformers` loads.

    Args:
      folder: Where to.
      config: The model's configuration.
      params: Its parameters; adapters are not written (see `export_merged`).
      dtype: Type of the tensors; the embedding's by default.
      extra_config: Further keys of `config.json`, e.g. `eos_token_id`.
      shard_bytes: Most bytes of a file, if a tensor fits; memory beside the parameters stays below it.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten(params)
    dtype = np.dtype(dtype or flat["embed_tokens", "embedding"].dtype)
    # Without the projection that an untied model needs for logits, it can only be loaded as the bare decoder.
    with_head = config.tie_word_embeddings or ("lm_head", "kernel") in flat
    names = {path: source_names(path, config.num_hidden_layers, prefix="model." if with_head else "") for path in flat}
    plan: list[list[tuple[str, tuple[str, ...], int]]] = [[]]
    used = total = 0
    for path, sources in names.items():
        size = flat[path].size // len(sources) * dtype.itemsize
        for layer, name in enumerate(sources):
            if plan[-1] and used + size > shard_bytes:
                plan.append([])
                used = 0
            plan[-1].append((name, path, layer))
            used, total = used + size, total + size

    files = {}
    for number, entries in enumerate(plan, 1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        shard = {}
        for key, path, layer in entries:
            array = np.asarray(flat[path][layer] if path[0] == "layers" else flat[path])
            shard[key] = np.ascontiguousarray((array.T if path[-1] == "kernel" else array).astype(dtype))
            files[key] = name
        save_file(shard, folder / name, metadata={"format": "pt"})
    # Beside a single file too: without it, vLLM takes every .safetensors file of a folder for weights.
    index = {"metadata": {"total_size": total}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)
    tree = hf_config(config, architecture="Qwen3ForCausalLM" if with_head else "Qwen3Model", dtype=dtype)
    _write_json(folder / "config.json", tree | dict(extra_config or {}))


def export_merged(
    folder: str | Path,
    model: Qwen3,
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    golden: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
    pooling: Pooling = "last",
    dtype: Any = jnp.float32,
) -> None:
    """Writes a folder that `transformers` and sentence-transformers load, adapters merged in float32.

    Args:
      folder: Where to.
      model: The module.
      variables: `params` and, with adapters, `lora`.
      tokenizer: Its tokenizer.
      golden: Inputs of `golden.safetensors`, for `write_golden`; without them there is no such file.
      texts: Texts whose ids and vectors go to `golden_texts.safetensors`; without them there is no such file.
      pooling: How a text's vector is made.
      dtype: Type of the tensors, after the merge.
    """
    folder, config = Path(folder), model.config
    params = variables["params"]
    if config.lora_rank:
        params = merge_lora(params, variables["lora"], scale=config.lora_scale)
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    save_qwen3(folder, config, params, dtype=dtype, extra_config=ends)
    tokenizer.save(folder)
    write_sentence_config(folder, config.hidden_size, pooling=pooling)
    merged = Qwen3(dataclasses.replace(config, lora_rank=0))
    if golden is not None:
        write_golden(folder, merged, {"params": params}, golden, pooling=pooling)
    if texts:
        inputs = text_inputs(tokenizer, texts)
        write_golden(folder, merged, {"params": params}, inputs, pooling=pooling, texts=texts)


def write_sentence_config(folder: Path, width: int, *, pooling: Pooling = "last", max_length: int = 8_192) -> None:
    """Writes what sentence-transformers reads: modules, pooling, unit norm and the longest text in tokens."""
    package = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"} for i, (path, kind) in enumerate(modules)
    ]
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pool = {f"pooling_mode_{flag}": f"pooling_mode_{flag}" == _POOLING_FLAGS[pooling] for flag in flags}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write_json(folder / "modules.json", entries)
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pool, "include_prompt": True}
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def text_inputs(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    *,
    side: Literal["left", "right"] = "right",
) -> dict[str, np.ndarray]:
    """Texts with their end tokens as `input_ids` and `attention_mask`, int32 [n, T] each, padded to the longest."""
    encoded = tokenizer.encode(texts, max_length=max_length, add_eos=True)
    length = max(map(len, encoded))
    ids = np.full((len(encoded), length), tokenizer.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        at = slice(length - len(tokens), length) if side == "left" else slice(len(tokens))
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def pooled_vectors(
    model: Qwen3, variables: Mapping[str, Any], inputs: Mapping[str, Any], *, pooling: Pooling = "last"
) -> np.ndarray:
    """Unit vectors of some inputs.

    Args:
      model: The module.
      variables: Its variables.
      inputs: Arguments of `Qwen3.__call__`, `attention_mask` among them.
      pooling: How a sequence's vector is made.

    Returns:
      float32 [B, D].
    """
    vectors = _pooled(model, pooling, variables, dict(inputs))
    # Where the model is split over processes, each has a part of what follows from it.
    return np.asarray(vectors if vectors.is_fully_addressable else process_allgather(vectors, tiled=True))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(model: Qwen3, pooling: Pooling, variables: Any, inputs: dict[str, Any]) -> jax.Array:
    hidden_BxTxD = cast(jax.Array, model.apply(variables, **inputs)).astype(jnp.float32)
    pool = last_token_pool if pooling == "last" else mean_pool
    vectors_BxD = pool(hidden_BxTxD, inputs["attention_mask"])
    return vectors_BxD / jnp.maximum(jnp.linalg.norm(vectors_BxD, axis=-1, keepdims=True), 1e-12)


def write_golden(
    folder: str | Path,
    model: Qwen3,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    pooling: Pooling = "last",
    texts: Sequence[str] = (),
) -> None:
    """Writes inputs and the unit vectors that a loader must get from them.

    Args:
      folder: Where to.
      model: The module.
      variables: Its variables.
      inputs: Arguments of `Qwen3.__call__`, `attention_mask` among them; boolean masks are stored as uint8.
      pooling: How a sequence's vector is made; it is in the file's metadata.
      texts: What the inputs are the ids of, if they are texts; then the file is `golden_texts.safetensors` instead of
        `golden.safetensors` and its metadata holds them, as a JSON list.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    stored = {
        name: np.ascontiguousarray(value.astype(np.uint8 if value.dtype == bool else value.dtype))
        for name, value in arrays.items()
    }
    stored["vectors"] = pooled_vectors(model, variables, arrays, pooling=pooling)
    metadata = {"pooling": pooling, "normalized": "true"} | ({"texts": json.dumps(list(texts))} if texts else {})
    save_file(stored, Path(folder) / (GOLDEN_TEXTS if texts else GOLDEN), metadata=metadata)


def golden_difference(folder: str | Path, model: Qwen3, variables: Mapping[str, Any], *, name: str = GOLDEN) -> float:
    """The largest absolute difference between a folder's golden vectors and those of a loaded model.

    Raises:
      ValueError: No golden file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / name
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            pooling = file.metadata()["pooling"]
        vectors = arrays.pop("vectors")
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not readable as golden inputs and vectors ({error})") from error
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"].astype(bool)
    return float(np.max(np.abs(pooled_vectors(model, variables, arrays, pooling=pooling) - vectors)))


def check_embedding(folder: str | Path, model: Qwen3, params: Any, tokenizer: Tokenizer) -> None:
    """Self-test of an embedding model at load time: what it refuses would rank badly without any error.

    Checks that the folder asks for last-token pooling, that the vocabulary fits the embedding, that a text ends in
    exactly one end token even when it is cut, that vectors do not depend on padding, and that they tell texts apart.

    Raises:
      ValueError: Names what failed.
    """
    folder = Path(folder)
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        tree = read_json(pooling)
        asked = [key.removeprefix("pooling_mode_") for key, value in tree.items() if value is True]
        asked = [tree["pooling_mode"]] if isinstance(tree.get("pooling_mode"), str) else asked
        if "lasttoken" not in asked:
            raise ValueError(f"{pooling}: Qwen3 embeddings are the last token's vectors; this asks for {asked}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {model.config.vocab_size} rows"
        )
    texts = ["cup", "the history of the northern railways, in three volumes"]
    for limit in (None, 3):
        for tokens in tokenizer.encode(texts, max_length=limit, add_eos=True):
            if tokens[-1] != tokenizer.eos_id or tokens.count(tokenizer.eos_id) != 1:
                raise ValueError(f"{folder}: a text does not end in exactly one end token {tokenizer.eos_id}")
    variables = {"params": params}
    right, left = (
        pooled_vectors(model, variables, text_inputs(tokenizer, texts, side=side)) for side in ("right", "left")
    )
    alone = np.concatenate([pooled_vectors(model, variables, text_inputs(tokenizer, [text])) for text in texts])
    # Bfloat16 keeps 8 bits; sums in another order differ by a few of the last.
    exact = jnp.dtype(model.config.dtype) == jnp.float32 and model.config.dot_general is None
    tolerance = 1e-4 if exact else 3e-2
    for side, vectors in (("right", right), ("left", left)):
        difference = float(np.max(np.linalg.norm(vectors - alone, axis=-1)))
        if not difference <= tolerance:
            raise ValueError(f"{folder}: vectors change by {difference:.2g} with padding on the {side}")
    if np.min(np.linalg.norm(alone - np.roll(alone, 1, axis=0), axis=-1)) <= tolerance:
        raise ValueError(
            f"{folder}: different texts have the same vector; the weights are not those of a trained model"
        )


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
