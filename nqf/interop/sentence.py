"""Folders of sentence-transformers: what stands in their settings files, and the modules after the transformer.

Every module and number is that of sentence-transformers 6 (`SentenceTransformer(folder).encode(texts)`); what is not
computed is refused with the file and the key.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.files import read_json
from nqf.interop.settings import ANY, Table, keys, read_understood, understood
from nqf.interop.tensors import list_tensors, weight_files

_LOG = logging.getLogger(__name__)
_PACKAGE = "sentence_transformers."
_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"
# In the order in which their vectors are joined.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# `torch.nn.modules` by the last name; GELU is the exact one.
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}
# `torch.nn.LayerNorm`'s and `torch.nn.functional.normalize`'s.
_NORM_EPS, _UNIT_EPS = 1e-5, 1e-12
_MODEL: Table = {
    "prompts": ANY,
    "default_prompt_name": ANY,
    "truncate_dim": ANY,
    "model_type": ("SentenceTransformer",),
    # Versions, and how vectors are compared.
    **keys("__version__ similarity_fn_name requirements"),
}
_TRANSFORMER: Table = {
    "max_seq_length": ANY,
    "do_lower_case": ANY,
    **keys("model_args model_kwargs tokenizer_args processor_kwargs config_args config_kwargs"),
    "transformer_task": ("feature-extraction",),
    "module_output_name": (_TOKENS,),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    # How batches are packed, and what only `encode_query` and `encode_document` do.
    **keys("unpad_inputs query_length document_length"),
}
# Arguments for the model, its configuration and its tokenizer that change nothing, or that the tokenizer is given.
_ARGUMENTS: dict[str, Table] = {
    "model": keys("trust_remote_code torch_dtype dtype attn_implementation low_cpu_mem_usage"),
    "config": keys("trust_remote_code use_cache torch_dtype dtype attn_implementation"),
    "tokenizer": keys(
        "trust_remote_code use_fast model_max_length truncation_side padding_side do_lower_case "
        "add_eos_token add_bos_token"
    ),
}
_FILES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_INPUTS = {"module_input_name": ANY, "module_output_name": ANY}
_TABLES: dict[str, Table] = {
    "Pooling": keys(f"pooling_mode include_prompt word_embedding_dimension embedding_dimension {' '.join(_FLAGS)}"),
    "Dense": {**keys("in_features out_features bias activation_function use_residual"), **_INPUTS},
    "LayerNorm": keys("dimension"),
    "Normalize": _INPUTS,
    "Dropout": keys("dropout"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A module after the transformer.

    Attributes:
      kind: Its class, without the package.
      settings: What its `config.json` says, defaults filled in.
      weights: Its parameters, float32.
    """

    kind: str
    settings: Mapping[str, Any]
    weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceFolder:
    """What a folder says.

    Attributes:
      transformer: Folder of the transformer and its tokenizer.
      modules: The modules after it.
      max_length: Longest text in tokens that the folder asks for, or None for the tokenizer's and the model's limit.
      tokenizer_options: Arguments for the tokenizer.
      lower_case: Whether texts are lower-cased before the tokenizer's own normalization.
      prompt: Put before every text.
      dimensions: Components kept of each vector (`truncate_dim`), or None for all.
      is_plain: There is no `modules.json`.
    """

    transformer: Path
    modules: Sequence[Module]
    max_length: int | None = None
    tokenizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lower_case: bool = False
    prompt: str = ""
    dimensions: int | None = None
    is_plain: bool = False


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Reads `modules.json` and the files that it leads to.

    Without it, sentence-transformers takes the mean over tokens, or the last token's vector of a causal language
    model, and reads neither prompts nor `sentence_bert_config.json`.

    Raises:
      ValueError: A file that is missing or malformed, or a module, key or value that is not understood.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return _plain_folder(folder)
    where, modules = None, []
    for kind, place in _entries(path):
        if kind == "Transformer" and where is None:
            where = place
        elif where is None or kind not in _TABLES:
            raise ValueError(f"{path}: module '{kind}' is not supported{'' if where else ' as the first one'}")
        else:
            modules.append(_module(kind, place))
    if where is None:
        raise ValueError(f"{path}: has no module 'Transformer'")
    # A module reads what one before it has written.
    known = {_TOKENS}
    for module in modules:
        source, target = _names(module)
        if source in known:
            known.add(target)
        elif module.kind != "Normalize":
            raise ValueError(f"{path}: module '{module.kind}' reads {source!r}, which none before it writes")
    if _SENTENCE not in known:
        raise ValueError(f"{path}: no module makes one vector of a text; there must be a 'Pooling'")
    model = read_understood(folder / "config_sentence_transformers.json", _MODEL)
    names = [where / f"sentence_{name}_config.json" for name in _FILES]
    settings_path = next((name for name in names if name.is_file() and read_json(name)), names[0])
    settings = read_understood(settings_path, _TRANSFORMER)
    arguments = {}
    for part, (older, newer) in zip(
        _ARGUMENTS,
        (("model_args", "model_kwargs"), ("config_args", "config_kwargs"), ("tokenizer_args", "processor_kwargs")),
        strict=True,
    ):
        arguments[part] = settings.get(older) or settings.get(newer) or {}
        understood(arguments[part], _ARGUMENTS[part], where=f"{settings_path}: {older if older in settings else newer}")
    options = {key: value for key, value in arguments["tokenizer"].items() if key != "trust_remote_code"}
    return SentenceFolder(
        transformer=where,
        modules=modules,
        max_length=_count(settings_path, settings, "max_seq_length"),
        tokenizer_options=options,
        lower_case=bool(settings.get("do_lower_case")),
        prompt=_prompt(folder / "config_sentence_transformers.json", model),
        dimensions=_count(folder / "config_sentence_transformers.json", model, "truncate_dim"),
    )


