"""The report of a run: one HTML page that needs no other file and no network."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from nqf.evaluation.metrics import paired_difference
from nqf.evaluation.results import Results, cut_off, format_interval, model_ranks
from nqf.tools.report import figures
from nqf.tools.report.assets import SCRIPT, STYLE
from nqf.tools.report.cards import Card, cards_html

_TRAINED = ("joint", "joint_vectors", "user")
# Nothing may be loaded, whatever stands in an item's title.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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
    main = next((model for model in _TRAINED if model in models), models[0])
    baselines = [model for model in models if model not in _TRAINED] or [main]
    best = max(baselines, key=lambda model: results.models[model]["all"][f"ndcg@{k}"][0])
    shown = list(dict.fromkeys([main, *(model for model in _TRAINED if model in models), best]))
    colors = figures.series_colors(models, shown)
    sections = [
        _section(
            "Results",
            f"Means over {results.users:,} users of the {results.split} split, ranked against {_against(results)}. "
            "95 % bootstrap intervals over users below each figure. Click a column to sort.",
            _panel(_results_table(results, k, main)),
            _two(figures.hit_rate_curves(results, colors), figures.rank_histogram(results, [main, best], colors)),
        ),
        _section(
            "Where it works",
            "The number of users stands below each segment; lines are 95 % intervals, wide where users are few.",
            _panel(figures.segment_figure(results, shown, colors, k)),
        ),
    ]
    if report.map is not None:
        sections.append(_section("The catalogue on a plane", *_map(report.map)))
    if report.users:
        sections.append(_section("Users", report.users_chosen, _panel("".join(map(_user, report.users)))))
    if report.reconstruction:
        sections.append(
            _section(
                "What the Item Q-Former keeps",
                "Each field is reconstructed from the item's query tokens, measured on "
                f"{_text(report.validated_on)}. The baseline always answers the field's mean vector; retrieval@1 is "
                "how often the reconstruction is nearest to the item's own value.",
                _two(figures.reconstruction_figure(report.reconstruction), _reconstruction_table(report)),
            )
        )
    if report.metrics:
        steps = {stage: result["best_step"] for stage, result in report.stages.items() if "best_step" in result}
        curves = figures.training_curves(report.metrics, steps)
        sections.append(
            _section("Training", "The dashed line marks the step whose parameters were kept.", _panel(curves))
        )
    sections.append(_section("How it was made", "", _made(report)))
    return _PAGE.format(
        policy=_POLICY,
        title=f"{_text(report.name)}: nqf report",
        style=STYLE,
        name=_text(report.name),
        summary=_text(report.summary),
        tiles=_tiles(results, main, best, k),
        sections="\n".join(sections),
        date=_text(results.provenance["date"]),
        script=SCRIPT,
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><div><h1>{name}</h1><p>{summary}</p><div class="tiles">{tiles}</div></div></header>
<main>
{sections}
<footer>Made by nqf from the run of {date}. The page loads nothing from elsewhere.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _section(title: str, about: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{f'<p>{about}</p>' if about else ''}{''.join(parts)}</section>"


def _panel(content: str) -> str:
    return f'<div class="panel">{content}</div>'


def _two(*contents: str) -> str:
    return f'<div class="two">{"".join(map(_panel, contents))}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _against(results: Results) -> str:
    if results.protocol == "legacy":
        return "99 random items (the reference's protocol, which flatters every model)"
    masked = "left out" if results.mask_seen else "kept in"
    return f"the whole catalogue of {results.items:,} items, the user's past {masked}"


def _tiles(results: Results, main: str, best: str, k: int) -> str:
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
    return "".join(
        f'<div class="tile {kind}"><b>{value}</b>{_text(label)}<span>{_text(note)}</span></div>'
        for kind, value, label, note in tiles
    )


def _results_table(results: Results, k: int, main: str) -> str:
    segments = [segment for segment in ("all", "warm", "cold") if segment in results.segments]
    columns = [(segment, key) for segment in segments for key in (f"hr@{k}", f"ndcg@{k}")]
    columns.insert(2, ("all", "mrr"))
    head = '<th rowspan="2">model</th>'
    names = {"all": "all users", "warm": "warm targets", "cold": "cold targets"}
    for segment in segments:
        width = sum(column[0] == segment for column in columns)
        head += f'<th class="group" colspan="{width}">{names[segment]} ({results.segments[segment]:,})</th>'
    head += '<th class="group" colspan="2">recommended</th>' if results.recommended else ""
    second = [key.upper() for _, key in columns] + (["coverage", "popularity"] if results.recommended else [])
    second = "".join(f'<th class="key" data-column="{at}">{name}</th>' for at, name in enumerate(second, 1))
    largest = {
        column: max(summary[column[0]][column[1]][0] for summary in results.models.values()) for column in columns
    }
    body = ""
    for model, summary in results.models.items():
        cells = f"<td>{_text(model)}</td>"
        for segment, key in columns:
            value, bounds = format_interval(summary[segment][key]).split(" ", 1)
            mean = summary[segment][key][0]
            share = 100 * mean / largest[segment, key] if largest[segment, key] else 0
            cells += (
                f'<td class="bar" data-value="{mean}" style="--share: {share:.1f}%">{value}<small>{bounds}</small></td>'
            )
        if results.recommended:
            about = results.recommended[model]
            coverage, popularity = about["coverage@10"], about["popularity@10"]
            cells += (
                f'<td data-value="{coverage}">{coverage:.1%}</td><td data-value="{popularity}">{popularity:,.0f}</td>'
            )
        kind = "main" if model == main else "other"
        body += f'<tr class="{kind}">{cells}</tr>'
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr><tr>{second}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _map(item_map: Map) -> tuple[str, str]:
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
            "labels": labels + rest,
            "rest": bool(rest),
            "index": [index.get(category, len(labels)) for category in categories],
        }
    colors["popularity"] = None
    data = {
        "layouts": layouts,
        "colors": colors,
        "titles": list(item_map.titles),
        "popularity": item_map.popularity.tolist(),
    }
    # "</script>" or "<!--" in a title would change where the element ends.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    shares = ", ".join(f"{share:.0%} for {_text(name)}" for name, share in item_map.explained.items())
    points = len(item_map.titles)
    sample = "All items" if points == item_map.items else f"{points:,} of {item_map.items:,} items, drawn at random"
    about = (
        f"{sample}, on the two principal components of their vectors (share of the variance: {shares}). Near points "
        "are not always near in the full space. Hover for titles."
    )

    def choice(label: str, names: Sequence[str]) -> str:
        options = "".join(f"<option>{_text(name)}</option>" for name in names)
        return f"<label>{label} <select>{options}</select></label>"

    # A page that is put together with str.format must not see the braces of JSON; they are inserted as a value.
    panel = (
        f'<div class="map"><div class="choices">{choice("Vectors", list(layouts))}{choice("Color", list(colors))}'
        f'<div class="legend"></div></div><canvas></canvas><div class="tip"></div></div>'
        f'<script type="application/json" id="map-data">{text}</script>'
    )
    return about, _panel(panel)


def _user(user: User) -> str:
    rows = [
        ("History, newest last, and what was chosen next", [*user.history, user.target]),
        ("Recommended", user.recommended),
    ]
    return f'<div class="user"><h3>{_text(user.heading)}</h3>{cards_html(rows)}</div>'


def _reconstruction_table(report: Report) -> str:
    rows = [
        [
            name,
            f"{entry['mse']:.5f}",
            f"{entry['mean_mse']:.5f}",
            f"{entry['cosine']:.3f}",
            f"{entry['retrieval@1']:.3f}",
            f"{entry['count']:,}",
        ]
        for name, entry in report.reconstruction.items()
    ]
    return _table(["field", "MSE", "of the mean", "cosine", "retrieval@1", "items"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(lines: Sequence[str], kind: str = "") -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def _made(report: Report) -> str:
    made = report.results.provenance
    stages = [
        [
            stage,
            f"{result['wall_seconds']:,.1f} s",
            f"{result['items_per_second']:,.0f}" if result.get("items_per_second") else "",
            f"{result['best_step']:,} of {result['steps']:,}" if "best_step" in result else "",
            result["finished"],
        ]
        for stage, result in report.stages.items()
    ]
    provenance = [
        f"<code>{_text(made['command'])}</code>",
        f"seed {made['seed']}, {_text(made['machine'])}, {_text(made['date'])}",
        ", ".join(f"{_text(name)} {_text(version)}" for name, version in made["versions"].items()),
    ]
    data = [
        f"{_text(key)}: {_text(f'{value:,}' if isinstance(value, int) else value)}"
        for key, value in report.data.items()
    ]
    changed = [f"<code>{_text(line)}</code>" for line in report.changed] or ["none"]
    warnings = f"<h3>What a reader must know</h3>{_list([_text(line) for line in report.warnings], 'warn')}"
    return (
        (_panel(warnings) if report.warnings else "")
        + _panel(f"<h3>Stages</h3>{_table(['stage', 'wall time', 'examples/s', 'step kept', 'finished'], stages)}")
        + _two(
            f"<h3>Evaluation</h3>{_list(provenance)}<h3>Data</h3>{_list(data)}",
            f"<h3>Settings that differ from the defaults</h3>{_list(changed)}"
            f"<details><summary>All settings</summary><pre>{_text(report.settings)}</pre></details>",
        )
    )
