"""Stills of the report: SVG that takes its colors from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from markupsafe import Markup

from nqf.evaluation.results import Results, model_ranks
from nqf.tools.templates import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

COLORS = 10
"""Series colors of the page, `--c0` to `--c9`."""
# Colors that mean a variable of the page; Matplotlib knows only real ones.
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_SERIES = [f"#0400{index:02x}" for index in range(COLORS)]
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule"} | {
    color: f"--c{index}" for index, color in enumerate(_SERIES)
}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
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


# Characters that Matplotlib's own font lacks are no fault: the browser draws the text.
_NO_GLYPH = "Glyph .* missing from"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure as SVG, drawn twice: a page shows the one whose letters have a size to read at its width.

    Attributes:
      broad: For panels of 550 CSS pixels and more.
      narrow: For a phone of 390 CSS pixels.
    """

    broad: Markup
    narrow: Markup


def _draw(
    label: str,
    paint: Callable[[MatplotlibFigure, bool], None],
    *,
    broad: tuple[float, float],
    narrow: tuple[float, float],
) -> Figure:
    """Draws a figure at both sizes, width and height in inches; `paint(figure, is_narrow)` draws one."""
    # Matplotlib takes half a second to import and belongs to the `viz` extra.
    import matplotlib
    from matplotlib.figure import Figure as MatplotlibFigure

    drawn = []
    for is_narrow, size in ((False, broad), (True, narrow)):
        buffer = io.StringIO()
        # Names of clipping paths are the page's, and must not meet those of another figure that is not shown.
        with matplotlib.rc_context({**_RC, "svg.hashsalt": f"{label} {size}"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NO_GLYPH)
            figure = MatplotlibFigure(figsize=size, layout="constrained")
            paint(figure, is_narrow)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        drawn.append(_for_page(buffer.getvalue(), label))
    return Figure(broad=drawn[0], narrow=drawn[1])


def _for_page(svg: str, label: str) -> Markup:
    # Without a size of its own it takes the width of its panel.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    # Matplotlib has escaped the texts in it.
    return Markup(plain(svg))


def series_colors(models: Sequence[str], chosen: Sequence[str]) -> dict[str, int]:
    """Number of the color of every model; the chosen ones come first."""
    order = [*chosen, *(model for model in models if model not in chosen)]
    return {model: index % COLORS for index, model in enumerate(order)}


def hit_rate_curves(results: Results, colors: Mapping[str, int]) -> Figure:
    """HR@K of every model over K, with 95 % intervals."""
    ks = sorted(int(key[3:]) for key in next(iter(results.models.values()))["all"] if key.startswith("hr@"))

    def paint(figure: MatplotlibFigure, is_narrow: bool) -> None:
        axes, ends = figure.subplots(), []
        for model, summary in results.models.items():
            color = _SERIES[colors[model]]
            mean, low, high = np.array([summary["all"][f"hr@{k}"] for k in ks]).T
            axes.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(ks, mean, color=color, marker="o", markersize=3.5, label=model)
            ends.append((mean[-1], model, color))
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("K, cut-off of the ranking")
        axes.set_title("HR@K")
        if is_narrow:
            figure.legend(loc="outside lower center", ncols=2)
        else:
            _label_ends(axes, ends)

    return _draw("HR@K of every model over K", paint, broad=(6.2, 3.6), narrow=(3.6, 4.2))


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


def rank_histogram(results: Results, models: Sequence[str], colors: Mapping[str, int]) -> Figure:
    """Share of the users by the rank of their target, for a few models."""
    ranks = model_ranks(results.frame)
    highs = [high for high in _RANKS if high < results.items] + [results.items]
    lows = [0, *highs[:-1]]
    names = [f"{high:,}" if high == low + 1 else f"{low + 1:,}–{high:,}" for low, high in zip(lows, highs, strict=True)]
    width = 0.8 / len(models)

    def paint(figure: MatplotlibFigure, is_narrow: bool) -> None:
        axes = figure.subplots()
        for index, model in enumerate(models):
            shares = [
                float(np.mean((ranks[model] > low) & (ranks[model] <= high)))
                for low, high in zip(lows, highs, strict=True)
            ]
            at = np.arange(len(highs)) + (index - (len(models) - 1) / 2) * width
            axes.bar(at, shares, width * 0.92, color=_SERIES[colors[model]], label=model)
        turned = 60 if is_narrow else 30
        axes.set_xticks(np.arange(len(highs)), names, rotation=turned, ha="right", rotation_mode="anchor")
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title("Rank of the target, share of the users")
        axes.legend()

    return _draw("Ranks of the targets, share of the users", paint, broad=(6.2, 3.6), narrow=(3.6, 3.2))


def segment_figure(results: Results, models: Sequence[str], colors: Mapping[str, int], k: int) -> Figure:
    """HR@K by popularity decile, history length and warm or cold, with 95 % intervals."""
    groups = {
        "Popularity decile, most popular last": "popularity decile ",
        "Length of the history": "history ",
        "Target": ("warm", "cold"),
    }
    panels = {title: [name for name in results.segments if name.startswith(start)] for title, start in groups.items()}
    panels = {title: names for title, names in panels.items() if names}
    ratios = [max(len(names), 2) + 1 for names in panels.values()]

    def paint(figure: MatplotlibFigure, is_narrow: bool) -> None:
        if is_narrow:
            all_axes = np.atleast_1d(figure.subplots(nrows=len(panels), sharey=True))
        else:
            all_axes = np.atleast_1d(figure.subplots(ncols=len(panels), width_ratios=ratios, sharey=True))
        for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
            for index, model in enumerate(models):
                mean, low, high = np.array([results.models[model][name][f"hr@{k}"] for name in names]).T
                at = np.arange(len(names)) + (index - (len(models) - 1) / 2) * 0.22
                axes.errorbar(
                    at, mean, np.maximum([mean - low, high - mean], 0), fmt="o", markersize=4.5, elinewidth=1.3,
                    color=_SERIES[colors[model]], label=model,
                )  # fmt: skip
            short = [name.removeprefix("popularity decile ").removeprefix("history ") for name in names]
            axes.set_xticks(
                np.arange(len(names)), [f"{a}\n{results.segments[b]:,}" for a, b in zip(short, names, strict=True)]
            )
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.grid(axis="x", visible=False)
            axes.set_title(title)
        all_axes[0].set_ylim(0, None)
        for axes in all_axes if is_narrow else all_axes[:1]:
            axes.set_ylabel(f"HR@{k}")
        columns = 2 if is_narrow else len(models)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)

    return _draw(f"HR@{k} by segment", paint, broad=(11, 3.4), narrow=(3.6, 2.5 * len(panels) + 0.5))


