"""The report: self-contained, safe to open, whole on a phone, graceful where a part is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import report_plots
from jobs.report import html, print_table, write_report

ARMS = (
    ("no history", -51.2, 0.9, 38.0, 0),
    ("base", None, None, 61.4, 12),
    ("+ all logged fields, end to end", -1.18, 0.8, 95.1, 214),
    ("+ temporal-order tokens", 0.82, 0.87, 88.7, 128),
    ("+ user-order tokens", 0.97, 0.7, 89.0, 128),
    ("+ user-order tokens and item tokens", 2.34, 1.2, 93.2, 128),
    ("+ untrained compressor's tokens and item tokens", 1.56, 1.3, 92.8, 128),
    ("+ tokens shuffled over rows", -0.4, 0.75, 88.9, 128),
    ("+ item tokens, compressor of all households", 4.33, 1.6, 94.0, 128),
    ("tokens only", -22.0, 1.1, 70.2, 128),
)


def sample_report() -> dict[str, Any]:
    """What a run on the grocery log looks like; figures of FINDINGS.md, noise of a weekly AUC."""
    random = np.random.default_rng(0)
    weeks = [str(day) for day in np.arange("2017-01-02", "2018-01-01", 7, dtype="datetime64[D]")]
    months = [f"2017-{month:02d}" for month in range(1, 13)]
    shared = 0.80 + 0.024 * (1 - np.exp(-np.arange(len(weeks)) / 9))
    shared = shared + random.normal(0, 0.003, len(weeks))
    arms = []
    for name, diff, half, seconds, size in ARMS:
        auc = 0.8239 + (diff or 0) / 1e3
        own = shared + (diff or 0) / 1e3 + random.normal(0, 0.0008, len(weeks))
        arms.append({
            "name": name, "auc": auc, "auc_low": auc - 0.004, "auc_high": auc + 0.004,
            "gauc": auc - 0.021, "logloss": 0.3921 - (diff or 0) / 1e3, "ne": 0.7835,
            "diff_auc": None if diff is None else diff / 1e3,
            "diff_low": None if diff is None or half is None else (diff - half) / 1e3,
            "diff_high": None if diff is None or half is None else (diff + half) / 1e3,
            "seconds": seconds, "bytes_per_instance": size,
            "weekly": [{"start": w, "auc": a} for w, a in zip(weeks, own.tolist(), strict=True)],
        })  # fmt: skip
    grown = 1 - np.exp(-np.arange(1, 13) / 3)
    return {
        "domain": "grocery", "protocol": "streaming", "created_for": "[2017-01-01, 2018-01-01)",
        "settings": {
            "rows": 7_345_985, "households": 987, "households of the compressor": 2469,
            "seeds": [0, 1, 2, 3, 4], "machine": {"cores": 2, "memory": "24 GB", "gpu": None},
            "versions": {"python": "3.11.7", "torch": "2.11.0", "deltalake": "1.6.6"},
        },
        "arms": arms,
        "tokens": {
            "norms": [
                {"month": m, "p5": 3 + 2 * g, "p50": 5 + 2.4 * g, "p95": 8 + 3.1 * g}
                for m, g in zip(months, grown.tolist(), strict=True)
            ],
            "drift": [
                {"month": m, "cosine": 0.55 + 0.43 * g}
                for m, g in zip(months, grown.tolist(), strict=True)
            ],
            "coverage": [
                {"month": m, "share": 0.93 + 0.06 * g}
                for m, g in zip(months, grown.tolist(), strict=True)
            ],
        },
        "lake": [
            {"table": "instances/grocery", "rows": 7_345_985, "bytes": 412_000_000, "files": 366},
            {"table": "instance_tokens/grocery", "rows": 1_469_307, "bytes": 196_500_000,
             "files": 366},
            {"table": "compressor_versions", "rows": 2, "bytes": 9_412, "files": 2},
        ],
        "checks": [
            {"name": "history equals the oracle's", "rows": 200, "differences": 0, "passed": True},
            {"name": "item tokens equal the oracle's", "rows": 200, "differences": 3,
             "passed": False},
            {"name": "negatives: as-of recency alone", "rows": 0, "differences": None,
             "passed": None},
        ],
        "timings": [
            {"step": "build instances", "seconds": 41.234},
            {"step": "train the compressor, user order", "seconds": 1122.7},
        ],
    }  # fmt: skip


class Page(HTMLParser):
    """Tags opened, attributes by tag, and whether every tag closes in its order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


