"""What a report shows of a line's tokens, month by month: their norms, drift and coverage."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np

from compressor import data as streams
from compressor import versions
from compressor.data import DAY_US
from downstream.samples import Array
from downstream.user_index import UserIndex
from pipelines import delta, tables
from pipelines.days import Days, as_date
from pipelines.domain import Domain

DRIFT_EVERY_DAYS, DRIFT_DAYS = 30, 2
COVERAGE_EVENTS, COVERAGE_LENGTH = 2000, 64


def token_figures(
    lake: str, domain: Domain, index: UserIndex, line: str, days: Days
) -> dict[str, Any]:
    """Rows by month: {norms: p5, p50, p95; drift: cosine; coverage: share}."""
    index = index.compacted()
    day = index.arrays["event_time_us"] // DAY_US
    unique, at = np.unique(day, return_inverse=True)
    month = np.array([str(as_date(int(x)))[:7] for x in unique])[at]
    return {
        "norms": _norms(index.line(line).token, month),
        "drift": _drift(lake, domain, index, line, days),
        "coverage": _coverage(index, index.line(line).available_us, month),
    }


def _norms(token: Array, month: Array) -> list[dict[str, Any]]:
    norm = np.linalg.norm(token.astype(np.float32), axis=1)
    found = []
    for name in np.unique(month):
        low, middle, high = np.quantile(norm[month == name], [0.05, 0.5, 0.95])
        found.append({"month": str(name), "p5": low, "p50": middle, "p95": high})
    return found


def _drift(
    lake: str, domain: Domain, index: UserIndex, line: str, days: Days
) -> list[dict[str, Any]]:
    """Mean cosine of stored tokens and the same events compressed by the line's last version."""
    trainer, vocabulary, _ = versions.load(lake, line, domain, "cpu")
    order = np.argsort(index.arrays["instance_id"])
    known = index.arrays["instance_id"][order]
    found: dict[str, float] = {}
    for chunk in days.chunks(DRIFT_EVERY_DAYS):
        few = Days(chunk.start, min(chunk.end, chunk.start + timedelta(days=DRIFT_DAYS)))
        rows = delta.read(lake, tables.user_order(domain), few)
        data = streams.load(rows, domain, vocabulary)
        if not len(data.events):
            continue
        now = trainer.tokens(data, data.events).astype(np.float32)
        at = order[np.searchsorted(known, data.instance_id[data.events])]
        stored = index.line(line).token[at].astype(np.float32)
        norms = np.linalg.norm(now, axis=1) * np.linalg.norm(stored, axis=1)
        cosine = ((now * stored).sum(axis=1) / np.maximum(norms, 1e-6)).mean()
        found.setdefault(str(chunk.start)[:7], float(cosine))
    return [{"month": name, "cosine": cosine} for name, cosine in found.items()]


def _coverage(index: UserIndex, available_us: Array, month: Array) -> list[dict[str, Any]]:
    """Of the newest events before a random event: the share whose token could be read then."""
    begins, time_us = index.users.begin, index.arrays["event_time_us"]
    shares: dict[str, list[float]] = {}
    for row in np.random.default_rng(0).integers(0, len(time_us), COVERAGE_EVENTS):
        begin = int(begins[np.searchsorted(begins, row, side="right") - 1])
        end = begin + int(np.searchsorted(time_us[begin:row], time_us[row]))
        if end > begin:
            readable = available_us[max(begin, end - COVERAGE_LENGTH) : end] < time_us[row]
            shares.setdefault(str(month[row]), []).append(float(readable.mean()))
    return [{"month": name, "share": float(np.mean(x))} for name, x in sorted(shares.items())]
