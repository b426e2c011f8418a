"""The report of a run: one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from nqf.evaluation.metrics import paired_difference
from nqf.evaluation.results import TRAINED, Results, cut_off, format_interval, model_ranks
from nqf.tools.report import figures
from nqf.tools.report.cards import STYLE, Card, cards_html
from nqf.tools.templates import html, plain

_HERE = Path(__file__).parent
_SEGMENTS = {"all": "all users", "warm": "warm targets", "cold": "cold targets"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Items on a plane.

    Attributes:
      layouts: Name of the vectors to float [points, 2].
      explained: Name of the vectors to the share of their variance that the plane shows.
      titles: Title of every point.
      popularity: Training interactions of every point, int [points].
      categories: Field name to every point's category; an empty string for none.
      items: Size of the catalogue, of which the points may be a sample.
    """

    layouts: Mapping[str, np.ndarray]
    explained: Mapping[str, float]
    titles: Sequence[str]
    popularity: np.ndarray
    categories: Mapping[str, Sequence[str]]
    items: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class User:
    """A user with what was recommended.

    Attributes:
      heading: Who it is and where the target stood.
      history: Newest items.
      recommended: The first items of the ranking, the target marked.
      target: The item that came next.
    """

    heading: str
    history: Sequence[Card]
    recommended: Sequence[Card]
    target: Card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows.

    Attributes:
      name: Name of the run.
      summary: What the run is, in a sentence or two.
      results: The evaluation.
      metrics: Lines of metrics.jsonl.
      stages: Stage to its result: wall_seconds, finished, and best_step, items_per_second where it trained.
      reconstruction: Field to mse, mean_mse, cosine, retrieval@1 and count; empty without an item stage.
      validated_on: What the reconstruction was measured on.
      map: The embedding map, if there is one.
      users: Sample users.
      users_chosen: How they were chosen.
      changed: Settings that differ from the defaults, one a line.
      settings: The whole configuration as YAML.
      data: What is known of the data.
      warnings: What a reader must know.
    """

    name: str
    summary: str
    results: Results
    metrics: Sequence[Mapping[str, Any]]
    stages: Mapping[str, Mapping[str, Any]]
    reconstruction: Mapping[str, Mapping[str, float]]
    validated_on: str
    map: Map | None
    users: Sequence[User]
    users_chosen: str
    changed: Sequence[str]
    settings: str
    data: Mapping[str, Any]
    warnings: Sequence[str]


def render(report: Report) -> str:
    """The page."""
    results, k = report.results, cut_off(report.results, None)
    models = list(results.models)
    main = next((model for model in TRAINED if model in models), models[0])
    baselines = [model for model in models if model not in TRAINED] or [main]
    best = max(baselines, key=lambda model: results.models[model]["all"][f"ndcg@{k}"][0])
    shown = list(dict.fromkeys([main, *(model for model in TRAINED if model in models), best]))
    colors = figures.series_colors(models, shown)
    steps = {stage: result["best_step"] for stage, result in report.stages.items() if "best_step" in result}
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return html(
        _HERE / "templates" / "page.html.j2",
        report=report,
        made=results.provenance,
        results=results,
        against=_against(results),
        tiles=_tiles(results, main, best, k),
        table=_results_table(results, k, main),
        curves=figures.hit_rate_curves(results, colors),
        ranks=figures.rank_histogram(results, list(dict.fromkeys([main, best])), colors),
        by_segment=figures.segment_figure(results, shown, colors, k),
        map=_map(report.map) if report.map else None,
        cards=lambda user: cards_html(
            [
                ("History, newest last, and what was chosen next", [*user.history, user.target]),
                ("Recommended", user.recommended),
            ],
            style=False,
        ),
        kept=figures.reconstruction_figure(report.reconstruction) if report.reconstruction else None,
        training=figures.training_curves(report.metrics, steps) if report.metrics else None,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")) + STYLE,
        script=Markup(script),
        policy=_policy(script),
    )


def _policy(script: str) -> str:
    """Nothing may be loaded and no other script may run, whatever stands in an item's title."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _against(results: Results) -> str:
    if results.protocol == "legacy":
        return "99 random items (the reference's protocol, which flatters every model)"
    masked = "kept in" if results.repeats else "left out"
    return f"the whole catalogue of {results.items:,} items, the user's past {masked}"


