"""Tokens stage: the catalogue's item tokens and vectors, and the whitenings of fields and texts. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nqf import files
from nqf.fields.cache import CANDIDATE, FieldCache
from nqf.fields.whitening import fit_whitening, save_whitenings
from nqf.models.item_qformer import ItemQFormer
from nqf.ops.pins import on_local_devices
from nqf.stages.item import ENCODE_CHUNK, gather_fields, load_items
from nqf.stages.run import WHITENING, Run
from nqf.stages.stage import Stage
from nqf.training.mesh import is_primary


def encode_chunks(
    module: ItemQFormer, params: Any, cache: FieldCache, items: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Tokens [n, Q, D] and vectors [n, D] of the catalogue, float32, chunk by chunk, by all devices of this process."""
    encode = jax.jit(lambda params, values, present: module.apply({"params": params}, values, present))
    # Each device computes what a single one would at a time, as rounding depends on the shape.
    size = min(ENCODE_CHUNK, items) * jax.local_device_count()
    params = on_local_devices(jax.device_get(params))
    for start in range(0, items, size):
        stop = min(start + size, items)
        # The last chunk is padded with its last item, so that there is one compilation.
        rows = np.minimum(np.arange(start, start + size), stop - 1)
        output = encode(params, *on_local_devices(gather_fields(cache, rows), split=True))
        count = stop - start
        yield (
            slice(start, stop),
            np.asarray(output.tokens, np.float32)[:count],
            np.asarray(output.vector, np.float32)[:count],
        )


def write_tokens(run: Run, module: ItemQFormer, params: Any, folder: Path) -> dict[str, Any]:
    """Writes `tokens.npy` (float16 [I, Q, D]) and `vectors.npy` (float16 [I, D]) atomically, in bounded memory."""
    items = len(run.dataset.catalogue.item_ids)
    queries, width = run.config.item.qformer.queries, run.config.item.qformer.width
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"tokens": (items, queries, width), "vectors": (items, width)}
    parts = {name: files.partial(folder / f"{name}.npy") for name in shapes}
    arrays = {name: np.lib.format.open_memmap(parts[name], "w+", np.float16, shape) for name, shape in shapes.items()}
    for where, tokens, vectors in encode_chunks(module, params, run.cache, items):
        arrays["tokens"][where], arrays["vectors"][where] = tokens, vectors
    for name, array in arrays.items():
        array.flush()
        files.publish(parts[name], folder / f"{name}.npy")
    return {"items": items, "queries": queries, "width": width}


def make_tokens(run: Run) -> dict[str, Any]:
    """Runs the tokens stage: item tokens and vectors, and the whitenings of the fields and of the candidates' texts."""
    module, params = load_items(run)
    if not is_primary():
        return {}
    report = write_tokens(run, module, params, run.folder / "tokens")
    tables = {name: run.cache.table(name) for name in run.cache.names}
    if run.cache.candidates is not None:
        tables[CANDIDATE] = run.cache.candidates
    # A width of 0 is for the text embeddings as they are; the fields' components then have no limit.
    width = run.config.candidates.text_width
    whitenings = {name: fit_whitening(table, width or table.values.shape[1]) for name, table in tables.items()}
    save_whitenings(run.folder / "tokens" / WHITENING, whitenings)
    report["whitened_widths"] = {name: whitening.matrix.shape[1] for name, whitening in whitenings.items()}
    return report


TOKENS = Stage(
    name="tokens",
    after=("item",),
    reads=("candidates.text_width",),
    writes=("tokens.npy", "vectors.npy", WHITENING),
    checked=("tokens/*.np?",),
    make=make_tokens,
)