def _plain_folder(folder: Path) -> SentenceFolder:
    unread = ("config_sentence_transformers.json", "sentence_bert_config.json")
    if any((folder / name).is_file() for name in unread):
        _LOG.warning(
            "%s: without modules.json, %s are not read, as in sentence-transformers", folder, " and ".join(unread)
        )
    config = folder / "config.json"
    tree = read_json(config) if config.is_file() else {}
    architectures = tree.get("architectures") or [""]
    causal = str(architectures[0]).endswith("ForCausalLM")
    mode = "lasttoken" if causal else "mean"
    _LOG.warning("%s: no modules.json; a text's vector is the %s, as in sentence-transformers", folder, mode)
    pooling = Module(kind="Pooling", settings={"modes": (mode,), "include_prompt": True})
    return SentenceFolder(transformer=folder, modules=[pooling], is_plain=True)


def _entries(path: Path) -> list[tuple[str, Path]]:
    try:
        entries = json.loads(path.read_bytes())
        found = [
            (str(entry["type"]), str(entry["path"]), str(entry.get("name", at))) for at, entry in enumerate(entries)
        ]
        for entry in entries:
            understood(entry, keys("idx name path type"), where=path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a list of modules ({error})") from error
    if len({name for _, _, name in found}) < len(found):
        raise ValueError(f"{path}: two modules have the same name")
    places = []
    for kind, place, _ in found:
        if not kind.startswith(_PACKAGE):
            raise ValueError(f"{path}: module '{kind}' is code of the folder's own, which is not run")
        relative = PurePosixPath(place.replace("\\", "/"))
        if relative.is_absolute() or ".." in relative.parts or ":" in place:
            raise ValueError(f"{path}: path '{place}' leads out of the folder")
        places.append((kind.rsplit(".", 1)[-1], path.parent / relative))
    return places


def _count(path: Path, tree: Mapping[str, Any], key: str) -> int | None:
    value = tree.get(key)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{path}: {key} is {value!r}, not a positive whole number")
    return value


def _prompt(path: Path, model: Mapping[str, Any]) -> str:
    name, prompts = model.get("default_prompt_name"), model.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{path}: prompts are not an object of texts")
    if name is None:
        others = [key for key, text in prompts.items() if text]
        if others:
            _LOG.warning("%s: no prompt is the default, so none is used; there are %s", path, ", ".join(others)[:200])
        return ""
    if not isinstance(name, str) or name not in {"query", "document", *prompts}:
        raise ValueError(f"{path}: default_prompt_name {name!r} is none of the prompts")
    return prompts.get(name) or ""


def _module(kind: str, folder: Path) -> Module:
    path = folder / "config.json"
    tree = read_understood(path, _TABLES[kind])
    if kind == "Pooling":
        return Module(kind=kind, settings=_pooling(path, tree))
    if kind in ("Normalize", "Dropout"):
        return Module(kind=kind, settings=tree)
    required = ("in_features", "out_features") if kind == "Dense" else ("dimension",)
    sizes = [_count(path, tree, key) for key in required]
    if None in sizes:
        raise ValueError(f"{path}: no {' and '.join(required)}")
    if kind == "LayerNorm":
        expected: dict[str, tuple[Any, ...]] = {"norm.weight": (sizes[0],), "norm.bias": (sizes[0],)}
    else:
        expected = {"linear.weight": (sizes[1], sizes[0])}
        if tree.get("bias", True):
            expected["linear.bias"] = (sizes[1],)
        if tree.get("use_residual") and sizes[0] != sizes[1]:
            expected["residual.weight"] = (sizes[1], sizes[0])
        name = tree.get("activation_function", "torch.nn.modules.activation.Tanh")
        if not isinstance(name, str) or not name.startswith("torch.nn.") or name.rsplit(".", 1)[-1] not in _ACTIVATIONS:
            raise ValueError(
                f"{path}: activation_function is {name!r}; computed are {', '.join(_ACTIVATIONS)} of torch.nn"
            )
        tree = {**tree, "activation_function": name.rsplit(".", 1)[-1]}
    tensors = list_tensors(weight_files(folder))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{folder}: weights are {reprlib.repr(found)}, and {path.name} says {expected}")
    return Module(kind=kind, settings=tree, weights={key: tensors[key].read().astype(np.float32) for key in expected})


def _pooling(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    if not tree:
        raise ValueError(f"{path}: missing or empty, so it does not say how to pool")
    modes = tree.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if tree.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in _FLAGS.values() for mode in modes):
        raise ValueError(f"{path}: pooling_mode is {modes!r}; computed are {', '.join(_FLAGS.values())}")
    return {"modes": tuple(modes), "include_prompt": bool(tree.get("include_prompt", True))}


def _names(module: Module) -> tuple[str, str]:
    """What a module reads and what it writes."""
    if module.kind == "Pooling":
        return _TOKENS, _SENTENCE
    source = module.settings.get("module_input_name") or _SENTENCE
    return source, module.settings.get("module_output_name") or source


def width_after(modules: Sequence[Module], width: int, where: Path) -> int:
    """Length of the vector that modules make of token vectors of some width.

    Raises:
      ValueError: A module that was made for another width.
    """
    widths: dict[str, Any] = {_TOKENS: width}
    for module in modules:
        source, target = _names(module)
        found = widths.get(source)
        if module.kind == "Normalize" and found is None:
            continue
        wanted = module.settings.get("in_features", module.settings.get("dimension", found))
        if found is None or wanted != found:
            raise ValueError(f"{where}: module '{module.kind}' reads {wanted} components, and there are {found}")
        factor = len(module.settings["modes"]) if module.kind == "Pooling" else 1
        widths[target] = module.settings.get("out_features", factor * found)
    return widths[_SENTENCE]


def sentence_vectors(
    modules: Sequence[Module],
    weights: Sequence[Mapping[str, jax.Array]],
    hidden_BxTxD: jax.Array,
    mask_BxT: jax.Array,
    prompt_length: int,
) -> jax.Array:
    """Computes the modules.

    Args:
      modules: They.
      weights: Their parameters, as in `Module.weights`.
      hidden_BxTxD: float32 [B, T, D], the transformer's last hidden states.
      mask_BxT: bool [B, T], True at tokens; padding is on the right.
      prompt_length: Tokens of the prompt at the start of each text, for poolings that leave it out.

    Returns:
      float32 [B, width].
    """
    features = {_TOKENS: hidden_BxTxD}
    for module, params in zip(modules, weights, strict=True):
        source, target = _names(module)
        x = features.get(source)
        if x is None:
            continue
        if module.kind == "Pooling":
            counted = mask_BxT
            if not module.settings["include_prompt"]:
                counted = mask_BxT & (jnp.arange(mask_BxT.shape[1]) >= prompt_length)
            x = jnp.concatenate([pool(mode, x, counted) for mode in module.settings["modes"]], axis=-1)
        elif module.kind == "Dense":
            out = _times(x, params["linear.weight"]) + params.get("linear.bias", 0.0)
            out = _ACTIVATIONS[module.settings["activation_function"]](out)
            if module.settings.get("use_residual"):
                out = out + (_times(x, params["residual.weight"]) if "residual.weight" in params else x)
            x = out
        elif module.kind == "LayerNorm":
            centered = x - jnp.mean(x, axis=-1, keepdims=True)
            variance = jnp.mean(centered**2, axis=-1, keepdims=True)
            x = centered * jax.lax.rsqrt(variance + _NORM_EPS) * params["norm.weight"] + params["norm.bias"]
        elif module.kind == "Normalize":
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _UNIT_EPS)
        features[target] = x
    return features[_SENTENCE]


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    # In full float32 on accelerators, too: it is one product per text.
    return jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST)