def _tiles(results: Results, main: str, best: str, k: int) -> list[tuple[str, str, str, str]]:
    """Kind, value, label and note of the figures at the head of the page."""

    def interval(entry: Sequence[float]) -> str:
        return f"95 %: {entry[1]:.3f} to {entry[2]:.3f}"

    own, other = results.models[main]["all"], results.models[best]["all"]
    tiles = [
        ("main", f"{own[f'hr@{k}'][0]:.3f}", f"HR@{k} of {main}", interval(own[f"hr@{k}"])),
        ("main", f"{own[f'ndcg@{k}'][0]:.3f}", f"NDCG@{k} of {main}", interval(own[f"ndcg@{k}"])),
    ]
    if best != main:
        ranks = model_ranks(results.frame)
        difference = paired_difference(ranks[main], ranks[best], (k,), seed=results.provenance["seed"])[f"ndcg@{k}"]
        tiles += [
            ("", f"{other[f'ndcg@{k}'][0]:.3f}", f"NDCG@{k} of {best}", "best of the baselines"),
            ("", f"{difference[0]:+.3f}", "difference, same users", interval(difference)),
        ]
    if "cold" in results.models[main]:
        cold = results.models[main]["cold"][f"hr@{k}"]
        tiles.append(("", f"{cold[0]:.3f}", f"HR@{k} of {main} on cold items", interval(cold)))
    if main in results.recommended:
        coverage = results.recommended[main]["coverage@10"]
        tiles.append(("", f"{coverage:.0%}", "coverage", "of the catalogue in somebody's first ten"))
    return tiles


def _results_table(results: Results, k: int, main: str) -> dict[str, Any]:
    """Groups of columns as (label, width), names of the columns, and rows of cells."""
    segments = [segment for segment in _SEGMENTS if segment in results.segments]
    columns = [(segment, key) for segment in segments for key in (f"hr@{k}", f"ndcg@{k}")]
    columns.insert(2, ("all", "mrr"))
    groups = [
        (f"{_SEGMENTS[segment]} ({results.segments[segment]:,})", sum(column[0] == segment for column in columns))
        for segment in segments
    ]
    names = [key.upper() for _, key in columns]
    if results.recommended:
        groups.append(("recommended", 2))
        names += ["coverage", "popularity"]
    largest = {
        column: max(summary[column[0]][column[1]][0] for summary in results.models.values()) for column in columns
    }
    rows = []
    for model, summary in results.models.items():
        cells = []
        for segment, key in columns:
            value, bounds = format_interval(summary[segment][key]).split(" ", 1)
            mean = summary[segment][key][0]
            share = 100 * mean / largest[segment, key] if largest[segment, key] else 0
            cells.append({"sort": mean, "text": value, "bounds": bounds, "share": f"{share:.1f}%"})
        if results.recommended:
            about = results.recommended[model]
            coverage, popularity = about["coverage@10"], about["popularity@10"]
            cells += [
                {"sort": coverage, "text": f"{coverage:.1%}"},
                {"sort": popularity, "text": f"{popularity:,.0f}"},
            ]
        rows.append({"model": model, "main": model == main, "cells": cells})
    return {"groups": groups, "names": names, "rows": rows}


def _map(item_map: Map) -> dict[str, Any]:
    """What the page's script draws, as JSON, and what is said about it."""
    layouts = {}
    for name, points in item_map.layouts.items():
        low, high = points.min(axis=0), points.max(axis=0)
        layouts[name] = np.rint((points - low) / np.maximum(high - low, 1e-12) * 1000).astype(int).tolist()
    colors: dict[str, Any] = {}
    for name, categories in item_map.categories.items():
        series = pl.Series(categories)
        frequent = series.filter(series != "").value_counts(sort=True)[:, 0].to_list()
        labels = frequent[: figures.COLORS - 1]
        rest = ["others and none"] if len(frequent) > len(labels) or (series == "").any() else []
        index = {label: at for at, label in enumerate(labels)}
        colors[name] = {
            "labels": [plain(label) for label in labels] + rest,
            "rest": bool(rest),
            "index": [index.get(category, len(labels)) for category in categories],
        }
    colors["popularity"] = None
    data = {
        "layouts": layouts,
        "colors": colors,
        "titles": [plain(title) for title in item_map.titles],
        "popularity": item_map.popularity.tolist(),
    }
    # "</script>" or "<!--" in a title would change where the element ends.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    points = len(item_map.titles)
    return {
        "data": Markup(text),
        "layouts": list(layouts),
        "colors": list(colors),
        "sample": "All items" if points == item_map.items else f"{points:,} of {item_map.items:,} items, at random",
        "shares": ", ".join(f"{share:.0%} for {name}" for name, share in item_map.explained.items()),
        "columns": ["title", *item_map.categories, "training interactions", "across", "up"],
    }
