"""The audit: every planted leak is found, and data without one is clean."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from rich.console import Console

from nqf import cli
from nqf.audit import LEAK, _print, main
from nqf.config import DataConfig
from nqf.data.load import Dataset, prepare
from nqf.data.unirec import read_samples
from nqf.tools.audit import Audit, _association, audit

USERS, ITEMS, DAYS = 300, 150, 100
DAY = 86_400


@dataclasses.dataclass
class Tables:
    """Tables without a leak; a test plants one."""

    items: pl.DataFrame
    events: pl.DataFrame
    fields: dict[str, object]

    def write(self, folder: Path, **data: object) -> Path:
        folder.mkdir(exist_ok=True)
        self.items.write_parquet(folder / "items.parquet")
        self.events.write_parquet(folder / "events.parquet")
        (folder / "schema.yaml").write_text(yaml.safe_dump({"title": "title", "fields": self.fields}, sort_keys=False))
        paths = {"items": "items.parquet", "interactions": "events.parquet", "schema": "schema.yaml"}
        tree = {"data": {"format": "table", "split": "temporal", **paths, **data}}
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        return folder / "config.yaml"

    def prepare(self, folder: Path, **data: object) -> Dataset:
        self.write(folder)
        paths = {"items": "items.parquet", "interactions": "events.parquet", "schema": "schema.yaml"}
        config = DataConfig(
            format="table",
            use_after_the_fact=True,
            **{key: str(folder / name) for key, name in paths.items()},
            **{"split": "temporal", **data},
        )
        return prepare(config, folder / "data")


@pytest.fixture
def clean() -> Tables:
    """Users who choose by popularity all the time, ids in no order, one price that nobody cares about."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(ITEMS)
    share = 1 / np.arange(1, ITEMS + 1) ** 0.7
    items = pl.DataFrame(
        {
            "item_id": [f"i{number:03d}" for number in ids],
            "title": [f"Thing {number}" for number in range(ITEMS)],
            "shelf": [f"shelf {number % 7}" for number in range(ITEMS)],
            "price": rng.uniform(1, 9, ITEMS),
        }
    )
    rows = []
    for user in range(USERS):
        times = rng.choice(DAYS * DAY, 14, replace=False)
        for time, item in zip(times, rng.choice(ITEMS, 14, replace=False, p=share / share.sum()), strict=True):
            rows.append((f"u{user}", items["item_id"][int(item)], int(time)))
    # Every item is there from the first day.
    rows += [("everybody", item, 0) for item in items["item_id"]]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Tables(items, events, {"title": "text", "shelf": "category", "price": "number"})


def verdicts(result: Audit) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in result.findings}


def text_of(result: Audit, check: str) -> str:
    return " ".join(finding.text for finding in result.findings if finding.check == check)


def test_clean_data_are_clean(clean: Tables, tmp_path: Path) -> None:
    # The user who tries everything in the first second would be a note on ties.
    clean.events = clean.events.filter(pl.col("user_id") != "everybody")
    found = verdicts(audit(clean.prepare(tmp_path)))
    checks = ("split", "new items", "ties", "repeats", "duplicates", "future fields")
    assert found == dict.fromkeys(checks, "clean")


def test_targets_before_the_cut(clean: Tables, tmp_path: Path) -> None:
    dataset = clean.prepare(tmp_path, split="leave-one-out")
    result = audit(dataset)
    assert verdicts(result)["split"] == "leak"
    times, split = dataset.interactions.times, dataset.split
    early = (times[split.test.cuts] < times[split.train].max()).mean()
    assert 0.5 < early and f"{early:.1%} of the test targets precede" in text_of(result, "split")


def test_items_first_seen_after_the_cut(clean: Tables, tmp_path: Path) -> None:
    late = clean.items["item_id"][:4].to_list()
    clean.events = clean.events.filter(~pl.col("item_id").is_in(late) | (pl.col("timestamp") > 0.95 * DAYS * DAY))
    result = audit(clean.prepare(tmp_path))
    assert verdicts(result)["new items"] == "note"
    assert "4 items (2.7%)" in text_of(result, "new items")


