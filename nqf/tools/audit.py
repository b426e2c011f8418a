"""Looks for leaks in prepared data before anything is trained on it.

A finding is a `leak` (results will look better than they are), a `note` (a reader of the results must know it) or
`clean`. Thresholds stand at the top, with the reason for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl

from nqf.data.interactions import MISSING_TIME, Interactions
from nqf.data.load import Dataset
from nqf.data.schema import Field
from nqf.data.splits import Cases, repeated
from nqf.data.unirec import Sample

# Below one target in a hundred, an effect drowns in the 95 % interval of a few thousand users.
_FEW = 0.01
# Ties in the order of the catalogue: half of the pairs ascend by chance.
_ORDERED = 0.1
# Partial rank correlation that counts as knowing the future: on MovieLens 100K the totals of the day of the crawl have
# 0.17 and 0.22; prices and years, of the built-in catalogue and of sets with times, stay below 0.08.
_ASSOCIATION = 0.1
# Rank correlation with the past, of the same sign: a total of the crawl holds the past, and most of it is past. On
# MovieLens 100K and goodbooks such totals have 0.38 to 0.82. A year of release has -0.10 to -0.24 there while it goes
# with the future by up to +0.22: that is a trend, which everybody could know.
_PAST_ASSOCIATION = 0.3
_PERMUTATIONS = 500
_SAMPLE = 50_000
_PAST = 0.8
_RECENT = 0.7

Verdict = Literal["leak", "note", "clean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
      check: Name of the check: `split`, `new items`, `ties`, `repeats`, `duplicates`, `candidates` or `future fields`.
      verdict: `leak`, `note` or `clean`.
      text: One sentence with the figures.
    """

    check: str
    verdict: Verdict
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
      findings: One or more per check.
      fields: One row per field: field, modality, used (String: yes, or why not), filled (share of the items), distinct
        (values), and what is measured (String) with its smallest, median, 95 % quantile and largest value (null where
        nothing is).
      counts: One row per distribution: what, smallest, median, 95 % quantile, largest.
      facts: What else there is to say of the tables, a line each.
    """

    findings: tuple[Finding, ...]
    fields: pl.DataFrame
    counts: pl.DataFrame
    facts: tuple[str, ...]


def audit(dataset: Dataset, *, unused: Sequence[str] = (), samples: Sequence[Sample] = (), seed: int = 0) -> Audit:
    """Audits prepared data.

    Args:
      dataset: Prepared with the fields that are known only after the fact, so that they are judged, too.
      unused: Fields that training will not read.
      samples: The reference's samples, whose candidates are judged.
      seed: Seed of the permutations.
    """
    findings = [_split(dataset), _new_items(dataset), _ties(dataset), _repeats(dataset), _duplicates(dataset)]
    if samples:
        findings.append(_candidates(dataset, samples))
    return Audit(
        findings=(*findings, *_future_fields(dataset, unused, np.random.default_rng(seed))),
        fields=_fields(dataset, unused),
        counts=_counts(dataset),
        facts=_facts(dataset),
    )


def _split(dataset: Dataset) -> Finding:
    """Whether training reads anything newer than a target."""
    times, split = dataset.interactions.times, dataset.split
    trained = times[split.train & (times != MISSING_TIME)]
    targets = _known(times[split.test.cuts])
    if not trained.size or not targets.size:
        return Finding(
            check="split",
            verdict="note",
            text="there are no times, so whether training knows what happened after a target cannot be told",
        )
    cut = trained.max()
    early = float(np.mean(targets < cut))
    if early == 0:
        return Finding(check="split", verdict="clean", text="no test target precedes the newest training interaction")
    newer = float(np.mean(trained > np.median(targets)))
    return Finding(
        check="split",
        verdict="leak",
        text=f"{early:.1%} of the test targets precede the newest training interaction, and {newer:.0%} of the "
        "training interactions are newer than half of the targets; data.split: temporal has no such targets",
    )


def _new_items(dataset: Dataset) -> Finding:
    interactions, split = dataset.interactions, dataset.split
    seen = np.bincount(interactions.items, minlength=len(split.cold)) > 0
    new = split.cold & seen & ~split.removed
    on_new = float(np.mean(new[interactions.items[split.test.cuts]]))
    if not new.any():
        return Finding(check="new items", verdict="clean", text="every item that occurs at all occurs in training")
    return Finding(
        check="new items",
        verdict="note",
        text=f"{new.sum():,} items ({new.mean():.1%}) are first seen after the cut and {on_new:.1%} of the test "
        "targets are such items: they are ranked as cold items, though the catalogue of that moment lacked them",
    )


def _ties(dataset: Dataset) -> Finding:
    """Whether the order of a history is known, or partly the order of the catalogue."""
    interactions = dataset.interactions
    if not _known(interactions.times).size:
        return Finding(check="ties", verdict="note", text="there are no times; the order is that of the source")
    tied = _tied(interactions)
    on_ties = float(np.mean(tied[dataset.split.test.cuts]))
    share = f"{interactions.tied_share:.1%} of the pairs of consecutive interactions share their time"
    if interactions.tied_share < _FEW and on_ties < _FEW:
        return Finding(check="ties", verdict="clean", text=share)
    share += f", and {on_ties:.1%} of the test targets that of the interaction before"
    later = np.flatnonzero(tied)
    order = np.argsort(np.argsort(np.array(dataset.catalogue.item_ids)))
    ascending = [
        float(np.mean(keys[later] > keys[later - 1])) for keys in (interactions.items, order[interactions.items])
    ]
    most = max(ascending, key=lambda value: abs(value - 0.5))
    text = f"{share}; inside ties {most:.0%} of the item ids ascend"
    # Three standard errors of a fair coin, for small tables.
    if on_ties >= _FEW and abs(most - 0.5) > max(_ORDERED, 1.5 / np.sqrt(len(later))):
        return Finding(
            check="ties",
            verdict="leak",
            text=f"{text}: part of the sequence is the order of the catalogue, which a model can learn; compare with "
            "data.shuffle_ties: true",
        )
    order = "random" if dataset.report.get("ties") == "shuffled" else "that of the source"
    return Finding(check="ties", verdict="note", text=f"{text}; their order is {order}")


def _repeats(dataset: Dataset) -> Finding:
    """Identical events, and targets that their users had before."""
    interactions, cases = dataset.interactions, dataset.split.test
    frame = pl.DataFrame({"user": interactions.users, "item": interactions.items, "time": interactions.times})
    copies = frame.is_duplicated().to_numpy() & (interactions.times != MISSING_TIME)
    identical = int(copies.sum()) - frame.filter(copies).n_unique()
    again = repeated(interactions, cases)
    copied = float(np.mean(again & copies[cases.cuts]))
    text = (
        f"{identical:,} interactions have user, item and time of another one, and {again.mean():.1%} of the test "
        "targets are items that their users had before"
    )
    if not identical and not again.any():
        return Finding(check="repeats", verdict="clean", text=text)
    if copied >= _FEW:
        return Finding(
            check="repeats",
            verdict="leak",
            text=f"{text}; {copied:.1%} of the targets stand in the history a second time, with their own time; "
            "data.duplicates: merge makes one of both",
        )
    advice = "without evaluation.repeats, cases of such targets are left out, and such items are not recommended"
    return Finding(check="repeats", verdict="note", text=f"{text}; {advice}")


def _duplicates(dataset: Dataset) -> Finding:
    """Items whose texts, categories, numbers and times are all the same."""
    content = [
        field
        for field in dataset.catalogue.schema.fields
        if field.modality in ("text", "category", "number", "time") and not field.after_the_fact
    ]
    worded = [field.name for field in content if field.modality in ("text", "category")]
    if not worded:
        return Finding(check="duplicates", verdict="note", text="there is no text and no category to compare items by")
    keys = []
    for field in content:
        key = pl.col(field.name)
        if field.modality == "category":
            key = key.list.sort().list.join("|")
        if field.modality in ("text", "category"):
            key = key.str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}]+", " ").str.strip_chars()
        keys.append(key.cast(pl.String).fill_null("\0"))
    table = pl.scan_parquet(dataset.catalogue.path, glob=False)
    frame = table.select(
        pl.concat_str(keys, separator="\0").hash().alias("key"),
        pl.any_horizontal(pl.col(worded).is_not_null()).alias("said"),
    ).collect()
    twins = (frame["key"].is_duplicated() & frame["said"]).to_numpy()
    if not twins.any():
        return Finding(check="duplicates", verdict="clean", text="no two items have the same content")
    hit = float(np.mean(twins[dataset.interactions.items[dataset.split.test.cuts]]))
    groups = frame.filter(twins)["key"].n_unique()
    example = frame.with_row_index().filter(twins).group_by("key", maintain_order=True).first()["key"][0]
    ids = [dataset.catalogue.item_ids[row] for row in (frame["key"] == example).arg_true()[:3]]
    return Finding(
        check="duplicates",
        verdict="leak" if hit >= _FEW else "note",
        text=f"{twins.sum():,} items have the content of another one, in {groups:,} groups such as "
        f"{', '.join(ids)}; {hit:.1%} of the test targets are among them, whose twin may stand in the history; "
        "merge them under one id",
    )


def _candidates(dataset: Dataset, samples: Sequence[Sample]) -> Finding:
    """Whether the reference's negatives are what the user chose later."""
    interactions, item_ids = dataset.interactions, dataset.catalogue.item_ids
    rows = {user: row for row, user in enumerate(interactions.user_ids)}
    judged = wrong = absent = 0
    example = ""
    for sample in samples:
        if sample.user_id not in rows:
            continue
        row = rows[sample.user_id]
        start, stop = interactions.offsets[row], interactions.offsets[row + 1]
        sequence = [item_ids[item] for item in interactions.items[start:stop]]
        if sample.ground_truth not in sequence:
            continue
        judged += 1
        later = set(sequence[sequence.index(sample.ground_truth) + 1 :]) - {sample.ground_truth}
        absent += sample.ground_truth not in sample.candidates
        found = later.intersection(sample.candidates)
        wrong += bool(found)
        if found and not example:
            example = f", such as '{min(found)}' of user '{sample.user_id}'"
    missing = f"; {absent:,} lack their own target" if absent else ""
    if not wrong:
        return Finding(
            check="candidates",
            verdict="leak" if absent else "clean",
            text=f"none of {judged:,} samples has a later choice of its user among its candidates{missing}",
        )
    return Finding(
        check="candidates",
        verdict="leak",
        text=f"{wrong:,} of {judged:,} samples have a later choice of their user among their candidates{example}"
        f"{missing}; nqf ranks the whole catalogue, and uses these candidates for loss.negatives: given and --protocol "
        "legacy alone",
    )


