"""The reference's files with times, ratings and reviews, and its train and test files as the split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import unirec_files
from hypothesis import given
from hypothesis import strategies as st

from nqf.config import ConfigError, DataConfig, load_config
from nqf.data.errors import DataError
from nqf.data.load import Dataset, prepare
from nqf.data.unirec import _aligned
from nqf.evaluation.legacy import legacy_ranks
from nqf.interop.unirec.embeddings import catalogue_embeddings

CONFIG = Path(__file__).parents[2] / "configs" / "unirec.yaml"


def prepared(folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> tuple[Dataset, Path, DataConfig]:
    data = unirec_files.write(folder, **options)
    # As of a shipped configuration, which is named in the folder of the data.
    patch.chdir(folder)
    config = load_config(CONFIG).data
    assert config.items == str(data / "dict" / "All_Beauty_item_triplet_dict.json")
    return prepare(config, folder / "data"), data, config


def samples_of(data: Path, part: str) -> list[dict[str, Any]]:
    return json.loads((data / "data" / f"Amazon_All_Beauty_20_{part}.json").read_text())


def test_the_files_are_the_data_and_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, data, _ = prepared(tmp_path, monkeypatch)
    interactions, split, ids = dataset.interactions, dataset.split, dataset.catalogue.item_ids
    inter = pl.read_csv(data / "Amazon_All_Beauty.inter", separator="\t")
    reviews = json.loads((data / "dict" / "All_Beauty_review_dict.json").read_text())
    assert interactions.reviews is not None and not [line for line in split.warnings if "samples" in line]
    for row, user_id in enumerate(interactions.user_ids):
        events = slice(interactions.offsets[row], interactions.offsets[row + 1])
        known = inter.filter(pl.col("user_id:token") == user_id).sort("timestamp:float")[
            -len(interactions.items[events]) :
        ]
        assert [ids[item] for item in interactions.items[events]] == known["item_id:token"].to_list()
        np.testing.assert_array_equal(interactions.ratings[events], known["rating:float"])
        np.testing.assert_array_equal(interactions.times[events], known["timestamp:float"].cast(pl.Int64) // 1_000)
        bought = known["item_id:token"].to_list()
        for at, (item_id, text) in enumerate(zip(bought, interactions.reviews[events], strict=True)):
            review = reviews[f"{user_id}|{item_id}"]
            # The dictionary has the last review of an item alone.
            assert text == (None if item_id in bought[at + 1 :] else f"{review['title']}\n{review['text']}")
    test = {sample["user_id"]: sample for sample in samples_of(data, "test")}
    assert len(split.test.users) == len(test)
    for row, cut in zip(split.test.users, split.test.cuts, strict=True):
        sample = test[interactions.user_ids[row]]
        past = [ids[item] for item in interactions.items[interactions.offsets[row] : cut]]
        assert ids[interactions.items[cut]] == sample["ground_truth"] and past[-20:] == sample["history"]
        given = [ids[item] for item in split.candidates(np.array([cut]))[0]]
        assert given == [item for item in sample["candidate"] if item != sample["ground_truth"]]
    train = samples_of(data, "train")
    assert len(split.valid.users) == round(0.1 * len(train))
    assert not split.train[split.valid.cuts].any() and not split.train[split.test.cuts].any()
    assert split.train.sum() == sum(len(sample["history"]) + 1 for sample in train) - len(split.valid.users)


def test_users_of_the_test_file_may_be_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, data, _ = prepared(tmp_path, monkeypatch, samples=unirec_files.new_users)
    tested = {dataset.interactions.user_ids[row] for row in dataset.split.test.users}
    assert tested == {sample["user_id"] for sample in samples_of(data, "test")}
    users = np.array(dataset.interactions.user_ids)[dataset.interactions.users[dataset.split.train]]
    assert not tested & set(users)
    assert np.isfinite(dataset.interactions.ratings).all()


def test_what_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data, config = prepared(tmp_path, monkeypatch, users=12, candidates=40)
    path, test = (data / "data" / f"Amazon_All_Beauty_20_{part}.json" for part in ("train", "test"))
    samples = json.loads(path.read_text())
    samples[0]["ground_truth"] = "not in the dictionary"
    path.write_text(json.dumps(samples))
    inter = (data / "Amazon_All_Beauty.inter").read_text().splitlines()
    (data / "Amazon_All_Beauty.inter").write_text(
        "\n".join(line for line in inter if samples[1]["user_id"] not in line)
    )
    dataset = prepare(config, tmp_path / "data")
    told = "\n".join(dataset.split.warnings)
    assert f"{path}: 1 samples are left out" in told and "interactions of the samples are not in data.inter" in told
    # The review dictionary has times and ratings, too.
    row = dataset.interactions.user_row(samples[1]["user_id"])
    assert np.isfinite(dataset.interactions.ratings[dataset.interactions.offsets[row]])
    test.unlink()
    with pytest.raises(DataError, match=r"data\.split: samples needs a test file beside it"):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize("options", [{"inter": "x.inter"}, {"reviews": "x.json"}, {"split": "samples"}])
def test_keys_of_the_reference_s_files_are_for_its_format(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="belongs to UniRec's sample files"):
        DataConfig(**options)


@given(st.data())
def test_times_and_ratings_find_their_interactions(data: st.DataObject) -> None:
    items = data.draw(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=12))
    times = sorted(data.draw(st.lists(st.integers(0, 20), min_size=len(items), max_size=len(items))))
    told = [(item, time, f"{time} of {item}") for item, time in zip(items, times, strict=True)]
    first = data.draw(st.integers(0, len(items) - 1))
    last = data.draw(st.integers(first + 1, len(items)))
    found = _aligned(items[first:last], told)
    # Where the same items stand there twice, any of the two parts is as good.
    parts = [
        told[at : at + last - first] for at in range(len(items)) if items[at : at + last - first] == items[first:last]
    ]
    assert [(time, rating) for _, time, rating in parts[0]] == found
    # Interactions of one time stand in another order there; each still has its own.
    shuffled = sorted(told[first:last], key=lambda event: (event[1], event[0]))
    if len(parts) == 1:
        for (item, *_), (time, rating) in zip(shuffled, _aligned([item for item, *_ in shuffled], told), strict=True):
            assert rating == f"{time} of {item}"


def test_candidates_of_a_sample_are_ranked_and_others_drawn() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 150))
    given = np.array([[5, 9, 70], [-1, -1, -1], [8, -1, -1]], np.int32)
    targets = np.array([1, 2, 3])
    ranks = legacy_ranks(lambda rows: scores[rows], targets, [np.zeros(0, int)] * 3, items=150, seed=0, given=given)
    assert ranks[0] == 1 + (scores[0, [5, 9, 70]] > scores[0, 1]).sum()
    assert ranks[2] == 1 + (scores[2, 8] > scores[2, 3])
    drawn = legacy_ranks(lambda rows: scores[rows + 1], targets[1:2], [np.zeros(0, int)], items=150, seed=0)
    assert ranks[1] == drawn[0]


def test_candidate_embeddings_stand_in_the_catalogue_s_order(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('{"b": [1, 2], "x": [5, 6], "a": [3, 4]}')
    vectors, there = catalogue_embeddings(tmp_path / "e.json", ["a", "none", "b"])
    np.testing.assert_array_equal(vectors, [[3, 4], [0, 0], [1, 2]])
    assert there.tolist() == [True, False, True]
    with pytest.raises(DataError, match="none of the catalogue's items, such as 'c'"):
        catalogue_embeddings(tmp_path / "e.json", ["c"])