@pytest.mark.parametrize(("ordered", "verdict"), [(True, "leak"), (False, "note")])
def test_ties(clean: Tables, tmp_path: Path, ordered: bool, verdict: str) -> None:
    # Whole days instead of seconds, the rows of a day by item id or as they came.
    clean.events = clean.events.with_columns(pl.col("timestamp") // (20 * DAY) * (20 * DAY))
    if ordered:
        clean.events = clean.events.sort("user_id", "timestamp", "item_id")
    dataset = clean.prepare(tmp_path)
    result = audit(dataset)
    assert verdicts(result)["ties"] == verdict
    assert f"{dataset.interactions.tied_share:.1%} of the pairs" in text_of(result, "ties")
    assert ("100% of the item ids ascend" in text_of(result, "ties")) == ordered
    shuffled = audit(clean.prepare(tmp_path, shuffle_ties=True))
    assert verdicts(shuffled)["ties"] == "note"
    assert "their order is random" in text_of(shuffled, "ties")
    assert any("those stand in random order (data.shuffle_ties)" in fact for fact in shuffled.facts)


@pytest.mark.parametrize(("copied", "verdict"), [(0, "leak"), (ITEMS - 1, "note")])
def test_one_item_under_two_ids(clean: Tables, tmp_path: Path, copied: int, verdict: str) -> None:
    twin = clean.items[copied].with_columns(item_id=pl.lit("twin"), title=pl.col("title").str.to_uppercase() + "!")
    clean.items = pl.concat([clean.items, twin])
    result = audit(clean.prepare(tmp_path))
    # The most popular item is a target of many; the rarest is not.
    assert verdicts(result)["duplicates"] == verdict
    assert f"2 items have the content of another one, in 1 groups such as {clean.items['item_id'][copied]}, twin" in (
        text_of(result, "duplicates")
    )
    # Another price is another item.
    clean.items = clean.items.with_columns(price=pl.when(pl.col("item_id") == "twin").then(99).otherwise("price"))
    assert verdicts(audit(clean.prepare(tmp_path)))["duplicates"] == "clean"


def test_ids_and_names_of_fields_are_text(clean: Tables, tmp_path: Path) -> None:
    name = "[bold]price[/bold] :smile:"
    twin = clean.items[0].with_columns(item_id=pl.lit("[red]twin[/red] :heart:"))
    clean.items = pl.concat([clean.items, twin]).rename({"price": name})
    clean.fields = {"title": "text", "shelf": "category", name: "number"}
    result = audit(clean.prepare(tmp_path))
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=400, soft_wrap=True, highlight=False)
        _print(result, (), console)
        printed = console.file.getvalue()
        assert "[red]twin[/red] :heart:" in printed and name in printed


@pytest.mark.parametrize(("merge", "verdict"), [(False, "leak"), (True, "clean")])
def test_events_that_are_in_the_table_twice(clean: Tables, tmp_path: Path, merge: bool, verdict: str) -> None:
    clean.events = pl.concat([clean.events, clean.events.filter(pl.col("timestamp") > 0.8 * DAYS * DAY)])
    result = audit(clean.prepare(tmp_path, duplicates="merge" if merge else "keep"))
    assert verdicts(result)["repeats"] == verdict
    copies = 0 if merge else int((clean.events["timestamp"] > 0.8 * DAYS * DAY).sum() / 2)
    assert f"{copies:,} interactions have user, item and time of another one" in text_of(result, "repeats")
    assert ("data.duplicates: merge" in text_of(result, "repeats")) != merge


