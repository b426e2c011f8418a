"""`nqf.fit`: two tables with odd names, in memory or on disk, become a run like that of the command."""

import dataclasses
import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

import nqf
from nqf import train
from nqf.config import Config, ConfigError, from_tree, load_config
from nqf.data.errors import DataError
from nqf.data.frames import frame_of
from nqf.tools.fit import scaled

TINY = Path(__file__).parents[1] / "tiny.yaml"


def shop(items: int = 60, customers: int = 50, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    rng = np.random.default_rng(seed)
    words = [["walnut", "oak", "steel"], ["desk", "lamp", "chair", "shelf"]]
    goods = pl.DataFrame(
        {
            "SKU": [f"sku-{row}" for row in range(items)],
            "Product name": [f"{rng.choice(words[0])} {rng.choice(words[1])} {row}" for row in range(items)],
            "color": rng.choice(["red", "blue", "green"], items),
            "List price": [None if rng.random() < 0.1 else round(rng.gamma(3, 20), 2) for _ in range(items)],
        }
    )
    begin = datetime.datetime(2024, 1, 1)
    rows = []
    for customer in range(customers):
        size = int(rng.integers(1, 12))
        for item, day in zip(rng.choice(items, size, replace=False), np.sort(rng.integers(0, 300, size)), strict=True):
            time = begin + datetime.timedelta(days=int(day))
            rows.append((f"c{customer}", f"sku-{item}", time, float(rng.integers(1, 6))))
    events = pl.DataFrame(rows, schema=["who bought", "what", "ordered_at", "stars"], orient="row")
    return goods, events


NAMES = {"user": "who bought", "item": "what", "time": "ordered_at", "rating": "stars"}


def small() -> Config:
    """Few steps of small models."""
    config = load_config(TINY)
    return dataclasses.replace(config, baselines=dataclasses.replace(config.baselines, sasrec=False))


@pytest.mark.ci
@pytest.mark.slow
def test_a_shop_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    items, events = shop()
    rec = nqf.fit(items, events, **NAMES, run=tmp_path / "run", config=small())
    said = capsys.readouterr().out
    for line in (
        "Product name: text",
        "color: category",
        "List price: number",
        "data.split: temporal",
        "stage 1 of 7",
    ):
        assert line in said, line
    assert "the run is in" in said
    short = events.group_by("who bought").len().filter(pl.col("len") < 3)["who bought"].to_list()
    assert short and set(rec.user_ids) == set(events["who bought"])
    assert rec.recommend(user=short[0], k=3)["basis"].to_list() == ["history"] * 3
    assert rec.recommend(history=["sku-1"], k=3, where={"color": "red"}).height == 3
    interactions = rec._run.dataset.interactions
    assert np.isfinite(interactions.ratings).all() and (interactions.times > 1.7e9).all()
    # Again, from pandas: the same tables, so that nothing is left to be done.
    again = nqf.fit(as_pandas(items), as_pandas(events), **NAMES, run=tmp_path / "run", config=small())
    assert capsys.readouterr().out.count("up to date") == 7
    assert again.recommend(history=["sku-1"], k=9).equals(rec.recommend(history=["sku-1"], k=9))
    # The command resumes it like any run of its own.
    train.main(["--run", str(tmp_path / "run"), "--stage", "item"])
    assert "up to date" in capsys.readouterr().out


def as_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({name: frame[name].to_list() for name in frame.columns}, index=np.arange(len(frame)) + 7)


def test_tables_of_all_kinds_are_the_same() -> None:
    items, events = shop()
    for frame in (items, events):
        assert frame_of(frame.lazy()).equals(frame)
        assert frame_of(frame) is frame
        read = frame_of(as_pandas(frame))
        assert read.columns == frame.columns
        assert read.cast({"ordered_at": pl.Datetime("us")} if "ordered_at" in read.columns else {}).equals(frame)

    class Arrow:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return items.__arrow_c_stream__(requested_schema)

    assert frame_of(Arrow()).equals(items)
    odd = pd.DataFrame(
        {"a": pd.array([1, None], "Int64"), "b": pd.Categorical(["x", None]), "c": ["y", np.nan], 4: [0, 1]}
    )
    assert frame_of(odd).to_dict(as_series=False) == {"a": [1, None], "b": ["x", None], "c": ["y", None], "4": [0, 1]}
    with pytest.raises(DataError, match="a dict is no table; give a DataFrame"):
        frame_of({"a": [1]})
    with pytest.raises(DataError, match="two columns of one name"):
        frame_of(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_what_cannot_be_fitted(tmp_path: Path) -> None:
    items, events = shop(20, 6)
    with pytest.raises(DataError, match=r"no column 'who bougt'.*did you mean 'who bought'"):
        nqf.fit(items, events, **NAMES | {"user": "who bougt"}, run=tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="no column"):
        nqf.fit(items.rename({"SKU": "thing"}), events, **NAMES, run=tmp_path / "run", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("of years")
    with pytest.raises(RuntimeError, match="not a run folder and not empty"):
        nqf.fit(items, events, **NAMES, run=tmp_path / "mine", quiet=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError):
        nqf.fit(items, events, **NAMES, run=tmp_path / "run", config=tmp_path / "none.yaml", quiet=True)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (300, 500, 4_000), (1_682, 943, 100_000), (3_000, 4_000, 56_000),
                                   (200_000, 10**6, 10**8)])  # fmt: skip
def test_sizes_follow_from_the_data(sizes: tuple[int, int, int]) -> None:
    config = from_tree(Config, scaled(*sizes))
    steps = config.joint.optim.epochs * max(1, sizes[1] // config.joint.optim.batch_size)
    assert config.user.loss.negatives == ("sampled" if sizes[0] > 50_000 else "full")
    assert sizes[1] < 100 or steps >= 200
    if sizes == (3_000, 4_000, 56_000):
        shipped = load_config(Path(nqf.__file__).parents[1] / "configs" / "quickstart.yaml")
        # What is learned by heart ends early; the shipped recipe was chosen to its last epoch.
        assert config.item.optim == dataclasses.replace(shipped.item.optim, patience=4)
        assert config.candidates == shipped.candidates
