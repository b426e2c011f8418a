"""LoRA adapters in PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import reprlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nqf.files import read_json, write_json
from nqf.interop.huggingface import Pooling, check_tensors, list_tensors, write_golden
from nqf.interop.tokenizer import Tokenizer
from nqf.interop.torch_file import Tensor, TorchFile
from nqf.models.qwen3 import LORA_TARGETS, Qwen3, Qwen3Config
from nqf.models.trees import flatten

_LOG = logging.getLogger(__name__)
_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_TABLE = re.compile(r"base_model\.model\.(?:model\.)?(?:embed_tokens|lm_head)\.(?:base_layer\.)?weight")
# What peft's "all-linear" takes (every projection but the output's), and what it takes where nothing is said.
_ALL_LINEAR, _DEFAULT_TARGETS = "all-linear", ["q_proj", "v_proj"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern(frame: str, value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(frame.replace("PATTERN", value)))
    except (re.error, OverflowError, RecursionError):
        return False


def _is_names(value: Any, frame: str = "PATTERN") -> bool:
    names = all(isinstance(name, str) for name in value) if isinstance(value, list) else _is_pattern(frame, value)
    return value is None or names


def _is_patterns(value: Any, kind: Callable[[Any], bool]) -> bool:
    ok = isinstance(value, dict) and all(_is_pattern(_SUFFIX, key) and kind(value[key]) for key in value)
    return value is None or ok


# Where peft looks for a name: in `rank_pattern` and `alpha_pattern`, and for a layer's number.
_WHOLE = "PATTERN"
_SUFFIX, _LAYER, _ANY_LAYER = r"(.*\.)?(PATTERN)$", r"(?:^|.*?\.)PATTERN\.(?P<idx>\d+)\.", r".*?\.[^.]*\.(?P<idx>\d+)\."
# Initializations that leave the base as it is. The others subtract from it what A and B start with, or quantize it.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Every key of `adapter_config.json`, as of peft 0.21, is in one of three tables. First, what is read: what it may be.
_READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "'LORA'"),
    "r": (_is_count, "a positive whole number"),
    "lora_alpha": (lambda value: _is_number(value) and value != 0, "a number other than 0"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a share below 1"),
    "use_rslora": (lambda value: value in (True, False, None), "true or false"),
    "rank_pattern": (lambda value: _is_patterns(value, _is_count), "patterns of names with positive whole numbers"),
    "alpha_pattern": (lambda value: _is_patterns(value, _is_number), "patterns of names with numbers"),
    "target_modules": (_is_names, "names or one regular expression"),
    "exclude_modules": (_is_names, "names or one regular expression"),
    "layers_to_transform": (
        lambda value: value is None or all(isinstance(index, int) for index in _listed(value)),
        "numbers of layers",
    ),
    "layers_pattern": (
        lambda value: value is None or all(_is_pattern(_LAYER, pattern) for pattern in _listed(value)),
        "one or more patterns",
    ),
    "init_lora_weights": (
        lambda value: value in _INITIALIZATIONS,
        "an initialization that leaves the base as it is: peft changes the base when it loads this adapter. Write it "
        "with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, or merge it into the base",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
}
# Second, what no number of a loaded adapter depends on: where it comes from, and how it was initialized and trained.
# `bias` and `fan_in_fan_out` have nothing to act on in a Qwen3, `use_qalora` only on a quantized base.
_NEUTRAL = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_qalora",
    "qalora_group_size",
    "fan_in_fan_out",
    "megatron_core",
    "ensure_weight_tying",
    "merge_weights",
)
# Third, what changes numbers in ways that are not implemented. It may only be off, as any key that is not known.
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "megatron_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
)


_SECONDS = 10
# For a process of its own: an expression of a few letters, such as (a+)+$, can take any time, and nothing ends it here.
_MATCH = """
import json, re, sys
patterns, keys = json.load(sys.stdin)
found = [[(re.fullmatch if whole else re.match)(pattern, key) for key in keys] for pattern, whole in patterns]
json.dump([[match and (match.groupdict().get("idx") or "") for match in some] for some in found], sys.stdout)
"""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_off(key: str, value: Any) -> bool:
    # An empty object is not off: peft makes a setting with defaults of it. Where it expects a configuration, only
    # null is off.
    return value is None or ((value is False or value == []) and not key.endswith("_config"))


def _read_config(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    errors = [f"no '{key}'" for key in ("peft_type", "r", "lora_alpha") if key not in tree]
    for key, value in tree.items():
        if key in _READ:
            kind, expected = _READ[key]
            if not kind(value):
                errors.append(f"{key} is {reprlib.repr(value)}, not {expected}")
        elif key not in _NEUTRAL and not _is_off(key, value):
            state = "is not supported" if key in _REFUSED else "is unknown and may change the result"
            errors.append(f"{reprlib.repr(key)[1:-1]} {state} (it is {reprlib.repr(value)})")
    layers, patterns = tree.get("layers_to_transform"), tree.get("layers_pattern")
    if isinstance(tree.get("target_modules"), str) and (layers is not None or patterns is not None):
        errors.append("target_modules is one regular expression, which excludes layers_to_transform and layers_pattern")
    if patterns and layers is None:
        errors.append("layers_pattern without layers_to_transform")
    if errors:
        raise ValueError(f"{path}: " + "; ".join(errors))
    return tree


Match = Callable[[str, str, str], str | None]


def _matcher(path: Path, tree: Mapping[str, Any], keys: Sequence[str]) -> Match:
    """Matches the patterns of a configuration as peft does, but ends one that would take years.

    Returns:
      Frame, pattern and name to None, or to the layer's number that is in the match, empty without one.

    Raises:
      ValueError: They take too long.
    """
    whole = tree.get("target_modules"), tree.get("exclude_modules")
    asked = [(_WHOLE, value) for value in whole if isinstance(value, str)]
    asked += [(_LAYER, value) for value in _listed(tree.get("layers_pattern") or [])]
    asked += [(_SUFFIX, value) for name in ("rank_pattern", "alpha_pattern") for value in tree.get(name) or {}]
    if not asked:
        return lambda frame, pattern, key: None
    patterns = [(frame.replace("PATTERN", value), frame == _WHOLE) for frame, value in asked]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, keys]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{path}: patterns that take more than {_SECONDS} s to match names such as {keys[0]} "
            f"({reprlib.repr([value for _, value in asked])}); write the names out"
        ) from None
    table = dict(zip(asked, json.loads(done.stdout), strict=True))
    at = {key: place for place, key in enumerate(keys)}
    return lambda frame, pattern, key: table[frame, pattern][at[key]]


def _is_targeted(tree: Mapping[str, Any], key: str, match: Match) -> bool:
    """Whether peft puts an adapter on a projection (as `peft.tuners.tuners_utils.check_target_module_exists`)."""
    excluded, targets = tree.get("exclude_modules") or [], tree.get("target_modules")
    if isinstance(excluded, str) and match(_WHOLE, excluded, key) is not None:
        return False
    if isinstance(excluded, list) and any(f".{key}".endswith(f".{name}") for name in excluded):
        return False
    if isinstance(targets, str):
        return targets.lower() == _ALL_LINEAR or match(_WHOLE, targets, key) is not None
    targets, layers = _DEFAULT_TARGETS if targets is None else targets, tree.get("layers_to_transform")
    if key in targets or not any(key.endswith(f".{name}") for name in targets):
        return key in targets
    if layers in (None, []):
        return True
    patterns = _listed(tree.get("layers_pattern") or [])
    found = [match(_LAYER, pattern, key) for pattern in patterns]
    if not patterns and (usual := re.match(_ANY_LAYER, key)):
        found = [usual["idx"]]
    layer = next((layer for layer in found if layer is not None), None)
    return layer is not None and int(layer) in _listed(layers)


def _by_pattern(tree: Mapping[str, Any], name: str, key: str, default: Any, match: Match) -> Any:
    patterns = tree.get(name) or {}
    return next((patterns[value] for value in patterns if match(_SUFFIX, value, key) is not None), default)


def _open(folder: Path) -> tuple[Path, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The file of weights that peft would take, shapes of its tensors, and a function that reads one."""
    path = folder / _PICKLE
    if (folder / _WEIGHTS).is_file() or not path.is_file():
        path = folder / _WEIGHTS
        files = list_tensors([path])
        shapes = {name: file.shape for name, file in files.items()}
        return path, shapes, lambda name: np.concatenate([block for _, block in files[name].blocks()])
    with TorchFile(path) as file:
        tree = file.tree if isinstance(file.tree, dict) else {"": file.tree}
        others = [name for name, tensor in tree.items() if not isinstance(tensor, Tensor)]
        if others:
            raise ValueError(f"{path}: {reprlib.repr(others)} are no tensors; this is not an adapter as peft writes it")
        arrays = {str(name): file.read(tensor) for name, tensor in tree.items()}
    return path, {name: array.shape for name, array in arrays.items()}, arrays.__getitem__


