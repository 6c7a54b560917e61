"""`report.html`, one page that needs no network; `print_table` gives its comparison as text.

A report is a dict, the one that `--json` writes. Every key may be missing; what is missing is said.

    domain, protocol       names, such as "grocery" and "streaming"
    created_for            the days it is about, such as "[2017-01-01, 2018-01-01)"
    settings               {name: value or {name: value}}: rows, households, machine, versions
    arms                   [{name, auc, auc_low, auc_high, gauc, logloss, ne, diff_auc, diff_low,
                             diff_high, seconds, bytes_per_instance, weekly: [{start, auc}]}]
                           differences are over the arm called "base", in AUC (0.001, not 1.0);
                           beside: {other arm: {diff_auc, diff_low, diff_high}}
    windows                {name: arms}: the same comparison on other days, as tables
    tokens                 {norms: [{month, p5, p50, p95}], drift: [{month, cosine}],
                            coverage: [{month, share}]}
    lake                   [{table, rows, bytes, files}]
    checks                 [{name, rows, differences, passed}]; passed null: does not apply
    timings                [{step, seconds}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jobs import report_plots as plots
from jobs.report_table import (
    COLUMNS,
    NOTHING,
    Row,
    arms_of,
    base_name,
    decimal,
    difference,
    finding,
    print_table,
)

__all__ = ["html", "print_table", "write_report"]

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfb; --card: #ffffff; --ink: #1c2026; --soft: #59616d;
  --line: #dcdfe3; --good: #11713f; --bad: #b3261e; --s0: #1667b7; --s1: #c2410c; --s2: #0f7a5a;
  --s3: #9a3a8f; --s4: #8a6a00; --s5: #0e7490; --s6: #b91c5c; --s7: #5b5bd6; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1b1f25; --ink: #e8eaed;
  --soft: #a3abb6; --line: #363c45; --good: #6fd39b; --bad: #ff8f85; --s0: #6fb3f2; --s1: #ff9b66;
  --s2: #4fcb9f; --s3: #e08ad6; --s4: #d9b84a; --s5: #4cc3dc; --s6: #ff86b3; --s7: #a5a5ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 72rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .2rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption { color: var(--soft); }
figcaption { font-size: .9rem; margin-top: .4rem; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; align-self: start; } figure h3 { font-size: 1rem; margin: 0 0 .4rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; max-width: 100%; width: fit-content; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); } tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); } tbody th { font-weight: 500; white-space: normal; min-width: 8rem; }
@media (min-width: 60rem) { tbody th { min-width: 16rem; } }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
"""


def write_report(path: str | Path, report: Row) -> None:
    """Write the page; the same report gives the same bytes."""
    Path(path).write_text(html(report), encoding="utf-8")


def html(report: Row) -> str:
    """The whole page: inline style, inline SVG, no script, nothing fetched."""
    domain, protocol = _text(report.get("domain")), _text(report.get("protocol"))
    parts = [
        _comparison(report), _tokens(report), _lake(report),
        _checks(report), _timings(report), _settings(report),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>Instance tokens on {domain}</title><style>{STYLE}</style></head><body>"
        f"<h1>Instance tokens on {domain}</h1>"
        f'<p class="soft">{protocol} protocol, {_text(report.get("created_for"))}</p>'
        f"<p>{escape(finding(report))}</p>" + "".join(parts) + "</body></html>\n"
    )


def _comparison(report: Row) -> str:
    arms = arms_of(report)
    if not arms:
        return _section("Comparison", "<p>This run compared no arms.</p>")
    table = _arms_table(arms)
    note = (
        '<p class="soft">AUC and GAUC (AUC within each user): more is better. LogLoss and NE '
        "(LogLoss over that of always predicting the mean): less is better. Intervals are 95%. "
        "Differences are in AUC, times 1000; green or red where the interval leaves out zero.</p>"
    )
    compared = [arm for arm in arms if arm.get("diff_auc") is not None]
    weekly = [arm for arm in arms if arm.get("weekly")]
    figures = _figure(
        "Differences over the base",
        plots.forest(compared) if compared else "",
        "Each dot is an arm's AUC gain over the base and its line the 95% interval; a filled dot's "
        "interval leaves out zero, a hollow one may be noise, an arrow lies beyond the edge.",
    ) + _figure(
        "Progressive AUC by week",
        plots.weekly_auc(weekly, base_name(weekly)) if weekly else "",
        "Each week is predicted before it is trained on. Above, a higher line ranks better; below, "
        "a line above zero beats the base in those weeks.",
    )
    others = "".join(
        f"<h3>{escape(name)}</h3>{_arms_table(found)}{_beside_table(found)}"
        for name, found in (report.get("windows") or {}).items()
    )
    return _section(
        "Comparison",
        f'{table}{note}{_beside_table(arms)}{others}<div class="cards">{figures}</div>',
    )


