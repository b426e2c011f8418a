"""Tokenizers of pretrained folders, and a byte-level BPE trained on a catalogue's text.

The only module that imports tokenizers and transformers, and only where they are used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nqf import files
from nqf.files import read_json
from nqf.interop.tensors import resolve_folder

# What Qwen tokenizers split text by before the byte-level BPE (tokenizer.json of any Qwen3).
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_TOKEN = "<|endoftext|>"
# A special token that was never meant to be read as text can stand for an injected vector.
SPARE_TOKENS = tuple(f"<|spare_{i}|>" for i in range(8))


class Tokenizer:
    """A tokenizer with the rules of Qwen3-Embedding: special tokens in a text are plain text, one end token.

    Attributes:
      eos_id: Id of the end token: the one that the folder's own template appends, else the `eos_token`.
      pad_id: Id at padding.
      rows: Rows of the embedding that goes with it.
    """

    def __init__(self, backend: Any, *, settings: dict[str, Any], rows: int | None = None, where: str = "tokenizer"):
        """Wraps a `tokenizers.Tokenizer`.

        Args:
          backend: The `tokenizers.Tokenizer`.
          settings: Content of `tokenizer_config.json`.
          rows: Rows of the embedding; the number of tokens by default.
          where: The folder, for messages.

        Raises:
          ValueError: No end token, or one that the vocabulary does not have.
        """
        self._backend, self._settings, self._where = backend, settings, where
        self._backend.no_padding()
        self._backend.no_truncation()
        self.rows = rows or len(self)
        # A title that spells an end token or a placeholder must not become one.
        backend.encode_special_tokens = True
        plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        end = full[-1] if len(full) > len(plain) else self._token_id(settings, "eos_token")
        if end is None:
            raise ValueError(f"{where}: neither a template that appends an end token nor an eos_token")
        self.eos_id: int = end
        pad = self._token_id(settings, "pad_token")
        self.pad_id: int = end if pad is None else pad

    def _token_id(self, settings: dict[str, Any], name: str) -> int | None:
        token = settings.get(name)
        return self._backend.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None

    def __len__(self) -> int:
        """Number of tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], max_length: int | None = None, add_eos: bool = False) -> list[list[int]]:
        """Encodes texts.

        Args:
          texts: The texts.
          max_length: Most tokens of a text, special tokens included; longer texts lose their end, never the end
            token.
          add_eos: Whether the end token follows, exactly once.

        Raises:
          ValueError: `max_length` leaves no room for the end token, or the tokenizer cannot read a text.
        """
        if max_length is not None and max_length < add_eos:
            raise ValueError(f"max_length {max_length} leaves no room for 1 special token, the end token")
        end = [self.eos_id] if add_eos else []
        stop = None if max_length is None else max_length - len(end)
        encodings = _encoded(self._backend, texts, self._where, add_special_tokens=False)
        return [encoding.ids[:stop] + end for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def spare_ids(self, count: int) -> list[int]:
        """Ids that no text is encoded to, for placeholders whose embedding is replaced.

        Rows of the embedding beyond the vocabulary come first, then special tokens other than end and padding,
        the last ones first.

        Raises:
          ValueError: There are fewer.
        """
        special = {id for id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        special -= {self.eos_id, self.pad_id}
        spare = [*range(len(self), self.rows), *sorted(special, reverse=True)]
        if len(spare) < count:
            raise ValueError(f"the tokenizer has {len(spare)} spare ids, {count} are needed")
        return spare[:count]

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers' `AutoTokenizer` reads.

        It then encodes as this one does with its end token, whatever the template of the folder was that this one was
        read from: many have none, and vectors of the last token are other ones without it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend, settings = self._with_end()
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        # Last, and at once: its presence says that the folder is complete.
        files.write_text(folder / "tokenizer.json", backend.to_str(pretty=True))

    def _with_end(self) -> tuple[Any, dict[str, Any]]:
        """Backend and settings whose own template appends the end token, and nothing else."""
        import tokenizers
        from tokenizers import processors

        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        # Written by transformers alone; those that a template is made of would replace it.
        settings = {
            key: value for key, value in self._settings.items() if key not in ("add_bos_token", "add_eos_token")
        }
        plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        if full != [*plain, self.eos_id]:
            end = backend.id_to_token(self.eos_id)
            template = processors.TemplateProcessing(
                single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, self.eos_id)]
            )
            offsets = backend.post_processor if full == plain else None
            backend.post_processor = processors.Sequence([offsets, template]) if offsets else template
        return backend, settings | {"split_special_tokens": True}


