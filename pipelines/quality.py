"""Expectations of every table: what must hold of a day, and how far a day may be from the week
before it.

Drift is the Jensen-Shannon divergence, in bits, between a day's values and those of its trailing
week: 0 where they are spread alike, 1 where they have none in common. A user's feature counts once
a user and a request's once a request, or a day of few busy users would look like another world.
Category buckets are counted in CELLS cells (bucket modulo CELLS), numbers in cells of equal width:
memory does not grow with the categories. What samples of this size differ by anyway is taken off,
(k - 1)(1/n + 1/m) / (8 ln 2) for k cells met, n values of the day and m of the week, so that a
small day says little. And a day counts as changed only where it is NOISE times further from its
week than any day of that week is from the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.domain import Domain, Feature
from pipelines.errors import InputError
from pipelines.token_format import TokenFormat, decode

Array = npt.NDArray[Any]

SOME = 5
"""Failing rows that a finding names."""
TRAILING_DAYS = 8
"""A week, and the day before it: a column that changes every week has then been seen to change."""
CELLS = 1024
NUMBER_EDGES = np.linspace(-4, 4, 65)
"""Of the cells of a scaled number."""
MIN_ROWS, MIN_DAYS = 100, 3
"""Fewer events of a day, fewer days of a week, are not judged against each other."""
NOISE = 2.0
GONE = 0.1
"""A feature of which less than this share of its usual values is left has gone missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How far a day may be from its trailing week."""

    warn_drift: float = 0.1
    max_drift: float = 1.0
    """Further than this fails; 1 is the furthest there is."""
    warn_nulls: float = 0.1
    """Change of the share of missing values."""
    warn_norm: float = 0.25
    """The day's median norm of tokens may be this share outside those of the week's days."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name)}"
                )


@dataclass(frozen=True, slots=True)
class Finding:
    """An expectation that does not hold, with how many rows break it and some of them."""

    rule: str
    says: str
    count: int
    rows: list[dict[str, Any]]
    is_warning: bool = False


def found(rule: str, says: str, bad: pa.Table) -> list[Finding]:
    """None if no row is bad; `says` has a place for their {count}."""
    if not len(bad):
        return []
    rows = bad.slice(0, SOME).to_pylist()
    return [Finding(rule, says.format(count=len(bad)), len(bad), rows)]


# What must hold of a day.


def repeated(rows: pa.Table, key: Sequence[str]) -> list[Finding]:
    """Keys that more than one row has."""
    if not key:
        return []
    counts = rows.select(list(key)).group_by(list(key)).aggregate([([], "count_all")])
    bad = counts.filter(pc.greater(counts["count_all"], 1))
    return found("unique key", f"{{count}} keys ({', '.join(key)}) are of several rows", bad)


def unsorted(rows: pa.Table, by: Sequence[str]) -> list[Finding]:
    """Rows of one file that should stand before the row before them."""
    before, after = rows.slice(0, max(len(rows) - 1, 0)), rows.slice(1)
    is_late = pa.repeat(pa.scalar(False), len(after))
    is_tied = pa.repeat(pa.scalar(True), len(after))
    for name in by:
        is_late = pc.or_(is_late, pc.and_(is_tied, pc.greater(before[name], after[name])))
        is_tied = pc.and_(is_tied, pc.equal(before[name], after[name]))
    bad = after.select(list(by)).filter(is_late)
    return found("order", f"{{count}} rows stand after a later one ({', '.join(by)})", bad)


def of_another_day(rows: pa.Table, time: str, day: date) -> list[Finding]:
    """Rows whose moment is not on the day that they stand under."""
    is_other = pc.not_equal(pc.cast(rows[time], pa.date32()), pa.scalar(day, pa.date32()))
    return found("day", f"{{count}} rows have a {time} of another day", rows.filter(is_other))


