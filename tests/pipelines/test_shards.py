"""Batches follow from their number: any start, any number of workers, any number of processes that share them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from nqf.config import LossConfig
from nqf.pipelines.datasets import TrainingData, history_dataset, pair_dataset
from nqf.pipelines.histories import training_windows
from nqf.pipelines.pairs import pair_source
from nqf.stages.item import gather_fields
from nqf.stages.run import Run, open_run
from nqf.training.mesh import WHOLE, leaf_name


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return open_run(tiny_run)


def pairs(run: Run, *, workers: int = 0, shard: tuple[int, int] = (0, 1)) -> TrainingData:
    items = len(run.dataset.catalogue.item_ids)
    source = pair_source(run.dataset.interactions, run.dataset.split, items, np.zeros(items, bool))
    cache = run.cache
    return pair_dataset(
        source,
        batch_size=24,
        epochs=3,
        seed=1,
        workers=workers,
        gather=lambda rows: gather_fields(cache, rows),
        shard=shard,
    )


def histories(run: Run, *, negatives: str, tables: bool, shard: tuple[int, int] = (0, 1)) -> TrainingData:
    events, items = len(run.dataset.interactions.items), len(run.dataset.catalogue.item_ids)
    return history_dataset(
        training_windows(run.dataset.interactions, run.dataset.split, 8),
        run.features,
        loss=LossConfig(negatives=negatives, samples=32),
        max_history=10,
        positions=8,
        item_dropout=0.1,
        batch_size=24,
        epochs=2,
        seed=1,
        workers=0,
        items=items,
        tables=run.tables(run.folder / "tokens") if tables else None,
        given=np.random.default_rng(0).integers(-1, items, (events, 3)).astype(np.int32),
        shard=shard,
    )


def leaves(batch: object) -> dict[str, np.ndarray]:
    return {leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_slices_of_pairs_make_the_batch(run: Run) -> None:
    for number in (0, 7):
        whole = leaves(pairs(run).batches[number])
        slices = [leaves(pairs(run, shard=(index, 3)).batches[number]) for index in range(3)]
        assert_same({name: np.concatenate([part[name] for part in slices]) for name in whole}, whole)


@pytest.mark.slow
@pytest.mark.parametrize("negatives", ["full", "sampled", "in-batch"])
def test_slices_of_histories_make_the_batch(run: Run, negatives: str) -> None:
    tables = negatives != "full"
    for number in (0, 5):
        whole = leaves(histories(run, negatives=negatives, tables=tables).batches[number])
        slices = [
            leaves(histories(run, negatives=negatives, tables=tables, shard=(index, 4)).batches[number])
            for index in range(4)
        ]
        joined = {
            name: slices[0][name] if name in WHOLE else np.concatenate([part[name] for part in slices])
            for name in whole
        }
        assert_same(joined, whole)
        for name in set(whole) & set(WHOLE):
            for part in slices:
                np.testing.assert_array_equal(part[name], whole[name])


@pytest.mark.slow
def test_targets_bring_the_negatives_that_were_given_for_them(run: Run) -> None:
    given = np.random.default_rng(0).integers(-1, len(run.dataset.catalogue.item_ids), (len(run.features.items), 3))
    wanted: dict[int, set] = {}
    for item, row in zip(run.features.items, given, strict=True):
        wanted.setdefault(int(item), set()).add(tuple(row))
    batch = histories(run, negatives="sampled", tables=False).batches[2]
    rows = np.append(batch.rows, -1)
    targets, found = rows[batch.targets], rows[batch.given]
    assert (targets >= 0).sum() > 50 and np.all(found[targets < 0] == -1)
    for target, row in zip(targets[targets >= 0], found[targets >= 0], strict=True):
        assert tuple(row) in wanted[target]


@pytest.mark.slow
def test_uneven_slices_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="5 processes cannot share batches of 24"):
        pairs(run, shard=(0, 5))


@pytest.mark.ci
@pytest.mark.slow
def test_iteration_starts_anywhere_and_workers_change_nothing(run: Run) -> None:
    data = pairs(run)
    whole = [leaves(batch) for batch in data.iterate(0)]
    assert len(whole) == data.steps
    assert any(not np.array_equal(whole[0]["anchors"], batch["anchors"]) for batch in whole[1:])
    for start in (1, data.steps_per_epoch, data.steps - 1):
        rest = [leaves(batch) for batch in data.iterate(start)]
        assert len(rest) == data.steps - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert_same(one, other)
    for start in (0, 3):
        for one, other in zip(pairs(run, workers=2).iterate(start), whole[start:], strict=True):
            assert_same(leaves(one), other)
    assert_same(leaves(data.batches[4]), whole[4])
