"""`python -m nqf.embed`: texts to vectors with a BERT-family or Qwen3-Embedding model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nqf.cli import guard, parse, program
from nqf.config import Count, Width, section
from nqf.files import partial, publish, read_json, whole


@section
class EmbedArguments:
    """Embeds texts: one per line, or a catalogue.

    Attributes:
      model: Local folder or hub name of a BERT-family (MiniLM, BGE, E5) or Qwen3-Embedding model.
      input: `.txt` with one text per line, or `.json` with `{id: text}` or `{id: {field: value}}`.
      output: `.npy` for float32 [texts, width] in the order of the input, or `.json` for `{id: [floats]}`.
      instruction: Qwen3-Embedding: the task that the texts are queries of; leave it out for documents.
      dimensions: Qwen3-Embedding: components kept of each vector.
      max_length: Longest text in tokens; longer ones are cut.
      debug: Show the traceback of an error.
    """

    model: str
    input: Path
    output: Path
    instruction: str = ""
    dimensions: Width | None = None
    max_length: Count | None = None
    debug: bool = False


def main(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
      ValueError: An input that cannot be used, or a model that cannot be loaded.
    """
    options = parse(EmbedArguments, arguments, prog=program("embed"))
    if options.output.suffix not in (".npy", ".json"):
        raise ValueError(f"{options.output}: vectors are written to .npy or .json")
    if options.output.suffix == ".json" and options.input.suffix != ".json":
        raise ValueError(f"{options.output}: a JSON of vectors needs ids, so the input must be a .json too")
    if not options.output.parent.is_dir():
        raise ValueError(f"{options.output.parent}: no such folder")
    texts = read_catalogue(options.input) if options.input.suffix == ".json" else read_lines(options.input)

    from nqf.interop.encoders import load_text_embedder
    from nqf.interop.unirec.embeddings import write_candidate_embeddings

    embedder = load_text_embedder(
        options.model,
        instruction=options.instruction,
        dimensions=options.dimensions,
        max_length=options.max_length,
    )
    vectors = embedder.embed(list(texts.values()))
    if options.output.suffix == ".npy":
        with whole(options.output) as file:
            np.save(file, vectors)
    else:
        temporary = partial(options.output)
        write_candidate_embeddings(temporary, texts, vectors)
        publish(temporary, options.output)
    print(f"wrote {len(vectors)} vectors of width {embedder.width} to {options.output}")


def read_lines(path: Path) -> dict[str, str]:
    """One text per line, by line number.

    Raises:
      ValueError: Not readable, without a text, or with an empty line (which would have a vector that means nothing).
    """
    try:
        # Not splitlines(), which also splits at form feeds and the like inside a text.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(f"{path}: line {empty[0]} is empty ({len(empty)} in all); give one text per line")
    return {str(number): line for number, line in enumerate(lines, 1)}


def read_catalogue(path: Path) -> dict[str, str]:
    """`{id: text}` or the reference system's item dictionary `{id: {field: value}}`; items without text are left out.

    Raises:
      ValueError: Not readable, or not of this form.
    """
    entries, texts = read_json(path), {}
    for item, entry in entries.items():
        if not isinstance(entry, (str, dict, type(None))):
            raise ValueError(f"{path}: entry '{item}' is neither a text nor an object of fields")
        text = _document(entry) if isinstance(entry, dict) else entry or ""
        if text.strip():
            texts[item] = text
    if len(texts) < len(entries):
        print(f"{len(entries) - len(texts)} of {len(entries)} items have no text and are left out", file=sys.stderr)
    if not texts:
        raise ValueError(f"{path}: no item has a text")
    return texts


def _document(fields: dict) -> str:
    """An item's title, then its other texts with their names; numbers and images are no text."""
    title = fields.get("title")
    lines = [title] if isinstance(title, str) else []
    for name, value in fields.items():
        parts = value if isinstance(value, list) else [value]
        text = ", ".join(part for part in parts if isinstance(part, str) and part.strip())
        if name != "title" and "image" not in name and text:
            lines.append(f"{name}: {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    guard(main, sys.argv[1:])