def drawn(rng: np.random.Generator, items: int = 1_500, events: int = 60_000) -> tuple[dict[str, np.ndarray], tuple]:
    """Fields of made-up items, and the past and future of a taste that moves to newer items as they come."""
    year = rng.integers(1930, 2000, items) + rng.random(items)
    price, quality = rng.lognormal(3, 1, items), rng.normal(0, 1.2, items)
    times = np.sort(rng.random(events))
    liked = quality + 0.1 * np.log(price)
    weights = np.exp(liked[:, None] - np.abs(year[:, None] / 70 - 27.9 - np.arange(10) / 15))
    weights /= weights.sum(axis=0)
    chosen = np.concatenate([
        rng.choice(items, events // 10, p=weights[:, part]) for part in range(10)
    ])  # fmt: skip
    before = times < 0.8
    first = np.full(items, 0.8)
    np.minimum.at(first, chosen[before], times[before])
    past, recent, future = (
        np.bincount(chosen[which], minlength=items) for which in (before, before & (times >= 0.7), ~before)
    )
    total = np.bincount(chosen, minlength=items) * rng.uniform(0.8, 1.25, items)
    fields = {"year": year, "price": price, "pages": rng.integers(50, 900, items).astype(float), "total": total}
    return fields, ([past, recent, first], future)


def test_rate_of_false_alarms() -> None:
    alarms = dict.fromkeys(("year", "price", "pages", "total"), 0)
    strong = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        fields, (past, future) = drawn(rng)
        for name, values in fields.items():
            found = _association(values, past, future, rng)
            alarms[name] += found.alarming
            strong += name == "year" and found.future > max(0.1, found.chance)
    # What goes with the future, and could be known before, is there; it raises no alarm.
    assert strong >= 6
    assert alarms["total"] == 12
    assert alarms["year"] + alarms["price"] + alarms["pages"] <= 1


def totals(clean: Tables, until: float) -> pl.Series:
    counts = clean.events.filter(pl.col("timestamp") < until * DAYS * DAY)["item_id"].value_counts()
    return clean.items.join(counts, on="item_id", how="left", maintain_order="left")["count"]


@pytest.mark.parametrize(("until", "verdict"), [(1.0, "leak"), (0.5, "clean")])
def test_a_field_that_knows_the_future(clean: Tables, tmp_path: Path, until: float, verdict: str) -> None:
    # Totals of the crawl; or of a moment long before, which goes with the future as much, but only through the past.
    clean.items = clean.items.with_columns(
        rated=totals(clean, until) * np.random.default_rng(1).uniform(0.9, 1.1, ITEMS)
    )
    clean.fields["rated"] = {"modality": "number", "after_the_fact": True}
    dataset = clean.prepare(tmp_path)
    result = audit(dataset)
    found = {finding.text.split("'")[1]: finding for finding in result.findings if finding.verdict == "leak"}
    assert set(found) == ({"rated"} if verdict == "leak" else set())
    if verdict == "leak":
        assert "mark it after_the_fact" in found["rated"].text
        left_out = audit(dataset, unused=["rated"])
        assert {finding.verdict for finding in left_out.findings if "'rated'" in finding.text} == {"note"}
        assert left_out.fields.filter(field="rated")["used"].item() == "left out"


def test_without_times_nothing_is_proved(clean: Tables, tmp_path: Path) -> None:
    clean.items = clean.items.with_columns(rated=totals(clean, 1.0))
    clean.fields["rated"] = "number"
    clean.events = clean.events.sort("timestamp").with_columns(timestamp=pl.lit(None, dtype=pl.Int64))
    result = audit(clean.prepare(tmp_path, split="leave-one-out"))
    assert "leak" not in verdicts(result).values()
    assert "cannot be told" in text_of(result, "split") and "no times" in text_of(result, "ties")


@pytest.mark.parametrize("later", [True, False])
def test_candidates_that_are_chosen_later(tmp_path: Path, later: bool) -> None:
    sequence = [f"i{number}" for number in range(8)]
    items = {item: {"title": f"Thing {item}"} for item in [*sequence, "x", "y"]}

    def sample(end: int, candidates: list[str]) -> dict[str, object]:
        history, target = sequence[end - 4 : end], sequence[end]
        return {"user_id": "u", "history": history, "candidate": [target, *candidates], "ground_truth": target}

    (tmp_path / "items.json").write_text(json.dumps(items))
    # The training sample's candidates hold the target of the test sample, as the reference's may.
    train, test = sample(6, ["x", "i7" if later else "y"]), sample(7, ["x", "i0"])
    for name, entry in (("a_train.json", train), ("a_test.json", test)):
        (tmp_path / name).write_text(json.dumps([entry]))
    (tmp_path / "schema.yaml").write_text("title: title\nfields: {title: text}")
    paths = {key: str(tmp_path / name) for key, name in (("items", "items.json"), ("interactions", "a_train.json"))}
    config = DataConfig(format="unirec", schema=str(tmp_path / "schema.yaml"), **paths)
    samples = read_samples(tmp_path / "a_train.json") + read_samples(tmp_path / "a_test.json")
    result = audit(prepare(config, tmp_path / "data"), samples=samples)
    assert verdicts(result)["candidates"] == ("leak" if later else "clean")
    expected = "1 of 2 samples have a later choice" if later else "none of 2 samples"
    assert expected in text_of(result, "candidates")
    assert not later or "'i7' of user 'u'" in text_of(result, "candidates")
    # The command reads both files by itself.
    tree = {
        "data": {"format": "unirec", "schema": "schema.yaml", "items": "items.json", "interactions": "a_train.json"}
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert status([str(tmp_path / "config.yaml")]) == (LEAK if later else 0)


def test_fill_rates_vocabularies_and_lengths(tmp_path: Path) -> None:
    items = pl.DataFrame(
        {
            "item_id": list("abcd"),
            "title": ["one", "two words", None, "three whole words"],
            "tags": ["x|y", "x", None, "y|x"],
            "price": [1.0, None, None, 4.0],
        }
    )
    events = pl.DataFrame(
        [(user, item, time) for user in "uv" for time, item in enumerate("abcd"[: 3 + (user == "v")])],
        schema=["user_id", "item_id", "timestamp"],
        orient="row",
    )
    fields = {"title": "text", "tags": {"modality": "category", "multi_valued": True}, "price": "number"}
    result = audit(Tables(items, events, fields).prepare(tmp_path, split="leave-one-out"))
    assert result.fields.rows() == [
        ("title", "text", "yes", 0.75, 3, "words", 1, 2, 3, 3),
        ("tags", "category", "yes", 0.75, 3, "values per item", 1, 2, 2, 2),
        ("price", "number", "yes", 0.5, 2, "value", 1, 4, 4, 4),
    ]
    counts = {row["what"]: row for row in result.counts.rows(named=True)}
    assert counts["interactions per user"]["smallest"] == 3 and counts["interactions per user"]["largest"] == 4
    assert counts["interactions per item"] | {"95 %": 0} == {
        "what": "interactions per item", "smallest": 1, "median": 2, "95 %": 0, "largest": 2,
    }  # fmt: skip
    assert result.facts[0].startswith("2 users, 4 items, 7 interactions")


def status(arguments: list[str]) -> int:
    try:
        cli.guard(main, arguments)
    except SystemExit as done:
        return done.code
    return 0


def test_exit_status(clean: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status([str(clean.write(tmp_path / "clean"))]) == 0
    shown = capsys.readouterr().out
    assert "clean: no leak found" in shown and "100.0%" in shown and "interactions per user" in shown
    leaky = str(clean.write(tmp_path / "leaky", split="leave-one-out"))
    assert status([leaky]) == LEAK
    shown = capsys.readouterr().out
    assert "leak  split: " in shown and shown.endswith("leak found by: split\n")
    assert status([leaky, "--accept", "split"]) == 0
    shown = capsys.readouterr().out
    assert "accepted  split: " in shown and "beside what is accepted" in shown
    assert status([leaky, "--accept", "ties"]) == LEAK
    assert status([str(tmp_path / "none.yaml")]) == 1
    assert status([leaky, "--accpt", "ties"]) == 2