@contextlib.contextmanager
def _readable(where: str | Path, what: str = "not readable as a tokenizer") -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # A damaged file may raise anything; where `tokenizers` panics, it is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{where}: {what} ({error!s:.500})") from error


def _encoded(backend: Any, texts: Sequence[str], where: str | Path, **options: Any) -> list[Any]:
    # A pattern of tokenizer.json that goes back and forth too often over a text ends in a panic there.
    with _readable(where, "its tokenizer cannot read a text"):
        return backend.encode_batch_fast(list(texts), **options)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Reads the tokenizer of a local folder or hub name.

    Raises:
      ValueError: No tokenizer there, or a damaged one.
    """
    import tokenizers

    folder = resolve_folder(name)
    path = folder / "tokenizer.json"
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    if path.is_file():
        with _readable(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
    else:
        backend, settings = _convert(folder)
    config = folder / "config.json"
    rows = read_json(config).get("vocab_size") if config.is_file() else None
    return Tokenizer(backend, settings=settings, rows=rows, where=str(folder))


def _convert(folder: Path) -> tuple[Any, dict[str, Any]]:
    # Older folders hold the vocabulary in other files; transformers knows them all.
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder}: no tokenizer.json, and no other tokenizer files to make it of") from error
    return backend, dict(tokenizer.special_tokens_map)


def load_text_tokenizer(folder: Path, *, options: Mapping[str, Any], max_length: int | None, lower_case: bool) -> Any:
    """A folder's tokenizer as sentence-transformers uses it: transformers reads all of its settings.

    Args:
      folder: Local folder.
      options: Further arguments for transformers.
      max_length: Takes the place of the folder's own longest text, in tokens.
      lower_case: Whether texts are lower-cased before its own normalization.

    Returns:
      transformers' fast tokenizer.

    Raises:
      ValueError: There is none, or a damaged one.
    """
    import transformers
    from tokenizers import normalizers

    if max_length is not None:
        options = {"model_max_length": max_length, **options}
    with _readable(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
        backend = tokenizer.backend_tokenizer
        backend.encode("a")
    if lower_case:
        own = backend.normalizer
        own = [] if own is None else list(cast(Any, own)) if isinstance(own, normalizers.Sequence) else [own]
        if not any(isinstance(part, normalizers.Lowercase) for part in own):
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def text_encoder(tokenizer: Any, max_length: int, *, where: Path) -> Callable[[Sequence[str]], list[list[int]]]:
    """Texts to token ids as `tokenizer(texts, truncation=True, max_length=max_length)` gives them, but faster.

    Raises:
      ValueError: `max_length` leaves no room for a text between the special tokens; from what is returned, the
        tokenizer cannot read a text.
    """
    backend = tokenizer.backend_tokenizer
    special = backend.num_special_tokens_to_add(is_pair=False)
    if max_length <= special:
        raise ValueError(f"{where}: {max_length} tokens leave no room for a text beside {special} special tokens")
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return lambda texts: [encoding.ids for encoding in _encoded(backend, texts, where)]


def train_byte_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_TOKEN, *SPARE_TOKENS)
) -> Tokenizer:
    """Trains a byte-level BPE in the form of Qwen's: same normalization, splitting and end token template.

    Args:
      texts: Any number of texts, read once.
      vocab_size: Most tokens, the 256 bytes and the special tokens included.
      special_tokens: Special tokens; the first is end and padding, the others are spare.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least}, the bytes and the special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = special_tokens[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32_768,
    }
    return Tokenizer(backend, settings=settings)
