"""Grain datasets of the training stages. Only this folder imports grain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grain
import numpy as np

from nqf.config import LossConfig
from nqf.pipelines.batches import HistoryBatch, ItemTables, PairBatch
from nqf.pipelines.histories import (
    EventFeatures,
    TrainingWindows,
    bucket_of,
    gather_history,
    hide_features,
    number_by_rows,
    slot_buckets,
    supervised_places,
    usual_places,
    window_events,
)
from nqf.pipelines.pairs import PairSource, pair_batch

UNKNOWN_SHARE = 0.1
"""Share of the training histories whose times, ratings and reviews are hidden, so that histories of bare items,
which is what a caller of `Recommender.recommend` often has, are nothing new to the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A finite, ordered list of batches. Each follows from its number alone, so a step is a position in the data.

    Attributes:
      batches: Grain dataset of the batches of all epochs.
      examples: The example numbers of every batch.
      users: int64, user row of every example.
      workers: Worker processes; 0 reads in threads.
      steps: Batches over all epochs.
      steps_per_epoch: Batches of one epoch.
      batch_size: Examples per batch.
    """

    batches: grain.MapDataset
    examples: grain.MapDataset
    users: np.ndarray
    workers: int
    steps: int
    steps_per_epoch: int
    batch_size: int

    def iterate(self, start: int) -> Iterator[Any]:
        """The batches from number `start` on, read ahead."""
        # Few threads: the builders are numpy code that releases the lock only in parts.
        dataset = self.batches[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        if self.workers:
            # grain 0.2.18 reads absl flags in its workers and fails in programs that never parsed them (grain#1355).
            from absl import flags

            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return iter(dataset)


def pair_dataset(
    source: PairSource,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    workers: int,
    gather: Callable[[np.ndarray], tuple[dict, dict]] | None,
    shard: tuple[int, int] = (0, 1),
) -> TrainingData:
    """Batches of the item stage.

    Args:
      source: Pairs and trainable items.
      batch_size: Pairs per batch; smaller where there are fewer pairs.
      epochs: Passes over the pairs.
      seed: Seed of order and draws.
      workers: Worker processes; 0 reads in threads.
      gather: Reads the fields of int32 [n] items on the host; None if the step does so on the device.
      shard: Which of how many slices of every batch is built here; all processes draw the same batches.

    Raises:
      ValueError: No pair is left to train on, or the batch has no such slices.
    """
    if not len(source.users):
        raise ValueError("no pair of consecutive training interactions is left to train the item stage on")
    batch_size = min(batch_size, len(source.users))

    def build(examples: np.ndarray, rng: np.random.Generator) -> PairBatch:
        batch = pair_batch(source, examples, rng, _slice(len(examples), shard))
        if gather is None:
            return batch
        values, present = gather(batch.items().ravel())
        shape = batch.items().shape
        values = {name: array.reshape(*shape, -1) for name, array in values.items()}
        return batch.replace(values=values, present={name: array.reshape(shape) for name, array in present.items()})

    examples = (
        grain.MapDataset.range(len(source.users))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True, batch_fn=_indices)
        .repeat(max(epochs, 1))
    )
    return _finish(examples, build, source.users, epochs, batch_size, workers, shard)


# Many parameters: settings of the data that have nothing in common but this call, which names them.
def history_dataset(
    windows: TrainingWindows,
    features: EventFeatures,
    *,
    loss: LossConfig,
    max_history: int,
    positions: int,
    item_dropout: float,
    batch_size: int,
    epochs: int,
    seed: int,
    workers: int,
    items: int,
    tables: ItemTables | None,
    given: np.ndarray | None = None,
    shard: tuple[int, int] = (0, 1),
    even_slots: bool = False,
) -> TrainingData:
    """Batches of the user and joint stages, each from histories of about one length.

    Args:
      windows: Training examples.
      features: Features of all events.
      loss: Decides whether batches are numbered by their distinct items and carry sampled negatives.
      max_history: Most slots.
      positions: Supervised positions, counted from the newest slot.
      item_dropout: Probability that a slot of a history is hidden.
      batch_size: Windows per batch; smaller where there are fewer windows.
      epochs: Passes over the windows.
      seed: Seed of order and draws.
      workers: Worker processes; 0 reads in threads.
      items: Number of catalogue items, from which negatives are sampled evenly.
      tables: Host tables to gather from; None if they are on the device.
      given: int32 [events, K], negatives of each event's item alone, -1 for none.
      shard: Which of how many slices of every batch is built here; all processes draw the same batches.
      even_slots: Whether a batch has the fewer windows the longer they are, `batch_size` of the mean length.

    Raises:
      ValueError: No window is left to train on, or the batch has no such slices.
    """
    count = len(windows.ends)
    if not count:
        raise ValueError("no training history with at least two interactions is left to train on")
    batch_size = min(batch_size, count)
    # A position without a target is not computed.
    positions = positions if loss.positions == "all" else 1
    longest = int(min(max_history, windows.slots().max()))
    buckets = slot_buckets(longest)
    sizes = [batch_size] * len(buckets)
    if even_slots:
        whole = batch_size * np.minimum(windows.slots(), longest).mean() / shard[1]
        sizes = [max(1, int(whole // slots)) * shard[1] for slots in buckets]
    groups = _merge_small(bucket_of(windows.slots(), buckets), sizes)

    def build(element: tuple[int, int, np.ndarray], rng: np.random.Generator) -> HistoryBatch:
        slots, usual, examples = element
        history, targets = window_events(windows, examples, slots)
        targets = targets[:, -positions:]
        if item_dropout:
            history = np.where(rng.random(history.shape) < item_dropout, -1, history)
        hidden = rng.random(len(examples)) < UNKNOWN_SHARE
        mine = _slice(len(examples), shard)
        gathered = hide_features(gather_history(features, history[mine]), hidden[mine])
        own = None if given is None else np.where(targets[..., None] >= 0, given[targets], -1)
        targets = np.where(targets >= 0, features.items[np.maximum(targets, 0)], -1).astype(np.int32)
        batch = HistoryBatch(history=gathered, targets=targets[mine], supervised=supervised_places(targets, usual))
        if loss.negatives == "full":
            return batch
        if loss.negatives == "sampled":
            batch = batch.replace(negatives=rng.integers(0, items, loss.samples, dtype=np.int32))
        everyone = np.concatenate([np.where(history >= 0, features.items[np.maximum(history, 0)], -1), targets], axis=1)
        if own is not None:
            batch = batch.replace(given=own[mine])
            everyone = np.concatenate([everyone, own.reshape(len(own), -1)], axis=1)
        return number_by_rows(batch, tables, everyone, shard)

    parts = []
    for index, members in enumerate(groups):
        if not len(members):
            continue
        slots, size = buckets[index], min(sizes[index], len(members))
        places = min(slots, positions)
        counts = np.minimum(windows.slots()[members], places)
        usual = usual_places(counts, size, size * places)
        parts.append(
            grain.MapDataset.source(cast(Sequence[int], members))
            .seed(seed + index)
            .shuffle()
            .batch(size, drop_remainder=True, batch_fn=_indices)
            .map(lambda examples, slots=slots, usual=usual: (slots, usual, examples))
        )
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, [len(part) for part in parts])
    return _finish(mixed.repeat(max(epochs, 1)).seed(seed), build, windows.users, epochs, batch_size, workers, shard)


def _slice(size: int, shard: tuple[int, int]) -> slice:
    index, count = shard
    return slice(index * size // count, (index + 1) * size // count)


def _indices(elements: Sequence[Any]) -> np.ndarray:
    return np.asarray(elements, np.int64)


def _merge_small(bucket: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Members of each bucket; one that cannot fill a batch joins the next longer one, the last the one before."""
    groups = [np.flatnonzero(bucket == index) for index in range(len(sizes))]
    for index in range(len(sizes) - 1):
        if len(groups[index]) < sizes[index]:
            groups[index + 1] = np.concatenate([groups[index], groups[index + 1]])
            groups[index] = groups[index][:0]
    if len(groups[-1]) < sizes[-1]:
        # The longest bucket alone is too small: everything shorter that is nearest joins it.
        for index in range(len(sizes) - 2, -1, -1):
            if len(groups[index]):
                groups[-1] = np.concatenate([groups[index], groups[-1]])
                groups[index] = groups[index][:0]
                break
    return groups


def _finish(
    examples: grain.MapDataset,
    build: Callable,
    users: np.ndarray,
    epochs: int,
    batch_size: int,
    workers: int,
    shard: tuple[int, int],
) -> TrainingData:
    if batch_size % shard[1]:
        raise ValueError(
            f"{shard[1]} processes cannot share batches of {batch_size} examples evenly; set the stage's "
            "optim.batch_size to a multiple of their number, and not beyond the number of examples"
        )
    return TrainingData(
        batches=examples.random_map(build),
        examples=examples.map(lambda element: element[-1] if isinstance(element, tuple) else element),
        users=users,
        workers=workers,
        steps=len(examples) if epochs else 0,
        steps_per_epoch=len(examples) // max(epochs, 1),
        batch_size=batch_size,
    )
