"""Pretrained text and image encoders of fields: BERT-family and Qwen3-Embedding texts, CLIP images."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import FieldsConfig
from nqf.fields.encoder import EncoderFactory, unit_rows
from nqf.files import read_json, write_text
from nqf.interop.bert import load_bert
from nqf.interop.clip import load_clip
from nqf.interop.images import ImageReader
from nqf.interop.sentence import Module, SentenceFolder, read_sentence_folder, sentence_vectors, width_after
from nqf.interop.tensors import folder_digest, resolve_folder
from nqf.interop.tokenizer import load_text_tokenizer, text_encoder
from nqf.ops.products import bfloat16_dot_general

_LOG = logging.getLogger(__name__)
# Lengths that texts are padded to: few, because each is compiled once, and densest where most texts are.
_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Tokens of a batch: enough to keep the matrix units busy, few enough to stay in a CPU's cache or a small GPU.
_TOKENS = {"cpu": 1_024, "gpu": 65_536, "tpu": 65_536}
_IMAGES = {"cpu": 16, "gpu": 256, "tpu": 256}
_NO_LIMIT = 1 << 30
# Failed images that a warning names one by one.
_NAMED = 5


def precision(dtype: Any = None) -> dict[str, Any]:
    """Options of a frozen encoder's module: `dtype` and, on a CPU, `dot_general`.

    The default is bfloat16 on accelerators. On a CPU products are in bfloat16 and everything else in float32, which is
    about twice as fast as float32 where there are bfloat16 units, and nearer to it than all in bfloat16.
    """
    if dtype is None and jax.default_backend() == "cpu":
        return {"dtype": jnp.float32, "dot_general": bfloat16_dot_general}
    return {"dtype": dtype or jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a text becomes a vector, beside what the folder's files say.

    Attributes:
      max_length: Longest text in tokens, special tokens included; longer ones are cut.
      prompt: Put before every text.
      prompt_length: Tokens of the prompt, for poolings that leave it out.
      dimensions: Components kept of each vector.
      rescale: Whether what is kept is brought to unit norm.
    """

    max_length: int
    prompt: str
    prompt_length: int
    dimensions: int
    rescale: bool