def pool(mode: str, hidden_BxTxD: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    """A text's vector of its tokens' vectors.

    Args:
      mode: A pooling mode of sentence-transformers.
      hidden_BxTxD: float32 [B, T, D].
      counted_BxT: bool [B, T], True at the tokens that count.

    Returns:
      float32 [B, D]; zero where no token counts, but for `max` (minus infinity) and `cls` (the first token).
    """
    counted_BxTx1 = counted_BxT[..., None]
    if mode == "max":
        return jnp.max(jnp.where(counted_BxTx1, hidden_BxTxD, -jnp.inf), axis=1)
    if mode in ("cls", "lasttoken"):
        at_B = jnp.argmax(counted_BxT, axis=1)
        if mode == "lasttoken":
            at_B = counted_BxT.shape[1] - 1 - jnp.argmax(counted_BxT[:, ::-1], axis=1)
            hidden_BxTxD = jnp.where(counted_BxTx1, hidden_BxTxD, 0)
        return jnp.take_along_axis(hidden_BxTxD, at_B[:, None, None], axis=1)[:, 0]
    # Weights are positions counted from one, those of a prompt that is left out included.
    position_T = jnp.arange(1, counted_BxT.shape[1] + 1, dtype=jnp.float32)
    weight_BxTx1 = counted_BxTx1 * (position_T[:, None] if mode == "weightedmean" else jnp.float32(1))
    total_BxD = jnp.sum(jnp.where(counted_BxTx1, hidden_BxTxD, 0) * weight_BxTx1, axis=1)
    # The least divisor is the original's.
    divisor_Bx1 = jnp.maximum(jnp.sum(weight_BxTx1, axis=1), 1e-9)
    return total_BxD / (jnp.sqrt(divisor_Bx1) if mode == "mean_sqrt_len_tokens" else divisor_Bx1)