def _abstract(config: Qwen3Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return flatten(jax.eval_shape(lambda ids: Qwen3(config).init(jax.random.key(0), ids)["lora"], ids))


def _name(path: tuple[str, ...], layer: int, prefix: str) -> str:
    return f"{prefix}layers.{layer}.{path[1]}.{path[2]}.lora_{path[3][-1].upper()}.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """Adapter of one projection of one layer: names of its tensors, rank, and what B A is multiplied by."""

    path: tuple[str, ...]
    layer: int
    names: tuple[str, str]
    rank: int
    scale: float


def _parts(
    path: Path, tree: Mapping[str, Any], config: Qwen3Config, shapes: Mapping[str, tuple[int, ...]]
) -> list[_Part]:
    """The adapters that the configuration asks for and the file holds.

    Raises:
      ValueError: Tensors that are missing, surplus or of another shape.
    """
    # Patterns are matched against names as in the model that was trained: a bare decoder, or one under `model.`.
    prefix = _PREFIX + ("model." if any(name.startswith(f"{_PREFIX}model.") for name in shapes) else "")
    abstract = _abstract(dataclasses.replace(config, lora_rank=1, lora_targets=LORA_TARGETS))
    root = math.sqrt if tree.get("use_rslora") else float
    parts, expected, absent, layers = [], {}, [], range(config.num_hidden_layers)
    projections = sorted({path[:-1] for path in abstract})

    def key_of(name: str) -> str:
        return name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")

    keys = [key_of(_name((*where, "lora_a"), layer, prefix)) for where in projections for layer in layers]
    match = _matcher(path.with_name("adapter_config.json"), tree, keys)
    for where in projections:
        (_, wide, _), (_, _, out) = (abstract[*where, matrix].shape for matrix in ("lora_a", "lora_b"))
        for layer in layers:
            a, b = (_name((*where, matrix), layer, prefix) for matrix in ("lora_a", "lora_b"))
            key = key_of(a)
            if not _is_targeted(tree, key, match):
                continue
            if a not in shapes and b not in shapes:
                absent.append(key)
                continue
            rank = _by_pattern(tree, "rank_pattern", key, tree["r"], match)
            # Rank-stabilized LoRA divides alpha by the root of the rank (arXiv 2312.03732).
            scale = _by_pattern(tree, "alpha_pattern", key, tree["lora_alpha"], match) / root(rank)
            parts.append(_Part(path=where, layer=layer, names=(a, b), rank=rank, scale=scale))
            expected |= {a: (rank, wide), b: (out, rank)}
    if not parts:
        raise ValueError(
            f"{path}: no adapter of a Qwen3 projection ({', '.join(LORA_TARGETS)}) that target_modules names, under "
            f"the names that peft writes, e.g. {_PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
        )
    check_tensors(expected, shapes, where=str(path))
    if absent:
        message = f"{len(absent)} of {len(absent) + len(parts)} projections that target_modules names are not in it"
        if tree.get("init_lora_weights", True) not in (True, "gaussian", "eva"):
            raise ValueError(f"{path}: {message} ({reprlib.repr(absent)}), and this initialization changes them")
        _LOG.warning("%s: %s (%s); they stay those of the base, as in peft", path, message, reprlib.repr(absent))
    return parts


def load_adapter(
    folder: str | Path, config: Qwen3Config, *, ignore_embeddings: bool = False
) -> tuple[Qwen3Config, dict[str, Any]]:
    """Reads a PEFT adapter folder: what peft makes of it on the same base, or an error.

    All projections get one rank, the largest, and one scale. A lower rank (`rank_pattern`) is filled with zeros, which
    stay zeros in training; another scale (`alpha_pattern`) goes into B; where the adapter leaves out a projection of
    some layers, it is zeros.

    Args:
      folder: Local folder.
      config: Configuration of the base.
      ignore_embeddings: Leave out whole embedding tables that the folder holds (peft writes them when the
        vocabulary was resized) instead of refusing it. UniRec's placeholders are such rows, always overwritten.

    Returns:
      The configuration with rank, alpha, dropout and targets, and the `lora` collection, float32.

    Raises:
      ValueError: No adapter, a key of `adapter_config.json` that is not understood or may change the result, or
        tensors that do not fit the base and the configuration; all of them are named.
    """
    folder = Path(folder)
    tree = _read_config(folder / "adapter_config.json")
    path, shapes, read = _open(folder)
    if ignore_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if not _TABLE.fullmatch(name)}
    parts = _parts(path, tree, config, shapes)
    rank, root = max(part.rank for part in parts), math.sqrt if tree.get("use_rslora") else float
    found = {part.path[-1] for part in parts}
    config = dataclasses.replace(
        config,
        lora_rank=rank,
        lora_alpha=tree["lora_alpha"] * rank / root(tree["r"]),
        lora_dropout=float(tree.get("lora_dropout", 0.0)),
        lora_targets=tuple(name for name in LORA_TARGETS if name in found),
    )
    lora = {path: np.zeros(leaf.shape, np.float32) for path, leaf in _abstract(config).items()}
    for part in parts:
        a, b = (lora[*part.path, matrix][part.layer] for matrix in ("lora_a", "lora_b"))
        a[:, : part.rank] = read(part.names[0]).T
        b[: part.rank] = read(part.names[1]).T
        b *= np.float32(part.scale / config.lora_scale)
    return config, traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in lora.items()})


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
        for path, leaf in flatten(lora).items()
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
    write_json(folder / "adapter_config.json", tree)


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