def _future_fields(dataset: Dataset, unused: Sequence[str], rng: np.random.Generator) -> list[Finding]:
    """Numbers and times that go with an item's future interactions beyond what its past explains."""
    fields = [field for field in dataset.catalogue.schema.fields if field.modality in ("number", "time")]
    if not fields:
        return [Finding(check="future fields", verdict="clean", text="there is no number and no time among the fields")]
    past, future, timed = _past_and_future(dataset)
    values = pl.read_parquet(dataset.catalogue.path, columns=[field.name for field in fields], glob=False)
    findings, fine = [], []
    for field in fields:
        found = _association(values[field.name].cast(pl.Float64).to_numpy(), past, future, rng)
        if not found.alarming:
            fine.append(f"{field.name} {found.future:+.2f}")
            continue
        text = (
            f"'{field.name}' goes with the interactions of the last fifth beyond what the first four fifths explain "
            f"(partial rank correlation {found.future:+.2f}, by chance at most {found.chance:.2f}; "
            f"with the past {found.past:+.2f})"
        )
        verdict: Verdict = "leak"
        if field.name in unused:
            verdict, text = "note", f"{text}; it is marked after_the_fact and left out"
        elif not timed:
            verdict = "note"
            text += "; without times the last fifth of each history stands for the future, which proves nothing"
        else:
            text += "; mark it after_the_fact in the schema"
        findings.append(Finding(check="future fields", verdict=verdict, text=text))
    if fine:
        text = f"none of a total's marks, going with the future beyond the past and with the past: {', '.join(fine)}"
        findings.append(Finding(check="future fields", verdict="clean", text=text))
    return findings


