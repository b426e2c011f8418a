"""Pretrained text and image encoders of fields: BERT-family and Qwen3-Embedding texts, CLIP images."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nqf.config import FieldsConfig
from nqf.fields.encoder import EncoderFactory, unit_rows
from nqf.interop.bert import SentenceSettings, load_bert
from nqf.interop.clip import load_clip
from nqf.interop.images import ImageReader
from nqf.interop.tensors import folder_digest, read_json, resolve_folder
from nqf.ops.products import bfloat16_dot_general

_LOG = logging.getLogger(__name__)
# Lengths that texts are padded to: few, because each is compiled once, and densest where most texts are.
_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Tokens of a batch: enough to keep the matrix units busy, few enough to stay in a CPU's cache or a small GPU.
_TOKENS = {"cpu": 1_024, "gpu": 65_536, "tpu": 65_536}
_IMAGES = {"cpu": 16, "gpu": 256, "tpu": 256}
# Longest text of Qwen3-Embedding: its card evaluates with 8,192 tokens, far more than any field has.
QWEN3_LENGTH = 8_192
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


class TextEmbedder:
    """Texts to vectors with a pretrained model.

    Attributes:
      width: Length of a vector.
      settings: Pooling, normalisation, longest text and prompt.
      digest: SHA-256 of the model's files.
    """

    def __init__(
        self,
        *,
        hidden: Callable[[Any, jax.Array, jax.Array], jax.Array],
        params: Any,
        tokenize: Callable[[list[str]], list[list[int]]],
        settings: SentenceSettings,
        width: int,
        pad_id: int,
        digest: str,
    ):
        """Makes an embedder of a model's parts.

        Args:
          hidden: (params, int32 ids [B, T], bool mask [B, T]) to hidden states [B, T, D]; padding is on the right.
          params: The model's parameters.
          tokenize: Texts to token ids with special tokens, cut to the longest length.
          settings: How token vectors become a text's vector; pooling `last` takes the last token's.
          width: Components kept of each vector, counted from the first.
          pad_id: Token at padding.
          digest: SHA-256 of the model's files.
        """
        self.width, self.settings, self.digest = width, settings, digest
        self._params, self._tokenize, self._pad_id = params, tokenize, pad_id

        @jax.jit
        def vectors(params: Any, ids_BxT: jax.Array, lengths_B: jax.Array) -> jax.Array:
            mask_BxT = jnp.arange(ids_BxT.shape[1])[None] < lengths_B[:, None]
            hidden_BxTxD = hidden(params, ids_BxT.astype(jnp.int32), mask_BxT).astype(jnp.float32)
            if settings.pooling == "cls":
                pooled_BxD = hidden_BxTxD[:, 0]
            elif settings.pooling == "last":
                last = jnp.maximum(lengths_B - 1, 0)[:, None, None]
                pooled_BxD = jnp.take_along_axis(hidden_BxTxD, last, axis=1)[:, 0]
            else:
                total = jnp.sum(jnp.where(mask_BxT[..., None], hidden_BxTxD, 0), axis=1)
                pooled_BxD = total / jnp.maximum(lengths_B, 1)[:, None]
            return pooled_BxD[:, :width]

        self._vectors = vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts, each distinct one once, in batches of similar length.

        Returns:
          float32 [n, width].
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.zeros((0, self.width), np.float32)
        prompted = [self.settings.prompt + text for text in distinct]
        if self.settings.lower_case:
            prompted = [text.lower() for text in prompted]
        tokens = self._tokenize(prompted)
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
            # Not fetched here: the next batch is made while this one computes.
            results.append(self._vectors(self._params, ids, lengths))
            start += len(chosen)
        found = np.concatenate([np.asarray(result) for result in results])[: len(order)]
        vectors = np.empty((len(distinct), self.width), np.float32)
        vectors[order] = found
        if self.settings.normalize:
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
    """Loads a BERT-family or Qwen3-Embedding folder or hub name.

    Args:
      name: Local folder or hub name.
      dtype: Type of parameters and computation; by default what `precision` says.
      max_length: Longest text in tokens; the folder's own limit by default, and never more than it.
      instruction: Qwen3-Embedding only: the task that the texts are queries of; documents have none.
      dimensions: Qwen3-Embedding only: components kept (it is trained for shorter, Matryoshka vectors).

    Raises:
      ValueError: A model that cannot be loaded, or an option that it does not have.
    """
    folder = resolve_folder(name)
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "qwen3":
        return _load_qwen3_embedder(folder, dtype, max_length, instruction, dimensions)
    if kind != "bert":
        raise ValueError(f"{folder / 'config.json'}: model_type is {kind!r}; text encoders are 'bert' or 'qwen3'")
    if instruction or dimensions:
        raise ValueError(f"{folder}: instructions and shorter vectors are Qwen3-Embedding's; this is a BERT")
    from nqf.interop.tokenizer import load_tokenizer

    module, params, settings = load_bert(folder, **precision(dtype))
    settings = _shortened(settings, max_length)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > module.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {module.config.vocab_size} rows"
        )
    return TextEmbedder(
        hidden=lambda params, ids, mask: module.apply({"params": params}, ids, mask),
        params=params,
        tokenize=lambda texts: tokenizer.encode(texts, max_length=settings.max_length, add_eos=False),
        settings=settings,
        width=module.config.hidden_size,
        pad_id=tokenizer.pad_id,
        digest=folder_digest(folder),
    )


def _load_qwen3_embedder(
    folder: Path, dtype: Any, max_length: int | None, instruction: str, dimensions: int | None
) -> TextEmbedder:
    from nqf.interop.huggingface import check_embedding, load_qwen3
    from nqf.interop.tokenizer import load_tokenizer
    from nqf.models.qwen3 import Qwen3

    options = precision(dtype)
    model, params = load_qwen3(folder, dtype=jnp.bfloat16 if "dot_general" in options else options["dtype"])
    model = Qwen3(dataclasses.replace(model.config, **options))
    tokenizer = load_tokenizer(folder)
    check_embedding(folder, model, params, tokenizer)
    # The form that the model card of Qwen3-Embedding gives.
    prompt = f"Instruct: {instruction}\nQuery:" if instruction else ""
    settings = SentenceSettings(pooling="last", normalize=True, max_length=QWEN3_LENGTH, prompt=prompt)
    settings = _shortened(settings, max_length)
    width = model.config.hidden_size
    if not 0 < (dimensions or width) <= width:
        raise ValueError(f"{folder}: vectors have {width} components, {dimensions} cannot be kept")
    return TextEmbedder(
        # Padding on the right changes nothing under causal order, and without a mask attention is faster.
        hidden=lambda params, ids, mask: model.apply({"params": params}, ids),
        params=params,
        tokenize=lambda texts: tokenizer.encode(texts, max_length=settings.max_length, add_eos=True),
        settings=settings,
        width=dimensions or width,
        pad_id=tokenizer.pad_id,
        digest=folder_digest(folder),
    )


def _shortened(settings: SentenceSettings, max_length: int | None) -> SentenceSettings:
    if max_length is None:
        return settings
    return dataclasses.replace(settings, max_length=min(max_length, settings.max_length))


def _bucket(length: int, longest: int) -> int:
    """The length that a batch is padded to: the next one of `_LENGTHS`, but not beyond the longest text's."""
    return min(next((bucket for bucket in _LENGTHS if bucket >= length), -(-length // 128) * 128), longest)


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
        return {"kind": "pretrained-text", "version": 2, "options": options, "state": self._embedder.digest}

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
      failures: Value to the reason, of every image so far that could not be had; such images are missing.
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
        self._vectors = jax.jit(lambda params, pixels: module.apply({"params": params}, pixels).astype(jnp.float32))

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, version, preprocessing and the SHA-256 of the model's files; not the precision, as for texts."""
        options = {**dataclasses.asdict(self._preprocessing), "width": self.width}
        # As JSON gives it back, where tuples are lists.
        return json.loads(
            json.dumps({"kind": "clip-image", "version": 2, "options": options, "state": self._digest}, sort_keys=True)
        )

    def encode(self, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, width], and bool [n] that is False for images that could not be had (see `failures`)."""
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
            _LOG.warning("%d of %d images could not be had and are missing: %s", len(failed), len(distinct), named)
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
    (directory / "encoder.json").write_text(json.dumps(identity, indent=1, sort_keys=True), encoding="utf-8")