def training_curves(metrics: Sequence[Mapping[str, Any]], best_steps: Mapping[str, int]) -> Figure:
    """Loss and validation metrics of every stage over its steps; a line marks the step that was kept."""
    stages = list(dict.fromkeys(record["stage"] for record in metrics))
    checked = [f"valid/{name}" for name in ("ndcg@10", "hr@10", "mrr", "explained")]

    def paint(figure: MatplotlibFigure, is_narrow: bool) -> None:
        columns = 1 if is_narrow else 2
        grid = figure.subplots(2 * len(stages) // columns, columns, squeeze=False)
        panels = np.asarray(grid).reshape(-1, 2)
        for row, stage in zip(panels, stages, strict=True):
            records = pl.DataFrame([record for record in metrics if record["stage"] == stage], infer_schema_length=None)
            for axes, names in zip(row, (["loss"], checked), strict=True):
                names = [name for name in names if name in records.columns]
                for index, name in enumerate(names):
                    points = records.select("step", name).drop_nulls()
                    marker = {"marker": "o", "markersize": 3.5} if name in checked else {}
                    axes.plot(
                        points["step"], points[name], color=_SERIES[index], label=name.removeprefix("valid/"), **marker
                    )
                if stage in best_steps:
                    axes.axvline(best_steps[stage], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
                axes.set_title(f"{stage}: {'training loss' if axes is row[0] else 'validation'}")
                axes.set_xlabel("step")
                if names and axes is row[1]:
                    axes.legend(loc="best")

    rows = len(stages)
    return _draw("Training curves of every stage", paint, broad=(11, 2.5 * rows), narrow=(3.6, 4.4 * rows))


def reconstruction_figure(report: Mapping[str, Mapping[str, float]]) -> Figure:
    """Squared error of every reconstructed field as a share of the mean vector's error."""
    names = list(report)[::-1]
    ratios = [report[name]["mse"] / max(report[name]["mean_mse"], 1e-12) for name in names]

    def paint(figure: MatplotlibFigure, is_narrow: bool) -> None:
        axes = figure.subplots()
        # By place: two long names may be cut to the same one.
        axes.barh(range(len(names)), ratios, 0.62, color=_SERIES[0])
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.axvline(1, color=_SERIES[2], linewidth=1.6)
        axes.annotate(
            "mean vector",
            (1, len(names) - 0.42),
            xytext=(-4, 0),
            textcoords="offset points",
            color=_SERIES[2],
            fontsize=9,
            ha="right",
        )
        for place, ratio in enumerate(ratios):
            # Beside the line of the baseline, which a number would cross.
            at = (max(ratio, 1), place)
            axes.annotate(f"{ratio:.2f}", at, xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0, max(1.25, max(ratios) * 1.12))
        axes.set_ylim(-0.6, len(names) - 0.1)
        axes.grid(axis="y", visible=False)
        axes.set_title("Error as a share of the mean's" if is_narrow else "Error as a share of the mean vector's")
        axes.set_xlabel("less is better")

    height = 1.1 + 0.34 * len(names)
    return _draw("Reconstruction error of every field", paint, broad=(6.2, height), narrow=(3.6, height))


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"
