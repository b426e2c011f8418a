"""Tokens stage: the catalogue's item tokens and vectors, and the whitenings of fields and texts. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from nqf import files
from nqf.evaluation.shares import ALONE, Make, Shares
from nqf.fields.cache import CANDIDATE, FieldCache
from nqf.fields.whitening import fit_whitening, save_whitenings
from nqf.models.item_qformer import ItemQFormer, read_fields
from nqf.ops.pins import on_local_devices
from nqf.stages.item import ENCODE_CHUNK, gather_fields, load_items
from nqf.stages.records import fingerprint, read_record
from nqf.stages.run import WHITENING, Run
from nqf.stages.stage import Stage
from nqf.training.mesh import barrier, is_primary


def make_encode(module: ItemQFormer, params: Any, cache: FieldCache) -> Make:
    """Tokens [n, Q, D] and vectors [n, D] of some items of the catalogue, float16, by all devices of this process."""
    # Each device computes what a single one would at a time, as rounding depends on the shape.
    size = min(ENCODE_CHUNK, cache.items) * jax.local_device_count()
    params = on_local_devices(jax.device_get(params))

    def chunk(start: int, stop: int) -> dict[str, np.ndarray]:
        # The last chunk is padded with its last item, so that there is one compilation.
        rows = np.minimum(np.arange(start, start + size), stop - 1)
        output = read_fields(module, params, *on_local_devices(gather_fields(cache, rows), split=True))
        made = {"tokens": output.tokens, "vectors": output.vector}
        return {name: np.asarray(array, np.float32)[: stop - start].astype(np.float16) for name, array in made.items()}

    def some(span: slice) -> dict[str, np.ndarray]:
        starts = range(span.start, span.stop, size)
        chunks = [chunk(start, min(start + size, span.stop)) for start in starts]
        return {name: np.concatenate([made[name] for made in chunks]) for name in chunks[0]}

    return some


def write_tokens(run: Run, module: ItemQFormer, params: Any, folder: Path, shares: Shares = ALONE) -> dict[str, Any]:
    """Writes `tokens.npy` (float16 [I, Q, D]) and `vectors.npy` (float16 [I, D]) atomically, in bounded memory.

    Args:
      run: The run.
      module: The Item Q-Former.
      params: Its parameters.
      folder: Where to.
      shares: How the processes share the work; with a folder, all of them have to call, and the first one writes.

    Raises:
      ValueError: A file with the name of a part is none; it is kept.
    """
    items, encode = len(run.dataset.catalogue.item_ids), make_encode(module, params, run.cache)
    if shares.folder is not None:
        shares.fill("items", items, encode)
        # Parts that are gone would be made again by who has yet to look.
        barrier("tokens are encoded")
        if not is_primary():
            return {}
    queries, width = run.config.item.qformer.queries, run.config.item.qformer.width
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"tokens": (items, queries, width), "vectors": (items, width)}
    parts = {name: files.partial(folder / f"{name}.npy") for name in shapes}
    arrays = {name: np.lib.format.open_memmap(parts[name], "w+", np.float16, shape) for name, shape in shapes.items()}
    for where, made in shares.each("items", items, encode):
        for name, array in arrays.items():
            array[where] = made[name]
    for name, array in arrays.items():
        array.flush()
        files.publish(parts[name], folder / f"{name}.npy")
    return {"items": items, "queries": queries, "width": width}


def make_tokens(run: Run) -> dict[str, Any]:
    """Runs the tokens stage: item tokens and vectors, and the whitenings of the fields and of the candidates' texts."""
    module, params = load_items(run)
    folder, shares = run.folder / "tokens", ALONE
    if run.cache.items > ALONE.size:
        shares = Shares(folder=folder / f"parts-{_made_of(run)}")
    elif not is_primary():
        return {}
    report = write_tokens(run, module, params, folder, shares)
    if not is_primary():
        return {}
    if shares.folder is not None:
        shares.remove("items")
    tables = {name: run.cache.table(name) for name in run.cache.names}
    if run.cache.candidates is not None:
        tables[CANDIDATE] = run.cache.candidates
    # A width of 0 is for the text embeddings as they are; the fields' components then have no limit.
    width = run.config.candidates.text_width
    whitenings = {name: fit_whitening(table, width or table.values.shape[1]) for name, table in tables.items()}
    save_whitenings(run.folder / "tokens" / WHITENING, whitenings)
    report["whitened_widths"] = {name: whitening.matrix.shape[1] for name, whitening in whitenings.items()}
    return report


def _made_of(run: Run) -> str:
    """A digest of all that tokens depend on: parts of another Item Q-Former, or of other fields, are none of these."""
    records = {name: (read_record(run.folder / name) or {}).get("files") for name in ("fields", "item")}
    return fingerprint(records | {"items of a part": ALONE.size, "at a time": ENCODE_CHUNK})[:16]


TOKENS = Stage(
    name="tokens",
    after=("item",),
    reads=("candidates.text_width",),
    writes=("tokens.npy", "vectors.npy", WHITENING, "parts-*"),
    checked=("tokens/*.np?",),
    make=make_tokens,
)