class TextEmbedder:
    """Texts to vectors with a pretrained model.

    Attributes:
      width: Length of a vector.
      settings: Longest text, prompt and components kept.
      digest: SHA-256 of the model's files.
    """

    def __init__(
        self,
        *,
        hidden: Callable[[Any, jax.Array, jax.Array], jax.Array],
        params: Any,
        modules: Sequence[Module],
        tokenize: Callable[[list[str]], list[list[int]]],
        settings: TextSettings,
        pad_id: int,
        digest: str,
    ):
        """Makes an embedder of a model's parts.

        Args:
          hidden: (params, int32 ids [B, T], bool mask [B, T]) to hidden states [B, T, D]; padding is on the right.
          params: The model's parameters.
          modules: What makes a text's vector of its tokens' vectors.
          tokenize: Texts to token ids with special tokens, cut to the longest length.
          settings: Longest text, prompt and components kept.
          pad_id: Token at padding.
          digest: SHA-256 of the model's files.
        """
        self.width, self.settings, self.digest = settings.dimensions, settings, digest
        self._tokenize, self._pad_id = tokenize, pad_id
        self._params = params, [jax.tree.map(jnp.asarray, dict(module.weights)) for module in modules]

        @jax.jit
        def vectors(params: Any, ids_BxT: jax.Array, lengths_B: jax.Array) -> jax.Array:
            mask_BxT = jnp.arange(ids_BxT.shape[1])[None] < lengths_B[:, None]
            hidden_BxTxD = hidden(params[0], ids_BxT.astype(jnp.int32), mask_BxT).astype(jnp.float32)
            return sentence_vectors(modules, params[1], hidden_BxTxD, mask_BxT, settings.prompt_length)[:, : self.width]

        self._vectors = vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts, each distinct one once, in batches of similar length.

        Returns:
          float32 [n, width].

        Raises:
          ValueError: A text that has no vector, because no token of it counts; it is named.
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.zeros((0, self.width), np.float32)
        tokens = self._tokenize([self.settings.prompt + text for text in distinct])
        order = sorted(range(len(distinct)), key=lambda i: -len(tokens[i]))
        results, start = [], 0
        while start < len(order):
            length = _bucket(len(tokens[order[start]]), self.settings.max_length)
            rows = max(_TOKENS[jax.default_backend()] // length, 1)
            # The last batch is padded to a power of two rows, so that few shapes are compiled.
            rows = min(rows, 1 << (len(order) - start - 1).bit_length())
            chosen = order[start : start + rows]
            ids = np.full((rows, length), self._pad_id, np.int32)
            for row, index in enumerate(chosen):
                ids[row, : len(tokens[index])] = tokens[index]
            lengths = np.zeros(rows, np.int32)
            lengths[: len(chosen)] = [len(tokens[index]) for index in chosen]
            # Not fetched here: the next batch is made while this one computes. Rows of padding are left out.
            results.append((self._vectors(self._params, ids, lengths), len(chosen)))
            start += len(chosen)
        vectors = np.empty((len(distinct), self.width), np.float32)
        vectors[order] = np.concatenate([np.asarray(result)[:count] for result, count in results])
        empty = [index for index in range(len(distinct)) if not tokens[index] or not np.isfinite(vectors[index]).all()]
        if empty:
            raise ValueError(
                f"{len(empty)} texts have no vector, e.g. {distinct[empty[0]][:80]!r}: no token of it counts, or the "
                "model's numbers are not finite"
            )
        if self.settings.rescale:
            vectors = unit_rows(vectors)
        row_of = {text: row for row, text in enumerate(distinct)}
        return vectors[[row_of[text] for text in texts]]


def load_text_embedder(
    name: str | Path,
    *,
    dtype: Any = None,
    max_length: int | None = None,
    instruction: str = "",
    dimensions: int | None = None,
) -> TextEmbedder:
    """Loads a BERT-family or Qwen3-Embedding folder or hub name, as sentence-transformers reads it.

    Args:
      name: Local folder or hub name.
      dtype: Type of parameters and computation; by default what `precision` says.
      max_length: Longest text in tokens; the folder's own limit by default, and never more than it.
      instruction: Qwen3-Embedding only: the task that the texts are queries of, in place of the folder's prompt.
      dimensions: Qwen3-Embedding only: components kept (it is trained for shorter, Matryoshka vectors), at unit norm.

    Raises:
      ValueError: A model that cannot be loaded, a setting that is not understood, or an option that it does not have.
    """
    folder = resolve_folder(name)
    said = read_sentence_folder(folder)
    base = said.transformer
    if (base / "adapter_config.json").is_file() and not (base / "config.json").is_file():
        base = _base_folder(base)
    config = base / "config.json"
    tree = read_json(config)
    kind = tree.get("model_type")
    if kind not in ("bert", "qwen3"):
        raise ValueError(f"{config}: model_type is {kind!r}; text encoders are 'bert' or 'qwen3'")
    if kind == "bert" and (instruction or dimensions):
        raise ValueError(f"{folder}: instructions and shorter vectors are Qwen3-Embedding's; this is a BERT")
    hidden, params, rows, hidden_width = (_bert if kind == "bert" else _qwen3)(base, said.transformer, dtype)
    tokenizer = load_text_tokenizer(
        said.transformer, options=said.tokenizer_options, max_length=said.max_length, lower_case=said.lower_case
    )
    _check_tokenizer(said, tokenizer, kind, rows)
    limit = _longest(said, tokenizer, tree, config)
    if max_length is not None:
        limit = min(limit, max_length)
    tokenize = text_encoder(tokenizer, limit, where=said.transformer)
    # The form that the model card of Qwen3-Embedding gives.
    prompt = f"Instruct: {instruction}\nQuery:" if instruction else said.prompt
    prompt_length = 0
    if prompt:
        ids = tokenize([prompt])[0]
        # As sentence-transformers counts, also where a text's first word joins the prompt's last token.
        prompt_length = len(ids) - (ids[-1] in tokenizer.all_special_ids)
    width = width_after(said.modules, hidden_width, folder)
    kept = min(said.dimensions or width, width)
    if dimensions is not None and not 0 < dimensions <= kept:
        raise ValueError(f"{folder}: vectors have {kept} components, {dimensions} cannot be kept")
    pad = tokenizer.pad_token_id
    return TextEmbedder(
        hidden=hidden,
        params=params,
        modules=said.modules,
        tokenize=tokenize,
        settings=TextSettings(
            max_length=limit,
            prompt=prompt,
            prompt_length=prompt_length,
            dimensions=dimensions or kept,
            rescale=bool(dimensions),
        ),
        pad_id=0 if pad is None else pad,
        digest=folder_digest(folder) if base.is_relative_to(folder) else folder_digest(folder) + folder_digest(base),
    )


def _bert(base: Path, transformer: Path, dtype: Any) -> tuple[Callable[..., Any], Any, int, int]:
    if (transformer / "adapter_config.json").is_file():
        raise ValueError(f"{transformer / 'adapter_config.json'}: adapters of a BERT are not read; merge it first")
    module, params = load_bert(base, **precision(dtype))
    size = module.config
    return (
        lambda params, ids, mask: module.apply({"params": params}, ids, mask),
        params,
        size.vocab_size,
        size.hidden_size,
    )


def _qwen3(base: Path, transformer: Path, dtype: Any) -> tuple[Callable[..., Any], Any, int, int]:
    from nqf.interop.huggingface import load_qwen3
    from nqf.interop.peft import load_adapter
    from nqf.models.qwen3 import Qwen3

    options = precision(dtype)
    model, params = load_qwen3(base, dtype=jnp.bfloat16 if "dot_general" in options else options["dtype"])
    config, variables = dataclasses.replace(model.config, **options), {"params": params}
    if (transformer / "adapter_config.json").is_file():
        config, variables["lora"] = load_adapter(transformer, config)
    model = Qwen3(config)
    # Padding on the right changes nothing under causal order, and without a mask attention is faster.
    hidden = lambda variables, ids, mask: model.apply(variables, ids)  # noqa: E731
    return hidden, variables, config.vocab_size, config.hidden_size


def _base_folder(adapter: Path) -> Path:
    """The model that an adapter was trained on, as peft finds it, or beside the adapter's folder."""
    path = adapter / "adapter_config.json"
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: no base_model_name_or_path, and no config.json beside it")
    if not Path(name).is_dir() and (adapter / name).is_dir():
        return adapter / name
    try:
        return resolve_folder(name)
    except ValueError as error:
        raise ValueError(f"{path}: base_model_name_or_path: {error}") from error


def _check_tokenizer(said: SentenceFolder, tokenizer: Any, kind: str, rows: int) -> None:
    path = said.transformer / "tokenizer_config.json"
    if len(tokenizer) > rows:
        raise ValueError(f"{said.transformer}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
    if said.is_plain and tokenizer.chat_template is not None:
        raise ValueError(
            f"{path}: has a chat_template, and without modules.json sentence-transformers would put every text into "
            "it; add the modules.json of the embedding model"
        )
    if "attention_mask" not in tokenizer.model_input_names:
        raise ValueError(f"{path}: model_input_names has no attention_mask, so vectors would depend on padding")
    if kind == "bert" and tokenizer.padding_side != "right":
        raise ValueError(f"{path}: padding_side is {tokenizer.padding_side!r}, so a BERT's vectors depend on padding")
    if kind == "bert" and any(tokenizer.backend_tokenizer.encode("a").type_ids):
        raise ValueError(f"{said.transformer / 'tokenizer.json'}: gives single texts a token type other than 0")


def _longest(said: SentenceFolder, tokenizer: Any, tree: dict[str, Any], config: Path) -> int:
    """Longest text in tokens: what the folder asks for, else the tokenizer's limit or the model's, the smaller."""
    limit, positions = tokenizer.model_max_length, tree.get("max_position_embeddings")
    if type(limit) not in (int, float) or not limit > 0:
        raise ValueError(f"{said.transformer / 'tokenizer_config.json'}: model_max_length is {limit!r}, not a length")
    # No limit is written as 10^30.
    limit = int(min(limit, _NO_LIMIT))
    asked = said.max_length is not None or "model_max_length" in said.tokenizer_options
    if positions is None or (asked and tree["model_type"] == "qwen3"):
        return limit
    if asked and limit > positions:
        _LOG.warning("%s: the model has %d positions; longer texts are cut there, not at %d", config, positions, limit)
    return min(limit, positions)


def _bucket(length: int, longest: int) -> int:
    """The length that a batch is padded to: the next one of `_LENGTHS`, but not beyond the longest text's."""
    return max(1, min(next((bucket for bucket in _LENGTHS if bucket >= length), -(-length // 128) * 128), longest))


class PretrainedTextEncoder:
    """Field encoder on a `TextEmbedder`; vectors have unit norm whatever the model's own settings."""

    def __init__(self, embedder: TextEmbedder, *, max_words: int | None = None):
        """Wraps an embedder; only the first `max_words` words of a text are read (the field's `max_length`)."""
        self._embedder = embedder
        self._max_words = max_words
        self.width = embedder.width

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, version, settings and the SHA-256 of the model's files.

        Not the precision: a cache that an accelerator filled serves on a CPU, and the reverse.
        """
        settings = dataclasses.asdict(self._embedder.settings)
        options = {**settings, "max_words": self._max_words, "width": self.width}
        return {"kind": "pretrained-text", "version": 3, "options": options, "state": self._embedder.digest}

    def encode(self, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, width]; every text can be read."""
        texts = list(values)
        if self._max_words is not None:
            texts = [" ".join(text.split()[: self._max_words]) for text in texts]
        return unit_rows(self._embedder.embed(texts)), np.ones(len(texts), bool)

    def save(self, directory: Path) -> None:
        """Writes `encoder.json`; the weights stay in their folder, which the identity names by their hash."""
        _save_identity(self.identity, directory)


class ClipImageEncoder:
    """Field encoder of images by path or URL; vectors have unit norm.

    Attributes:
      width: Length of a vector.
      failures: Value to the reason, of every image so far that was unavailable; such images are missing.
    """

    def __init__(self, name: str | Path, *, reader: ImageReader | None = None, dtype: Any = None):
        """Loads the vision tower of a CLIP folder or hub name.

        Raises:
          ValueError: As `nqf.interop.clip.load_clip`.
        """
        folder = resolve_folder(name)
        module, self._params, self._preprocessing = load_clip(folder, **precision(dtype))
        self.width = module.config.projection_dim
        self.failures: dict[str, str] = {}
        self._reader = reader or ImageReader()
        self._digest = folder_digest(folder)
        self._vectors = jax.jit(
            lambda params, pixels: cast(jax.Array, module.apply({"params": params}, pixels)).astype(jnp.float32)
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, version, preprocessing and the SHA-256 of the model's files; not the precision, as for texts."""
        options = {**dataclasses.asdict(self._preprocessing), "width": self.width}
        # As JSON gives it back, where tuples are lists.
        return json.loads(
            json.dumps({"kind": "clip-image", "version": 2, "options": options, "state": self._digest}, sort_keys=True)
        )

    def encode(self, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, width], and bool [n] that is False for images that were unavailable (see `failures`)."""
        values = list(values)
        distinct = list(dict.fromkeys(values))
        found: dict[str, np.ndarray] = {}
        failed: dict[str, str] = {}
        rows = _IMAGES[jax.default_backend()]
        for start in range(0, len(distinct), rows):
            pixels: dict[str, np.ndarray] = {}
            for value, result in self._reader.read(distinct[start : start + rows], self._preprocessing):
                if isinstance(result, Exception):
                    failed[value] = f"{type(result).__name__}: {result}"
                else:
                    pixels[value] = result
            if pixels:
                # One shape, so one compilation.
                batch = np.zeros((rows, *next(iter(pixels.values())).shape), np.float32)
                batch[: len(pixels)] = list(pixels.values())
                found.update(zip(pixels, np.asarray(self._vectors(self._params, batch)), strict=False))
        if failed:
            named = "; ".join(f"{value} ({reason})" for value, reason in list(failed.items())[:_NAMED])
            _LOG.warning("%d of %d images were unavailable and are missing: %s", len(failed), len(distinct), named)
            self.failures.update(failed)
        ok = np.array([value in found for value in values], bool)
        vectors = np.zeros((len(values), self.width), np.float32)
        if ok.any():
            vectors[ok] = [found[value] for value in values if value in found]
        return unit_rows(vectors), ok

    def save(self, directory: Path) -> None:
        """Writes `encoder.json`; the weights stay in their folder, which the identity names by their hash."""
        _save_identity(self.identity, directory)


def encoder_factories(config: FieldsConfig) -> dict[str, EncoderFactory]:
    """Modality to the factory of the pretrained encoder that the configuration names; empty if it names none.

    A model is loaded when the first field needs it, and shared by all fields.
    """
    factories: dict[str, EncoderFactory] = {}
    if config.text_encoder != "tfidf-svd":
        factories["text"] = lambda field, config: PretrainedTextEncoder(
            _text_embedder(config.text_encoder), max_words=field.max_length
        )
    if config.image_encoder != "pca":
        factories["image"] = lambda field, config: _image_encoder(config.image_encoder)
    return factories


@functools.lru_cache(maxsize=1)
def _text_embedder(name: str) -> TextEmbedder:
    return load_text_embedder(name)


@functools.lru_cache(maxsize=1)
def _image_encoder(name: str) -> ClipImageEncoder:
    return ClipImageEncoder(name)


def _save_identity(identity: dict[str, Any], directory: Path) -> None:
    write_text(directory / "encoder.json", json.dumps(identity, indent=1, sort_keys=True))