def _arms_table(arms: Sequence[Row]) -> str:
    rows = [[show(arm) for _, show in COLUMNS] for arm in arms]
    return _table([name for name, _ in COLUMNS], rows, signs=[_sign(arm) for arm in arms])


def _beside_table(arms: Sequence[Row]) -> str:
    """Arms beside other arms than the base; nothing where a run has none."""
    found = [
        (a["name"], other, diff) for a in arms for other, diff in (a.get("beside") or {}).items()
    ]
    rows = [[name, other, difference(diff)] for name, other, diff in found]
    signs = [_sign(diff) for _, _, diff in found]
    return _table(["arm", "less", "1e-3"], rows, signs=signs) if found else ""


def _tokens(report: Row) -> str:
    tokens = report.get("tokens") or {}
    norms, drift, coverage = (tokens.get(key) or [] for key in ("norms", "drift", "coverage"))
    figures = [
        _figure(
            "Token norms", plots.token_norms(norms) if norms else "",
            "The line is the month's median length of a token, the band holds the middle 90%; a "
            "jump means that the space of the tokens changed.",
        ),
        _figure(
            "Drift", plots.by_month(drift, "cosine", "Cosine by month") if drift else "",
            "How alike stored tokens are to the same events encoded by the last version: 1 is the "
            "same direction, lower is further away.",
        ),
        _figure(
            "Coverage", plots.by_month(coverage, "share", "Coverage by month") if coverage else "",
            "The share of history positions whose token could already be read: the rest were "
            "published later or never written.",
        ),
    ]  # fmt: skip
    return _section("Tokens", f'<div class="cards">{"".join(figures)}</div>')


def _lake(report: Row) -> str:
    rows = [
        [r.get("table"), _count(r.get("rows")), _bytes(r.get("bytes")), _count(r.get("files"))]
        for r in report.get("lake") or []
    ]
    return _section("The lake", _table(["table", "rows", "size", "files"], rows))


def _checks(report: Row) -> str:
    rows, signs = [], []
    for check in report.get("checks") or []:
        passed = check.get("passed")
        verdict = "does not apply" if passed is None else "holds" if passed else "FAILED"
        rows.append([check.get("name"), _count(check.get("rows")),
                     _count(check.get("differences")), verdict])  # fmt: skip
        signs.append("" if passed is None else "good" if passed else "bad")
    table = _table(["check", "rows checked", "differences", "verdict"], rows, signs=signs, signed=3)
    return _section("Leak checks", table)


def _timings(report: Row) -> str:
    rows = [[r.get("step"), decimal(r.get("seconds"), 1)] for r in report.get("timings") or []]
    return _section("Where the time went", _table(["step", "seconds"], rows))


def _settings(report: Row) -> str:
    rows = []
    for name, value in (report.get("settings") or {}).items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [[f"{name} {key}".strip(), _plain(x)] for key, x in inner]
    return _section("What was run", _table(["setting", "value"], rows, kind="text"))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(title: str, drawing: str, how_to_read: str) -> str:
    said = how_to_read if drawing else "This run did not measure it."
    return (
        f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(said)}</figcaption></figure>"
    )


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], *,
    signs: Sequence[str] = (), signed: int = 2, kind: str = "",
) -> str:  # fmt: skip
    """A table that scrolls inside its box; `signs` colour column `signed`, row by row."""
    if not rows:
        return "<p>This run did not record it.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for number, row in enumerate(rows):
        sign = signs[number] if number < len(signs) else ""
        body += f'<tr><th scope="row">{_text(row[0])}</th>'
        for column, cell in enumerate(row[1:], start=1):
            mark = f' class="{sign}"' if sign and column == signed else ""
            body += f"<td{mark}>{_text(cell)}</td>"
        body += "</tr>"
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return escape(NOTHING if value is None else str(value))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return _count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _sign(arm: Row) -> str:
    if arm.get("diff_low") is not None and arm["diff_low"] > 0:
        return "good"
    return "bad" if arm.get("diff_high") is not None and arm["diff_high"] < 0 else ""


def _count(value: Any) -> str:
    return f"{value:,}" if value is not None else NOTHING


def _bytes(value: Any) -> str:
    if value is None:
        return NOTHING
    size, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
