"""The comparison of arms as text: how each figure is written, the terminal's table, the finding.

The page and the terminal show the same figures because both take them from here.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

NOTHING = "-"
TERMINAL_COLUMNS = 110


def print_table(report: Row) -> str:
    """The comparison as plain text of at most 110 columns; long arm names wrap."""
    title = " · ".join(str(report[k]) for k in ("domain", "protocol", "created_for") if k in report)
    arms = arms_of(report)
    if not arms:
        return f"{title}\nNo arms were compared."
    rows = [
        [name, *(show(arm) for _, show in COLUMNS[1:])] for arm in arms for name in [arm["name"]]
    ]
    heads = ["arm", "AUC [95%]", "over base, 1e-3", "GAUC", "LogLoss", "NE", "s", "B/inst"]
    widths = [max(len(str(x)) for x in column) for column in zip(heads, *rows, strict=True)]
    widths[0] = min(widths[0], TERMINAL_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = [title, *_terminal_row(heads, widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    for row in rows:
        lines += _terminal_row(row, widths)
    return "\n".join([*lines, "", *textwrap.wrap(finding(report), TERMINAL_COLUMNS)])


def finding(report: Row) -> str:
    """One or two plain sentences: which arms differ from the base beyond noise."""
    arms = arms_of(report)
    compared = [arm for arm in arms if arm.get("diff_auc") is not None]
    if not compared:
        return "No arm was compared with a base."
    better = [arm for arm in compared if (arm.get("diff_low") or 0) > 0]
    worse = [arm for arm in compared if (arm.get("diff_high") or 0) < 0]
    base = next((arm for arm in arms if arm["name"] == base_name(arms)), None)
    start = f"Over the base (AUC {auc(base['auc'])})" if base else "Over the base"
    text = (
        f"{start}, {len(better)} of {len(compared)} arms are better and {len(worse)} worse by more "
        f"than the noise (95% interval); {len(compared) - len(better) - len(worse)} cannot be told "
        "apart from it."
    )
    if better:
        best = max(better, key=lambda arm: float(arm["diff_auc"]))
        text += f" The largest gain is {best['name']}: {difference(best)} (AUC, 1e-3)."
    return text


def base_name(arms: Sequence[Row]) -> str | None:
    """The arm that the others are compared with: the one called base, if there is one."""
    return next((str(arm["name"]) for arm in arms if arm["name"] == "base"), None)


def arms_of(report: Row) -> list[Row]:
    return list(report.get("arms") or [])


def _terminal_row(cells: Sequence[Any], widths: Sequence[int]) -> list[str]:
    first, *more = textwrap.wrap(str(cells[0]), max(8, widths[0])) or [""]
    numbers = [str(x).rjust(w) for x, w in zip(cells[1:], widths[1:], strict=True)]
    return ["  ".join([first.ljust(widths[0]), *numbers]), *("  " + line for line in more)]


def auc(value: Any) -> str:
    """A share as `.8239`; values outside [0, 1) keep their whole part."""
    if not is_number(value):
        return NOTHING
    text = f"{value:.4f}"
    return text[1:] if text.startswith("0.") else text


def auc_interval(arm: Row) -> str:
    low, high = arm.get("auc_low"), arm.get("auc_high")
    interval = f" [{auc(low)}, {auc(high)}]" if is_number(low) and is_number(high) else ""
    return auc(arm.get("auc")) + interval


def difference(arm: Row) -> str:
    value, low, high = (arm.get(key) for key in ("diff_auc", "diff_low", "diff_high"))
    if value is None or not is_number(value):
        return NOTHING
    text = f"{value * 1e3:+.2f}"
    if low is None or high is None:
        return text
    return f"{text} [{low * 1e3:+.2f}, {high * 1e3:+.2f}]"


def decimal(value: Any, places: int) -> str:
    return f"{value:,.{places}f}" if is_number(value) else NOTHING


def is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("arm", lambda arm: str(arm["name"])),
    ("AUC [95%]", auc_interval),
    ("over the base, 1e-3", difference),
    ("GAUC", lambda arm: auc(arm.get("gauc"))),
    ("LogLoss", lambda arm: auc(arm.get("logloss"))),
    ("NE", lambda arm: auc(arm.get("ne"))),
    ("seconds", lambda arm: decimal(arm.get("seconds"), 1)),
    ("bytes per instance", lambda arm: decimal(arm.get("bytes_per_instance"), 0)),
)
