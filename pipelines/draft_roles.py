"""Which columns of an event log are its keys, times and labels, by name and by what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.column_facts import Facts
from pipelines.domain import TimeUnit

# Most telling first. A column's name is compared in lower case, its words joined by _.
KEY = r"_?(id|key|code|number|no|hash)?"
USERS = (
    rf"user{KEY}", rf"(customer|household|visitor|member|account|client|shopper|viewer){KEY}",
    rf"(person|reader|listener|buyer|device|session){KEY}", "u?uid",
)  # fmt: skip
ITEMS = (
    rf"item{KEY}", rf"(product|article|movie|sku|video|song|track|book|ad|creative|news){KEY}",
    rf"(offer|listing|content|document|post|game|restaurant|merchant|poi|asin|iid){KEY}",
)  # fmt: skip
MOMENTS = (
    r"event_?(time|timestamp|ts)", r"timestamp|time|ts|datetime", r"\w*_(timestamp|time|ts|at)",
    r"date|day|\w*_date",
)  # fmt: skip
REQUESTS = (
    rf"(request|impression|slate|query|search|page_?view){KEY}",
    rf"(basket|cart|order|transaction|session|visit){KEY}",
)
LABELS = (
    r"label|target|y",
    r"((is|has|label)_)?(purchased?|bought|buy|convert(ed)?|conversion|order(ed)?)",
    r"((is|has|label)_)?(click(ed|s)?|clk|like[ds]?|install(ed)?|finish(ed)?|positive|reward|response)",
    r"rating|score|stars",
)  # fmt: skip
UNIT_OF_TIME: tuple[tuple[float, float, TimeUnit], ...] = (
    (1e8, 1e11, "s"), (1e11, 1e14, "ms"), (1e14, 1e17, "us"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Columns that are no features; empty where nothing fits."""

    user: str
    item: str
    time: str
    request: str
    labels: tuple[str, ...]
    label_times: Mapping[str, str]


def guess_roles(facts: Mapping[str, Facts]) -> Roles:
    """Which columns are keys, times and labels, by name and by what they hold."""
    moments = {n: f for n, f in facts.items() if time_unit(f) is not None}
    keys = {n: f for n, f in facts.items() if n not in moments and is_key(f)}
    user = _first(keys, USERS)
    item = _first((n for n in keys if n != user), ITEMS)
    request = _first((n for n in facts if n not in (user, item)), REQUESTS)
    typed = [n for n, f in moments.items() if f.is_time]
    time = _first(moments, MOMENTS) or (typed[0] if len(typed) == 1 else "")
    binary = [n for n, f in facts.items() if f.is_binary and n not in (user, item, request)]
    labels = _all(binary, LABELS[:-1])
    if not labels:
        graded = (n for n, f in facts.items() if f.is_number and f.distinct > 2)
        labels = _all(graded, LABELS[-1:])[:1]
    times = {label: _time_of(label, facts, time) for label in labels}
    return Roles(
        user=user, item=item, time=time, request=request, labels=tuple(labels),
        label_times={label: found for label, found in times.items() if found},
    )  # fmt: skip


def time_unit(facts: Facts) -> TimeUnit | None:
    """How a column's values tell the time; None if they do not."""
    if facts.is_time:
        return "timestamp"
    if facts.is_iso_time:
        return "iso"
    if facts.is_number and facts.minimum > 0:
        for low, high, unit in UNIT_OF_TIME:
            if low <= facts.quantiles[0] and facts.maximum < high:
                return unit
    return None


def is_key(facts: Facts) -> bool:
    return facts.is_text or (facts.is_number and facts.is_whole)


def _time_of(label: str, facts: Mapping[str, Facts], time: str) -> str:
    stem = slug(label).removeprefix("is_").removeprefix("has_")
    names = (rf"({stem}|label)_?(time|at|ts|timestamp)",)
    if not time:
        return ""
    unit = time_unit(facts[time])
    return _first((n for n, f in facts.items() if n != time and time_unit(f) == unit), names)


def _first(names: Iterable[str], patterns: Iterable[str]) -> str:
    return next(iter(_all(names, patterns)), "")


def _all(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that fit, those of the first pattern first."""
    names = list(names)
    fits = ((re.compile(p), n) for p in patterns for n in names)
    return list(dict.fromkeys(n for pattern, n in fits if pattern.fullmatch(slug(n))))


def slug(name: str) -> str:
    """`HouseholdID` and `household id` as `household_id`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")