def wrong_labels(rows: pa.Table, domain: Domain, time: str) -> list[Finding]:
    """Labels known before their event; labels without a label_time, and the other way about."""
    bad: list[Finding] = []
    for label in domain.labels:
        value, known = rows[f"label_{label.name}"], rows[f"label_time_{label.name}"]
        is_early = pc.less(known, rows[time])
        is_half = pc.xor(pc.is_null(value), pc.is_null(known))
        early = f"{{count}} rows know label {label.name} before its event"
        half = f"{{count}} rows have label {label.name} or its label_time, not both"
        bad += found("label time", early, rows.filter(is_early))
        bad += found("label time", half, rows.filter(is_half))
    return bad


def differing(rule: str, what: str, wanted: pa.Table, got: pa.Table, key: str) -> list[Finding]:
    """Values of a key that one side has and the other lacks."""
    ours, theirs = (np.unique(rows[key].to_numpy()) for rows in (wanted, got))
    missing, extra = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
    lack = f"{{count}} of {len(ours)} {what} are missing"
    more = f"{{count}} rows are of no {what}"
    return found(rule, lack, pa.table({key: missing})) + found(rule, more, pa.table({key: extra}))


def wrong_vectors(
    rows: pa.Table, column: str, form: TokenFormat, key: Sequence[str]
) -> tuple[list[Finding], Array]:
    """Vectors of another width, or not finite; and the norms of the others."""
    is_whole = pc.fill_null(pc.equal(pc.binary_length(rows[column]), form.num_bytes), False)
    keys, whole = rows.select(list(key)), rows.filter(is_whole)
    bad = found(
        "width", f"{{count}} rows hold no {form} in {column}", keys.filter(pc.invert(is_whole))
    )
    vectors = decode(whole[column], form).astype(np.float32)
    is_finite = np.isfinite(vectors).all(axis=1)
    not_finite = keys.filter(is_whole).filter(pa.array(~is_finite))
    bad += found("finite", f"{{count}} rows hold a {column} that is not finite", not_finite)
    return bad, np.linalg.norm(vectors[is_finite], axis=1)


# A day against its trailing week.


def one_each(rows: pa.Table, feature: Feature) -> pa.Table:
    """The rows with one of each user (request) for a feature that all of its rows share."""
    key = {"user": "user_id", "context": "request_id"}.get(feature.side)
    if key is None:
        return rows
    return rows.take(np.unique(rows[key].to_numpy(), return_index=True)[1])


class Profile(NamedTuple):
    """How the values of a day are spread."""

    counts: Array
    """By cell."""
    missing: int
    rows: int

    @property
    def missing_share(self) -> float:
        return self.missing / max(self.rows, 1)


class Change(NamedTuple):
    """How far a day is from its week, and the furthest that a day of it is from its others."""

    value: float
    usual: float

    def passes(self, limit: float) -> bool:
        return self.value > limit and self.value > NOISE * self.usual


def profile(rows: pa.Table, name: str, feature: Feature | None = None) -> Profile:
    """Of a feature's column in a stream's rows, or (None) of a label's."""
    values = (one_each(rows, feature) if feature is not None else rows)[name]
    num_rows = len(values)
    if feature is not None and feature.is_list:
        is_missing = pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0)
        num_missing = int(pc.sum(is_missing).as_py() or 0)
        return Profile(_cells(pc.list_flatten(values)), num_missing, num_rows)
    there = values.drop_null()
    if feature is not None and feature.is_number:
        cells = np.digitize(there.to_numpy(), NUMBER_EDGES)
        counts = np.bincount(cells, minlength=len(NUMBER_EDGES) + 1)
        return Profile(counts, num_rows - len(there), num_rows)
    if feature is not None:
        there = there.filter(pc.not_equal(there, 0))  # bucket 0: missing
    return Profile(_cells(there), num_rows - len(there), num_rows)


def _cells(values: pa.ChunkedArray) -> Array:
    found = values.drop_null().to_numpy().astype(np.int32)
    return np.bincount(found % CELLS, minlength=CELLS)