def test_the_page_is_one_whole_file_that_fetches_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", sample_report())
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.opened == []
    assert len(text) < 2_000_000
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    fetched = [v for _, a in page.attributes for k, v in a.items() if k.endswith(("src", "href"))]
    assert all(str(v).startswith("#") for v in fetched)
    assert "url(http" not in text
    assert page.tags.count("svg") == 5


def test_ids_are_unique_in_the_page() -> None:
    ids = [a["id"] for _, a in Page(html(sample_report())).attributes if "id" in a]
    assert len(ids) == len(set(ids)) > 0


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html(sample_report()) == html(sample_report())


def test_every_colour_of_a_plot_follows_the_page() -> None:
    drawings = re.findall(r"<svg.*?</svg>", html(sample_report()), re.DOTALL)
    colours = set(re.findall(r"#[0-9a-f]{6}\b", " ".join(drawings)))
    assert colours <= {"#ffffff", "#000000"}
    assert all(re.search(r"var\(--(s0|good)\)", drawing) for drawing in drawings)


def test_names_are_shown_as_written_and_never_run() -> None:
    attack = "<script>alert('x')</script> $a_b$ & \"q\""
    report = sample_report()
    report["domain"] = report["protocol"] = report["created_for"] = attack
    report["settings"] = {attack: attack}
    for section, key in (("lake", "table"), ("checks", "name"), ("timings", "step")):
        report[section][0][key] = attack
    report["arms"][3]["name"] = attack
    report["tokens"]["norms"][0]["month"] = report["arms"][3]["weekly"][0]["start"] = attack
    page = html(report)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8
    assert Page(page).opened == []


@pytest.mark.parametrize("missing", [*sample_report(), "everything"])
def test_a_missing_section_is_said_and_not_fatal(missing: str) -> None:
    report = {} if missing == "everything" else sample_report()
    report.pop(missing, None)
    page = html(report)
    assert Page(page).opened == []
    assert print_table(report)
    if missing in ("lake", "checks", "timings", "settings", "everything"):
        assert "This run did not record it." in page
    if missing in ("tokens", "everything"):
        assert "This run did not measure it." in page


def test_figures_that_are_null_or_not_numbers_are_shown_as_missing() -> None:
    report = sample_report()
    for arm in report["arms"]:
        arm.update(auc=None, gauc=float("nan"), diff_low=None, seconds=None, weekly=[])
    report["tokens"] = {"norms": [{"month": "2017-01"}], "drift": [{"month": "2017-01"}]}
    assert Page(html(report)).opened == []
    assert "nan" not in print_table(report)


def test_the_terminal_table_fits_110_columns_and_holds_every_arm() -> None:
    report = sample_report()
    report["arms"][1]["seconds"] = 12_345.6
    lines = print_table(report).splitlines()
    assert max(map(len, lines)) <= 110
    together = " ".join(" ".join(lines).split())
    assert "+4.33 [+2.73, +5.93]" in together
    assert ".8239 [.8199, .8279]" in together
    assert "4 of 9 arms are better and 3 worse" in together


def test_labels_of_lines_never_overlap_and_keep_their_order() -> None:
    wanted = np.array([0.5, 0.5, 0.9, 0.49, 0.1, 1.0])
    places = report_plots.spread(wanted, 0.1, 0.0, 1.0)
    assert (np.diff(np.sort(places)) >= 0.1 - 1e-9).all()
    assert (np.argsort(places) == np.argsort(wanted, kind="stable")).all()
    assert places.min() >= 0
    assert places.max() <= 1 + 1e-9


def test_arms_stand_beside_each_other_where_a_run_compared_them() -> None:
    report = sample_report()
    assert '<th scope="col">less</th>' not in html(report)
    found = {"diff_auc": 0.00146, "diff_low": 0.0002, "diff_high": 0.0028}
    report["arms"][4]["beside"] = {"+ untrained <tokens>": found}
    page = html(report)
    assert (
        '<th scope="row">+ user-order tokens</th><td>+ untrained &lt;tokens&gt;</td>'
        '<td class="good">+1.46 [+0.20, +2.80]</td>'
    ) in page