def _past_and_future(dataset: Dataset) -> tuple[list[np.ndarray], np.ndarray, bool]:
    """What is known of every item's past, its future interactions, and whether that is by time.

    The past is the number of interactions, of recent ones, and the time of the first one.
    """
    interactions, items = dataset.interactions, len(dataset.catalogue)
    times, timed = interactions.times, True
    if np.mean(times == MISSING_TIME) > 0.5:
        timed = False
        lengths = np.diff(interactions.offsets)
        place = np.arange(len(times)) - np.repeat(interactions.offsets[:-1], lengths)
        times = place / np.repeat(np.maximum(lengths - 1, 1), lengths)
    cut, recent = np.quantile(times, [_PAST, _RECENT])
    before = times < cut
    first = np.full(items, cut, np.float64)
    np.minimum.at(first, interactions.items[before], times[before])

    def count(which: np.ndarray) -> np.ndarray:
        return np.bincount(interactions.items[which], minlength=items)

    past = [count(before), count(before & (times >= recent))] + ([first] if timed else [])
    return past, count(~before), timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Association:
    """Rank correlations of a field with the interactions of the items.

    Attributes:
      future: With the future ones, given the past.
      chance: The largest such one under permutation.
      past: With the number of past ones.
    """

    future: float
    chance: float
    past: float

    @property
    def alarming(self) -> bool:
        """Whether the field looks like a total that knows the future."""
        beyond = abs(self.future) > max(_ASSOCIATION, self.chance)
        return beyond and self.past * np.sign(self.future) > _PAST_ASSOCIATION


