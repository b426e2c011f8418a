"""A run folder opened for work: configuration, data, field cache and item tables, each read when first asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from nqf import files
from nqf.config import Config, load_config
from nqf.data.errors import NPY_ERRORS
from nqf.data.load import Dataset, open_dataset
from nqf.data.splits import Cases
from nqf.evaluation.baselines import known_events
from nqf.fields.cache import CANDIDATE, FieldCache, open_cache
from nqf.fields.whitening import Whitening, field_features, load_whitenings
from nqf.interop.encoders import encoder_factories
from nqf.pipelines.batches import ItemTables
from nqf.pipelines.histories import EventFeatures, event_features
from nqf.stages.neighbors import find_neighbors, neighbor_features
from nqf.stages.records import StageError, check_files

WHITENING = "whitening.npz"
"""Name of the whitenings in the tokens stage's folder."""
# Items whose field vectors are in memory as float32 at a time.
_CHUNK = 16_384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder.

    Attributes:
      folder: `runs/<name>`.
      config: The resolved configuration.
      console: Terminal.
      profile: Steps of each training stage to trace.
      saved: Called when a checkpoint is whole and when a stage has finished.
    """

    folder: Path
    config: Config
    console: Console
    profile: int = 0
    saved: Callable[[], None] | None = None

    @functools.cached_property
    def dataset(self) -> Dataset:
        """Catalogue, interactions and split, as the fields stage left them."""
        check_files(self.folder, "fields")
        return open_dataset(self.folder / "data")

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """The compute dtype of `training.dtype`: `auto` is bfloat16 on accelerators and float32 on CPU."""
        name = self.config.training.dtype
        if name == "auto":
            return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        return jnp.dtype(name)

    def ids(self, users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
        """Ids of rows of users and items, as text, for what is written down of a batch."""
        user_ids, item_ids = self.dataset.interactions.user_ids, self.dataset.catalogue.item_ids
        return {
            "user_ids": np.asarray(user_ids)[users].astype(str),
            "item_ids": np.asarray(item_ids)[items].astype(str),
        }

    @functools.cached_property
    def cache(self) -> FieldCache:
        """The field cache, checked against the catalogue."""
        return open_cache(
            self.folder / "fields",
            item_ids=self.dataset.catalogue.item_ids,
            verify=True,
            factories=encoder_factories(self.config.fields),
        )

    @functools.cached_property
    def features(self) -> EventFeatures:
        """Features of every interaction."""
        return event_features(self.dataset.interactions, self.dataset.split, self.cache.reviews)

    @functools.cached_property
    def text(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidate text embeddings as encoded, float32 [I, T], zero without text, and bool [I] where there is text."""
        table = self.cache.candidates
        if table is None:
            items = len(self.dataset.catalogue.item_ids)
            return np.zeros((items, 1), np.float32), np.zeros(items, bool)
        rows = np.asarray(table.rows)
        values = np.asarray(table.values, np.float32)
        return np.where(rows[:, None] >= 0, values[np.maximum(rows, 0)], 0), rows >= 0

    @functools.cached_property
    def whitenings(self) -> dict[str, Whitening]:
        """What the tokens stage fitted: of every field and of the candidates' texts."""
        check_files(self.folder, "tokens")
        return load_whitenings(self.folder / "tokens" / WHITENING)

    def text_features(self, embeddings: np.ndarray, has_text: np.ndarray) -> np.ndarray:
        """What the models read of text embeddings [n, T]: float32 [n, T'], zero without text."""
        whiten = self.config.candidates.text_width and self.cache.candidates is not None
        features = self.whitenings[CANDIDATE].apply(embeddings) if whiten else embeddings
        return np.where(has_text[:, None], features, 0).astype(np.float32)

    def field_features(self, fields: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """What the candidate tower reads of the fields' vectors, float16 [n, F]; F is 0 unless they are its source.

        Args:
          fields: Field name to vectors, float [n, width], and where there is one, bool [n].
        """
        names = self.cache.names
        if "fields" not in self.config.candidates.sources:
            return np.zeros((len(fields[names[0]][1]), 0), np.float16)
        return field_features(self.whitenings, {name: fields[name] for name in names})

    @functools.cached_property
    def _found_neighbors(self) -> dict[bytes, tuple[np.ndarray, np.ndarray]]:
        return {}

    def neighbors(self, before: Cases | None) -> tuple[np.ndarray, np.ndarray]:
        """What `find_neighbors` finds in the events that `before` of `tables` means, which are counted once."""
        interactions, split = self.dataset.interactions, self.dataset.split
        counted = split.train if before is None else known_events(interactions, split, before)
        key = hashlib.sha256(counted.tobytes()).digest()
        if key not in self._found_neighbors:
            self._found_neighbors[key] = find_neighbors(interactions, counted, len(split.cold))
        return self._found_neighbors[key]

    def tables(
        self, tokens_folder: Path, titles: np.ndarray | None = None, *, before: Cases | None = None
    ) -> ItemTables:
        """Host tables of the whole catalogue.

        Args:
          tokens_folder: Folder with tokens.npy and vectors.npy.
          titles: Token ids of the titles, int32 [I, S]; default none.
          before: Neighbors are those of the events that are known before these cases (`known_events`); by default those
            of the training events.
        """
        # Of the joint stage, whoever restores its checkpoint checks the files; while it trains, there is no record.
        check_files(self.folder, "tokens")
        text, has_text = self.text
        items = len(has_text)
        fields = neighbors = np.zeros((items, 0), np.float16)
        sources, names = self.config.candidates.sources, self.cache.names
        if {"fields", "neighbors"} & set(sources):
            chunks = [
                field_features(self.whitenings, {name: self.cache.gather(name, rows) for name in names})
                for rows in np.split(np.arange(items), range(_CHUNK, items, _CHUNK))
            ]
            features = np.concatenate(chunks)
            fields = features if "fields" in sources else fields
            if "neighbors" in sources:
                neighbors = neighbor_features(features, *self.neighbors(before))
        return ItemTables(
            tokens=_mapped(tokens_folder / "tokens.npy"),
            vectors=_mapped(tokens_folder / "vectors.npy"),
            fields=fields,
            neighbors=neighbors,
            text=self.text_features(text, has_text),
            has_text=has_text,
            trained=~self.dataset.split.cold,
            titles=np.zeros((items, 0), np.int32) if titles is None else titles,
        )

    def abstract_tables(self, words: int = 0) -> ItemTables:
        """Item tables of the run's shapes that take no memory, for plans: every element is the same zero.

        Args:
          words: Title tokens of an item.
        """
        items, config, candidates = len(self.dataset.catalogue.item_ids), self.config, self.cache.candidates
        width = config.candidates.text_width
        text = candidates.values.shape[1] if candidates is not None else 1
        if width and candidates is not None:
            text = min(text, width)
        fields = sum(min(natural, width or natural) for natural in self.cache.widths.values())

        def zeros(dtype: Any, *shape: int) -> np.ndarray:
            return np.broadcast_to(np.zeros((), dtype), shape)

        return ItemTables(
            tokens=zeros(np.float16, items, config.item.qformer.queries, config.item.qformer.width),
            vectors=zeros(np.float16, items, config.item.qformer.width),
            **{
                source: zeros(np.float16, items, fields if source in config.candidates.sources else 0)
                for source in ("fields", "neighbors")
            },
            text=zeros(np.float32, items, text),
            has_text=zeros(bool, items),
            trained=zeros(bool, items),
            titles=zeros(np.int32, items, words),
        )


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        raise StageError(f"{path}: not readable ({error}); delete its stage.json and run --stage all") from error


def open_run(folder: str | Path, console: Console | None = None) -> Run:
    """Opens a run folder by what it holds.

    Raises:
      StageError: The folder does not exist or holds no run.
    """
    if files.is_address(str(folder)):
        raise StageError(f"{files.masked(str(folder))}: an address; nqf.stages.remote.local_run gives a local copy")
    folder = Path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise StageError(f"{folder}: no run here (no config.yaml); train one with python -m nqf.train --run {folder}")
    return Run(folder=folder, config=load_config(path), console=console or Console())
