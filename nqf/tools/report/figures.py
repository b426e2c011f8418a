"""Stills of the report: SVG that takes its colors from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from nqf.evaluation.results import Results, model_ranks

COLORS = 10
"""Series colors of the page, `--c0` to `--c9`."""
# Colors that mean a variable of the page; Matplotlib knows only real ones.
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_SERIES = [f"#0400{index:02x}" for index in range(COLORS)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule"} | {
    color: f"--c{index}" for index, color in enumerate(_SERIES)
}
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nqf",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
# Upper ends of the bars of the rank histogram.
_RANKS = (1, 5, 10, 20, 50, 100, 500, 1_000, 10_000)


class _Drawing:
    svg: str = ""


@contextlib.contextmanager
def _draw(width: float, height: float, label: str, **options: Any) -> Iterator[tuple[_Drawing, Any]]:
    """Yields a holder of the finished SVG and the axes, width and height in inches of about 110 CSS pixels."""
    # Matplotlib takes half a second to import and belongs to the `viz` extra.
    import matplotlib
    from matplotlib.figure import Figure

    drawing = _Drawing()
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield drawing, figure.subplots(**options)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # Without a size of its own it takes the width of its panel.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    drawing.svg = svg


def series_colors(models: Sequence[str], chosen: Sequence[str]) -> dict[str, int]:
    """Number of the color of every model; the chosen ones come first."""
    order = [*chosen, *(model for model in models if model not in chosen)]
    return {model: index % COLORS for index, model in enumerate(order)}


def hit_rate_curves(results: Results, colors: Mapping[str, int]) -> str:
    """HR@K of every model over K, with 95 % intervals."""
    ks = sorted(int(key[3:]) for key in next(iter(results.models.values()))["all"] if key.startswith("hr@"))
    with _draw(6.2, 3.6, "HR@K of every model") as (drawing, axes):
        ends = []
        for model, summary in results.models.items():
            color = _SERIES[colors[model]]
            mean, low, high = np.array([summary["all"][f"hr@{k}"] for k in ks]).T
            axes.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(ks, mean, color=color, marker="o", markersize=3.5)
            ends.append((mean[-1], model, color))
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("K, cut-off of the ranking")
        axes.set_title("HR@K")
        _label_ends(axes, ends)
    return drawing.svg


def _label_ends(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Writes names beside the ends of lines, pushed apart where they would overlap."""
    top = axes.get_ylim()[1]
    places: list[float] = []
    for value, _, _ in sorted(ends):
        places.append(max(value, places[-1] + top * 0.062) if places else value)
    for place, (_, model, color) in zip(places, sorted(ends), strict=True):
        axes.annotate(
            model, (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            color=color, va="center", fontsize=9,
        )  # fmt: skip


def rank_histogram(results: Results, models: Sequence[str], colors: Mapping[str, int]) -> str:
    """Share of the users by the rank of their target, for a few models."""
    ranks = model_ranks(results.frame)
    highs = [high for high in _RANKS if high < results.items] + [results.items]
    lows = [0, *highs[:-1]]
    names = [f"{high:,}" if high == low + 1 else f"{low + 1:,}–{high:,}" for low, high in zip(lows, highs, strict=True)]
    with _draw(6.2, 3.6, "Ranks of the targets") as (drawing, axes):
        width = 0.8 / len(models)
        for index, model in enumerate(models):
            shares = [
                float(np.mean((ranks[model] > low) & (ranks[model] <= high)))
                for low, high in zip(lows, highs, strict=True)
            ]
            at = np.arange(len(highs)) + (index - (len(models) - 1) / 2) * width
            axes.bar(at, shares, width * 0.92, color=_SERIES[colors[model]], label=model)
        axes.set_xticks(np.arange(len(highs)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title("Rank of the target, share of the users")
        axes.legend()
    return drawing.svg


def segment_figure(results: Results, models: Sequence[str], colors: Mapping[str, int], k: int) -> str:
    """HR@K by popularity decile, history length and warm or cold, with 95 % intervals."""
    groups = {
        "Popularity of the target in deciles, the most popular last": "popularity decile ",
        "Length of the history": "history ",
        "Target": ("warm", "cold"),
    }
    panels = {title: [name for name in results.segments if name.startswith(start)] for title, start in groups.items()}
    panels = {title: names for title, names in panels.items() if names}
    ratios = [max(len(names), 2) + 1 for names in panels.values()]
    with _draw(11, 3.4, "Hit rates by segment", ncols=len(panels), width_ratios=ratios, sharey=True) as (drawing, axes):
        for axis, (title, names) in zip(np.atleast_1d(axes), panels.items(), strict=True):
            for index, model in enumerate(models):
                mean, low, high = np.array([results.models[model][name][f"hr@{k}"] for name in names]).T
                at = np.arange(len(names)) + (index - (len(models) - 1) / 2) * 0.22
                axis.errorbar(
                    at, mean, np.maximum([mean - low, high - mean], 0), fmt="o", markersize=4.5, elinewidth=1.3,
                    color=_SERIES[colors[model]], label=model,
                )  # fmt: skip
            short = [name.removeprefix("popularity decile ").removeprefix("history ") for name in names]
            axis.set_xticks(
                np.arange(len(names)), [f"{a}\n{results.segments[b]:,}" for a, b in zip(short, names, strict=True)]
            )
            axis.set_xlim(-0.6, len(names) - 0.4)
            axis.grid(axis="x", visible=False)
            axis.set_title(title)
        first = np.atleast_1d(axes)[0]
        first.set_ylim(0, None)
        first.set_ylabel(f"HR@{k}")
        first.figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    return drawing.svg


def training_curves(metrics: Sequence[Mapping[str, Any]], best_steps: Mapping[str, int]) -> str:
    """Loss and validation metrics of every stage over its steps; a line marks the step that was kept."""
    stages = list(dict.fromkeys(record["stage"] for record in metrics))
    with _draw(11, 2.5 * len(stages), "Training curves", nrows=len(stages), ncols=2, squeeze=False) as (drawing, axes):
        for row, stage in zip(axes, stages, strict=True):
            records = pl.DataFrame([record for record in metrics if record["stage"] == stage], infer_schema_length=None)
            shown = [name for name in ("loss",) if name in records.columns]
            checked = [f"valid/{name}" for name in ("ndcg@10", "hr@10", "mrr", "explained")]
            for axis, names in zip(row, (shown, [name for name in checked if name in records.columns]), strict=True):
                for index, name in enumerate(names):
                    points = records.select("step", name).drop_nulls()
                    marker = {"marker": "o", "markersize": 3.5} if name.startswith("valid/") else {}
                    axis.plot(
                        points["step"], points[name], color=_SERIES[index], label=name.removeprefix("valid/"), **marker
                    )
                if stage in best_steps:
                    axis.axvline(best_steps[stage], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
                axis.set_title(f"{stage}: {'training loss' if axis is row[0] else 'validation'}")
                axis.set_xlabel("step")
                if len(names) > 1 or axis is row[1]:
                    axis.legend(loc="best")
    return drawing.svg


def reconstruction_figure(report: Mapping[str, Mapping[str, float]]) -> str:
    """Squared error of every reconstructed field as a share of the mean vector's error."""
    names = list(report)[::-1]
    ratios = [report[name]["mse"] / max(report[name]["mean_mse"], 1e-12) for name in names]
    with _draw(6.2, 0.9 + 0.34 * len(names), "Reconstruction error of every field") as (drawing, axes):
        axes.barh(names, ratios, 0.62, color=_SERIES[0])
        axes.axvline(1, color=_SERIES[2], linewidth=1.6)
        axes.annotate(
            "mean vector",
            (1, len(names) - 0.42),
            xytext=(4, 0),
            textcoords="offset points",
            color=_SERIES[2],
            fontsize=9,
        )
        for place, ratio in enumerate(ratios):
            # Beside the line of the baseline, which a number would cross.
            at = (max(ratio, 1), place)
            axes.annotate(f"{ratio:.2f}", at, xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0, max(1.25, max(ratios) * 1.12))
        axes.set_ylim(-0.6, len(names) - 0.1)
        axes.grid(axis="y", visible=False)
        axes.set_title("Error as a share of the mean vector's (less is better)")
    return drawing.svg