def _association(
    values: np.ndarray, past: list[np.ndarray], future: np.ndarray, rng: np.random.Generator
) -> _Association:
    """Rank correlations of a field with the future given the past, and with the past.

    Ranks of both are regressed on cubic polynomials of the ranks of the past; the residuals are correlated (Freedman
    and Lane 1983 for the permutation of residuals). Items without any interaction say nothing.
    """
    there = np.flatnonzero(np.isfinite(values) & ((past[0] > 0) | (future > 0)))
    if len(there) > _SAMPLE:
        there = rng.choice(there, _SAMPLE, replace=False)
    # A dozen covariates need more items than that.
    if len(there) < 50:
        return _Association(future=0.0, chance=1.0, past=0.0)
    powers = [_ranks(known[there]) for known in past]
    explained = np.column_stack([np.ones(len(there))] + [power**degree for power in powers for degree in (1, 2, 3)])
    basis = np.linalg.qr(explained)[0]
    field, later = (ranks - basis @ (basis.T @ ranks) for ranks in (_ranks(values[there]), _ranks(future[there])))
    norm = float(np.linalg.norm(field) * np.linalg.norm(later))
    if norm < 1e-9:
        return _Association(future=0.0, chance=1.0, past=0.0)
    with_past = np.corrcoef(_ranks(values[there]), powers[0])[0, 1] if np.ptp(powers[0]) else 0.0
    by_chance = [abs(float(rng.permutation(field) @ later)) for _ in range(_PERMUTATIONS)]
    return _Association(future=float(field @ later) / norm, chance=max(by_chance) / norm, past=float(with_past))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks between -0.5 and 0.5, ties in the middle."""
    return pl.Series(values).rank("average").to_numpy() / len(values) - 0.5


def _fields(dataset: Dataset, unused: Sequence[str]) -> pl.DataFrame:
    table = pl.scan_parquet(dataset.catalogue.path, glob=False)
    rows = []
    for field in dataset.catalogue.schema.fields:
        column, (what, measure) = pl.col(field.name), _measure(field)
        shown = [pl.col(field.name).is_not_null().mean().alias("filled")]
        distinct = column.list.join("|") if field.modality == "category" else column.cast(pl.String, strict=False)
        if field.modality in ("vector", "geo"):
            distinct = column.hash()
        shown.append(distinct.drop_nulls().n_unique().alias("distinct"))
        shown += _quantiles(measure)
        found = table.select(shown).collect(engine="streaming").row(0, named=True)
        used = "left out" if field.name in unused else "yes"
        rows.append({"field": field.name, "modality": field.modality, "used": used, "measured": what, **found})
    return pl.DataFrame(rows).select("field", "modality", "used", "filled", "distinct", "measured", *_QUANTILES)


_QUANTILES = {"smallest": 0.0, "median": 0.5, "95 %": 0.95, "largest": 1.0}


def _quantiles(value: pl.Expr) -> list[pl.Expr]:
    value = value.cast(pl.Float64).drop_nulls()
    return [value.quantile(level, "nearest").alias(name) for name, level in _QUANTILES.items()]


def _measure(field: Field) -> tuple[str, pl.Expr]:
    column = pl.col(field.name)
    if field.modality == "text":
        return "words", column.str.split(" ").list.len()
    if field.modality in ("category", "vector"):
        return "values per item", column.list.len()
    if field.modality == "number":
        return "value", column
    if field.modality == "time":
        return "year", pl.from_epoch(column).dt.year()
    return "", pl.lit(None)


def _counts(dataset: Dataset) -> pl.DataFrame:
    interactions, split = dataset.interactions, dataset.split
    counts = np.bincount(interactions.items, minlength=len(split.cold))
    trained = np.bincount(interactions.items[split.train], minlength=len(split.cold))

    def before(cases: Cases) -> np.ndarray:
        return cases.cuts - interactions.offsets[cases.users]

    rows = {
        "interactions per user": np.diff(interactions.offsets),
        "interactions per item": counts,
        "training interactions per item": trained,
        "history before a validation target": before(split.valid),
        "history before a test target": before(split.test),
    }
    frames = [
        pl.DataFrame({"what": [what], **{name: [float(np.quantile(x, q))] for name, q in _QUANTILES.items()}})
        for what, x in rows.items()
    ]
    return pl.concat(frames)


def _facts(dataset: Dataset) -> tuple[str, ...]:
    interactions, split = dataset.interactions, dataset.split
    users, items, events = len(interactions.user_ids), len(dataset.catalogue), len(interactions.items)
    times = _known(interactions.times)
    facts = [
        f"{users:,} users, {items:,} items, {events:,} interactions ({events / users / items:.3%} of all pairs)",
        f"{split.train.sum():,} training interactions, {len(split.valid.users):,} validation and "
        f"{len(split.test.users):,} test cases",
        f"{split.cold.sum():,} items ({split.cold.mean():.1%}) have no training interaction",
        f"{len(times) / events:.1%} of the interactions have a time, {np.isfinite(interactions.ratings).mean():.1%} a "
        f"rating, {sum(review is not None for review in interactions.reviews or ()) / events:.1%} a review",
    ]
    if times.size:
        first, last = (np.datetime64(int(time), "s").astype("datetime64[D]") for time in (times.min(), times.max()))
        facts.append(f"from {first} to {last}")
    return (*facts, *dataset.report["warnings"])


def _known(times: np.ndarray) -> np.ndarray:
    return times[times != MISSING_TIME]


def _tied(interactions: Interactions) -> np.ndarray:
    """bool [events], whether an interaction has the time of its user's interaction before."""
    tied = np.zeros(len(interactions.times), bool)
    same_user = interactions.users[1:] == interactions.users[:-1]
    same_time = (interactions.times[1:] == interactions.times[:-1]) & (interactions.times[1:] != MISSING_TIME)
    tied[1:] = same_user & same_time
    return tied
