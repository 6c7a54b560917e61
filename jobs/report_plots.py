"""The report's plots as inline SVG that follow the page's colours, light or dark, and fit a phone.

Text stays text, set at a size that reads at 350 px; colours leave matplotlib as marks and become
CSS variables, so one drawing serves both schemes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

WIDTH_IN = 4.7
MARKS = {
    "#010203": "var(--ink)",
    "#040506": "var(--soft)",
    "#070809": "var(--line)",
    "#0a0b0c": "var(--good)",
    "#0d0e0f": "var(--bad)",
    "#101112": "var(--card)",
}
INK, SOFT, LINE, GOOD, BAD, CARD = MARKS
SMOOTHED_WEEKS = 4
NUM_COLOURS = 8
SERIES = tuple(f"#1a2b{n:02x}" for n in range(NUM_COLOURS))
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
}


def weekly_auc(arms: Sequence[Row], base: str | None) -> str:
    """AUC of each arm by week, and under it the difference from the base arm where there is one."""
    drawn = [arm for arm in arms if arm.get("weekly")]
    starts = sorted({str(week["start"]) for arm in drawn for week in arm["weekly"]})
    values = {str(arm["name"]): _aligned(arm["weekly"], "start", "auc", starts) for arm in drawn}
    looks = _looks([str(arm["name"]) for arm in drawn], base)
    has_base = base in values and len(values) > 1
    height = max(2.4, 0.27 * len(values) + 0.8)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height * (2 if has_base else 1)))
        panels = figure.subplots(2 if has_base else 1, squeeze=False)[:, 0]
        _lines(panels[0], values, looks, starts)
        panels[0].set_title("AUC of the week")
        if has_base:
            rest = {
                n: _trailing_mean((v - values[str(base)]) * 1e3)
                for n, v in values.items()
                if n != base
            }
            limit = _limit([float(np.nanmedian(np.abs(v))) for v in rest.values()])
            near = {n: v for n, v in rest.items() if np.nanmedian(np.abs(v)) <= limit}
            _lines(panels[1], near, looks, starts)
            panels[1].axhline(0, color=INK, linewidth=1)
            far = "" if len(near) == len(rest) else f" (without {len(rest) - len(near)} far off)"
            panels[1].set_title(
                f"difference from {base} in 1e-3, mean of {SMOOTHED_WEEKS} weeks{far}"
            )
        figure.subplots_adjust(
            left=0.12, right=0.66, top=1 - 0.3 / figure.get_figheight(),
            bottom=0.35 / figure.get_figheight(), hspace=0.28,
        )  # fmt: skip
        return _svg(figure, "weekly", "AUC by week, one line per arm")


def forest(arms: Sequence[Row]) -> str:
    """Each arm's AUC difference over the base with its interval; filled where it excludes zero.

    An arm so far off that the others would shrink to a point is drawn as an arrow at the edge.
    """
    drawn = [arm for arm in arms if arm.get("diff_auc") is not None]
    low, middle, high = (
        np.array([_number(arm.get(key)) * 1e3 for arm in drawn])
        for key in ("diff_low", "diff_auc", "diff_high")
    )
    reach = np.fmax(np.abs(middle), np.fmax(np.abs(low), np.abs(high)))
    limit = _limit(reach.tolist())
    shown = reach <= limit
    edges = np.concatenate([[0.0], low[shown], middle[shown], high[shown]])
    left, right = float(np.nanmin(edges)), float(np.nanmax(edges))
    room = 0.08 * (right - left) or 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 0.44 * len(drawn) + 0.75))
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlim(left - room, right + room)
        for row, arm in enumerate(drawn):
            colour = GOOD if low[row] > 0 else BAD if high[row] < 0 else SOFT
            if shown[row]:
                _interval(axes, row, low[row], middle[row], high[row], colour)
            else:
                at = left - 0.5 * room if middle[row] < 0 else right + 0.5 * room
                axes.plot(at, row, "<" if middle[row] < 0 else ">", color=colour, markersize=8)
            axes.annotate(
                f"{_short(arm['name'], 44)}  {middle[row]:+.2f}",
                (0, row),
                xycoords=("axes fraction", "data"),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8.5,
                bbox={"facecolor": CARD, "edgecolor": "none", "pad": 0.5},
            )
        axes.set_ylim(len(drawn) - 0.5, -0.95)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("AUC difference over the base, in 1e-3")
        figure.subplots_adjust(left=0.03, right=0.97, top=0.99, bottom=0.5 / figure.get_figheight())
        return _svg(figure, "forest", "AUC differences over the base, with intervals")


def token_norms(rows: Sequence[Row]) -> str:
    """Median token norm by month, inside the band of the middle 90% of tokens."""
    months = [str(row["month"]) for row in rows]
    low, middle, high = (
        np.array([_number(row.get(key)) for row in rows]) for key in ("p5", "p50", "p95")
    )
    with mpl.rc_context(STYLE):
        figure, axes = _small()
        at = np.arange(len(rows))
        axes.fill_between(at, low, high, color=SERIES[0], alpha=0.22, linewidth=0)
        axes.plot(at, middle, color=SERIES[0], marker="o", markersize=3.5)
        axes.set_ylim(bottom=0)
        for name, values in (("95%", high), ("median", middle), ("5%", low)):
            _end_label(axes, at[-1], values[-1], name, SERIES[0] if name == "median" else SOFT)
        _named_ticks(axes, months)
        return _svg(figure, "norms", "Token norms by month")


def by_month(rows: Sequence[Row], key: str, label: str) -> str:
    """One figure between 0 and 1 by month: the drift's cosine or the coverage's share."""
    values = np.array([_number(row.get(key)) for row in rows])
    with mpl.rc_context(STYLE):
        figure, axes = _small()
        axes.plot(values, color=SERIES[0], marker="o", markersize=3.5)
        axes.set_ylim(min(0.0, float(np.nanmin(values, initial=0.0))), 1.05)
        if np.isfinite(values).any():
            last = int(np.flatnonzero(np.isfinite(values))[-1])
            _end_label(axes, last, values[last], f"{values[last]:.2f}", SERIES[0])
        _named_ticks(axes, [str(row["month"]) for row in rows])
        return _svg(figure, key, label)


def spread(wanted: Floats, gap: float, low: float, high: float) -> Floats:
    """Positions at least `gap` apart, in their order of height, as near `wanted` as they can be.

    They stay between `low` and `high` where that leaves room for all.
    """
    order = np.argsort(wanted, kind="stable")
    steps = np.arange(len(wanted)) * gap
    blocks: list[tuple[float, int]] = []
    for value in wanted[order] - steps:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    found = np.concatenate([np.full(n, value) for value, n in blocks] or [np.zeros(0)])
    room = max(0.0, high - low - (steps[-1] if len(steps) else 0))
    places = np.empty(len(wanted))
    places[order] = np.clip(found, low, low + room) + steps
    return places


def _lines(
    axes: Axes, values: Mapping[str, Floats], looks: Mapping[str, tuple[str, Any]],
    starts: Sequence[str],
) -> None:  # fmt: skip
    """One line per arm and its name at the right end, moved apart where names would overlap."""
    for name, line in values.items():
        colour, dash = looks[name]
        axes.plot(line, color=colour, linestyle=dash, marker="o" if len(starts) < 3 else "")
    axes.set_xlim(-0.5, max(1, len(starts) - 1))
    _named_ticks(axes, starts, num_shown=4)
    low, high = axes.get_ylim()
    ends = {n: v[np.isfinite(v)] for n, v in values.items()}
    named = [n for n, v in ends.items() if len(v)]
    wanted = np.array([float(np.mean(ends[n][-3:])) for n in named])
    gap = (high - low) / max(1, len(named)) * 0.98
    gap = min(gap, (high - low) * 0.13)
    places = spread(wanted, gap, low, high)
    for name, value, place in zip(named, wanted, places, strict=True):
        colour, _ = looks[name]
        axes.annotate(
            _two_lines(name), (1, value), xycoords=("axes fraction", "data"),
            xytext=(1.07, place), textcoords=("axes fraction", "data"), color=colour,
            fontsize=7.5, va="center", linespacing=0.95, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6,
                        "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _interval(axes: Axes, row: int, low: float, middle: float, high: float, colour: str) -> None:
    """A dot with its interval; hollow where the interval holds zero."""
    face = colour if low > 0 or high < 0 else "none"
    axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(middle, row, "o", color=colour, markersize=6, mew=1.6, markerfacecolor=face)


def _limit(reach: Sequence[float]) -> float:
    """How far a plot of differences goes: to all, or to where, past the middle one, the next is
    more than eight times as far."""
    known = sorted(value for value in reach if np.isfinite(value))
    past_middle = known[max(0, (len(known) - 1) // 2) :]
    for near, far in itertools.pairwise(past_middle):
        if near > 0 and far > 8 * near:
            return near
    return math.inf


def _looks(names: Sequence[str], base: str | None) -> dict[str, tuple[str, Any]]:
    """A colour and a dash for each arm; the base is drawn in ink."""
    rest = [name for name in names if name != base]
    looks = {
        name: (SERIES[i % NUM_COLOURS], DASHES[i // NUM_COLOURS % len(DASHES)])
        for i, name in enumerate(rest)
    }
    return looks | ({base: (INK, "-")} if base is not None else {})


def _small() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, 2.1))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.84, top=0.96, bottom=0.16)
    return figure, axes


def _end_label(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    if np.isfinite(y):
        axes.annotate(
            text, (x, y), xytext=(7, 0), textcoords="offset points", color=colour,
            va="center", annotation_clip=False,
        )  # fmt: skip


def _named_ticks(axes: Axes, names: Sequence[str], num_shown: int = 4) -> None:
    stride = max(1, -(-(len(names) - 1) // max(1, num_shown - 1)))
    shown = list(range(0, len(names), stride))
    axes.set_xticks(shown, [names[i] for i in shown])
    axes.grid(visible=False, axis="x")


def _trailing_mean(values: Floats) -> Floats:
    """The mean of each week and up to three before it; weeks without a figure are left out."""
    is_known = np.isfinite(values)
    kernel = np.ones(SMOOTHED_WEEKS)
    total = np.convolve(np.where(is_known, values, 0), kernel)[: len(values)]
    count = np.convolve(is_known, kernel)[: len(values)]
    return np.where(is_known, total / np.maximum(count, 1), np.nan)


def _aligned(rows: Sequence[Row], at: str, key: str, wanted: Sequence[str]) -> Floats:
    found = {str(row[at]): _number(row.get(key)) for row in rows}
    return np.array([found.get(place, np.nan) for place in wanted])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _two_lines(name: str) -> str:
    return "\n".join(textwrap.wrap(name, 24, max_lines=2, placeholder="…"))


def _short(name: Any, width: int) -> str:
    return textwrap.shorten(str(name), width, placeholder="…")


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an inline `<svg>` without fixed size, ids of its own and CSS colours."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that only the reader's fonts have is no fault
        FigureCanvasSVG(figure)
        figure.savefig(
            out, format="svg", transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for mark, variable in MARKS.items():
        text = text.replace(mark, variable)
    for number, mark in enumerate(SERIES):
        text = text.replace(mark, f"var(--s{number})")
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