def pooled(days: Sequence[Profile]) -> Profile:
    counts = np.sum([day.counts for day in days], axis=0)
    return Profile(counts, sum(day.missing for day in days), sum(day.rows for day in days))


def divergence(one: Profile, other: Profile) -> float:
    """Jensen-Shannon, less what samples of their sizes differ by; 0 without values on a side."""
    sizes = one.counts.sum(), other.counts.sum()
    if not all(sizes):
        return 0.0
    p, q = one.counts / sizes[0], other.counts / sizes[1]
    met = (p + q) > 0
    p, q = p[met], q[met]
    middle = (p + q) / 2
    bits = sum(float((x[x > 0] * np.log2(x[x > 0] / middle[x > 0])).sum()) for x in (p, q)) / 2
    by_chance = (len(p) - 1) * (1 / sizes[0] + 1 / sizes[1]) / (8 * math.log(2))
    return max(bits - by_chance, 0.0)


def missing_change(one: Profile, other: Profile) -> float:
    return abs(one.missing_share - other.missing_share)


def changed(
    measure: Callable[[Profile, Profile], float], day: Profile, week: Sequence[Profile]
) -> Change:
    """A day against its week, beside each day of the week against the others."""
    own = [measure(each, pooled([*week[:n], *week[n + 1 :]])) for n, each in enumerate(week)]
    return Change(measure(day, pooled(week)), max(own))


def moved(name: str, day: Profile, week: Sequence[Profile], limits: Limits) -> list[Finding]:
    """A feature or a label that has gone missing, whose share of missing values changed, or whose
    values are spread otherwise than in the days before."""
    week = [each for each in week if each.rows >= MIN_ROWS]
    if day.rows < MIN_ROWS or len(week) < MIN_DAYS:
        return []
    before = pooled(week)
    here, usual = (1 - x.missing_share for x in (day, before))
    least = min(1 - each.missing_share for each in week)
    nulls = (
        f"{name}: {day.missing_share:.1%} missing, {before.missing_share:.1%} in the week before"
    )
    if here < GONE * min(usual, least) and usual * day.rows >= MIN_ROWS:
        return [Finding("gone missing", nulls, day.missing, [])]
    bad: list[Finding] = []
    if changed(missing_change, day, week).passes(limits.warn_nulls):
        bad.append(Finding("missing share", nulls, day.missing, [], is_warning=True))
    drift = changed(divergence, day, week)
    if drift.passes(limits.warn_drift):
        says = (
            f"{name}: {drift.value:.2f} bits from the week before, whose days are at most "
            f"{drift.usual:.2f} from each other"
        )
        is_warning = drift.value <= limits.max_drift
        bad.append(Finding("drift", says, day.rows, _most_moved(day, before), is_warning))
    return bad


def _most_moved(day: Profile, before: Profile) -> list[dict[str, Any]]:
    """Cells whose share of the values changed most."""
    shares = [x.counts / max(int(x.counts.sum()), 1) for x in (day, before)]
    change = np.abs(shares[0] - shares[1])
    cells = [cell for cell in np.argsort(-change, kind="stable")[:SOME] if change[cell] > 0]
    return [
        {
            "cell": int(c),
            "share": round(float(shares[0][c]), 4),
            "before": round(float(shares[1][c]), 4),
        }
        for c in cells
    ]


def norm_moved(median: float, week: Sequence[float], limits: Limits) -> list[Finding]:
    """A day whose median norm is outside the band of its week's."""
    if len(week) < MIN_DAYS:
        return []
    low, high = min(week) / (1 + limits.warn_norm), max(week) * (1 + limits.warn_norm)
    if low <= median <= high:
        return []
    says = f"the median norm of the tokens is {median:.3g}, outside [{low:.3g}, {high:.3g}]"
    return [Finding("norm", says, 0, [], is_warning=True)]
