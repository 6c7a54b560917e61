"""What a backfill will write and why, in which order, and about how much that is."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from itertools import chain
from typing import Any, NamedTuple

from jobs.day_states import GROUPS, Group, Size, States, mean_day
from jobs.token_states import BEFORE, TokenStates
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.tables import Table
from pipelines.written import MISSING

DAYS_AT_ONCE = 30
"""Days whose item tokens are summed up in one commit: they follow one another in any case."""
TOKENS: Mapping[str, tuple[Callable[[str], Table], int]] = {
    "tokens": (tables.instance_tokens, 2),
    "item tokens": (tables.item_tokens, 4),
}
"""Tables of tokens, and bytes of each value of a vector."""
PACED: Mapping[str, str] = {
    "instances": "build-instances",
    "streams": "build-streams",
    "samples": "build-samples",
    "tokens": "write-tokens",
    "item tokens": "sum-item-tokens",
}
"""The job in the ledger that writes each group."""


class Step(NamedTuple):
    """Some days, and which groups of tables are written for them, in order."""

    days: Days
    why: Mapping[str, str]
    """By group."""


class TokenPlan(NamedTuple):
    """What is written of one version's tokens, once the streams are."""

    steps: Sequence[Step] = ()
    """Instance tokens, in any order."""
    sums: Sequence[Step] = ()
    """Item tokens, oldest first."""
    without: Sequence[date] = ()
    """Days that need tokens and have no stream."""
    later: Sequence[date] = ()
    """Days not asked for whose item tokens will be stale."""


class Estimate(NamedTuple):
    """What a plan will write, by the mean of the days that are there and the last run of each job;
    None where there is neither."""

    rows: float | None
    bytes: float | None
    seconds: float | None


def plan(
    states: States, groups: Sequence[Group], days_at_once: int = 1
) -> tuple[list[Step], list[date]]:
    """Steps, oldest first, and days of which nothing can be made because they have no instances.

    What is made of a day's instances is written again whenever they are.
    """
    steps: list[Step] = []
    without: list[date] = []
    for day in states["instances"]:
        why: dict[str, str] = {g: reason for g in groups if (reason := states[g][day])}
        if "instances" in why:
            why = {g: why.get(g, "instances rewritten") for g in groups}
        elif why and states["instances"][day] == MISSING:
            without.append(day)
            continue
        if why:
            _add(steps, day, why, days_at_once)
    return steps, without


def token_plan(
    states: TokenStates, rewritten: Collection[date], days_at_once: int = 1
) -> TokenPlan:
    """What is to be written of tokens, oldest first; days without a stream have none.

    Args:
        rewritten: days of the streams that the plan writes before.
    """
    steps: list[Step] = []
    sums: list[Step] = []
    without: list[date] = []
    for day, reason in states.tokens.items():
        why = reason or ("streams rewritten" if day in rewritten else None)
        if day in states.without and day not in rewritten:
            without += [day] if why else []
            continue
        if why:
            _add(steps, day, {"tokens": why}, days_at_once)
        again = states.items[day] or ("tokens rewritten" if why else BEFORE if sums else None)
        if again:
            _add(sums, day, {"item tokens": again}, DAYS_AT_ONCE)
    return TokenPlan(steps, sums, without, states.later if sums else ())


def _add(steps: list[Step], day: date, why: Mapping[str, str], at_once: int) -> None:
    """A day more to do: in the last step, if that ends before it for the same reasons."""
    last, end = steps[-1] if steps else None, day + timedelta(days=1)
    if last and last.days.end == day and len(last.days) < at_once and last.why == why:
        steps[-1] = Step(Days(last.days.start, end), why)
    else:
        steps.append(Step(Days(day, end), why))


def estimate(
    lake: str, domain: Domain, steps: Sequence[Step], version: Mapping[str, Any] | None = None
) -> Estimate:
    """Rows and bytes of all tables written; seconds as if one step followed another."""
    rows = size = seconds = 0.0
    pace = _seconds_a_row(lake)
    is_known = is_paced = True
    for group, job in PACED.items():
        num_days = sum(len(step.days) for step in steps if group in step.why)
        if not num_days:
            continue
        found = _sizes(lake, domain, group, version)
        sizes = [x for x in found if x is not None]
        is_known &= len(sizes) == len(found)
        rows += num_days * sum(x.rows for x in sizes)
        size += num_days * sum(x.bytes for x in sizes)
        is_paced &= is_known and job in pace
        if is_paced:
            seconds += num_days * max(x.rows for x in sizes) * pace[job]
    return Estimate(
        rows if is_known else None, size if is_known else None, seconds if is_paced else None
    )


def _sizes(
    lake: str, domain: Domain, group: str, version: Mapping[str, Any] | None
) -> list[Size | None]:
    """A mean day of each table of a group. Where no tokens are there yet: one for each event of the
    histories, and an item token at most."""
    if version is None or group not in TOKENS:
        return [
            mean_day(lake, make(domain))
            for each, made in GROUPS.items()
            for make in made
            if each == group
        ]
    of_line, num_bytes = TOKENS[group]
    found = mean_day(lake, of_line(domain.name), version["compressor_line"])
    events = mean_day(lake, tables.histories(domain))
    return [found or (events and Size(events.rows, events.rows * num_bytes * version["width"]))]


def _seconds_a_row(lake: str) -> dict[str, float]:
    """Of the last run of each job that was done, from the ledger."""
    table = tables.job_reports()
    if not delta.exists(lake, table):
        return {}
    found: dict[str, float] = {}
    reports = delta.read(lake, table, columns=["job", "started", "report"])
    for row in reports.sort_by("started").to_pylist():
        report = json.loads(row["report"])
        if report["status"] == "done" and report["rows"]:
            found[row["job"]] = report["wall_s"] / report["rows"]
    return found


def as_text(
    domain: Domain,
    days: Days,
    parts: Sequence[Sequence[Step]],
    guess: Estimate,
    notes: Iterable[str],
) -> str:
    """The plan, for people, part by part; steps alike and next to each other in one line."""
    steps = [step for part in parts for step in part]
    num_days = len({day for step in steps for day in step.days})
    told = [f"{domain.name}, {days}: {num_days} of {len(days)} days to write, {len(steps)} steps"]
    for step in chain.from_iterable(map(_alike, parts)):
        words = ", ".join(f"{group} ({reason})" for group, reason in step.why.items())
        told.append(f"  {_span(step.days)}: {words}")
    told += [f"  {note}" for note in notes]
    if steps:
        figures = [
            f"{guess.rows:,.0f} rows" if guess.rows is not None else "rows unknown",
            f"{guess.bytes / 1e6:,.1f} MB" if guess.bytes is not None else "size unknown",
            f"{guess.seconds:,.0f} s" if guess.seconds is not None else "time unknown",
        ]
        told.append(f"  about {', '.join(figures)} (by the days and runs that are there)")
    return "\n".join(told) + "\n"


def notes(
    without: Sequence[date], tokens: TokenPlan, version: Mapping[str, Any] | None
) -> Iterator[str]:
    """What the plan leaves out, and what it leads to."""
    if without:
        yield f"{len(without)} days have no instances and are left out: add instances to --tables"
    if tokens.without:
        yield (
            f"{len(tokens.without)} days have no streams and get no tokens: add instances and "
            "streams to --tables"
        )
    if tokens.later:
        yield (
            f"item tokens of {len(tokens.later)} later days, from {tokens.later[0]} on, sum these "
            "up and will be stale: run it up to the last day"
        )
    if version is not None:
        start, end = version["start"], version["end"]
        learned = sum(day in Days(start, end) for step in tokens.steps for day in step.days)
        if learned:
            yield (
                f"{learned} of these days are among those that {version['compressor_version']} was "
                f"trained on: rankers that read their tokens start on {end} or later"
            )


def _alike(steps: Sequence[Step]) -> list[Step]:
    """Steps next to each other and for the same reasons as one."""
    found: list[Step] = []
    for step in sorted(steps, key=lambda step: step.days.start):
        if found and found[-1].days.end == step.days.start and found[-1].why == step.why:
            found[-1] = Step(Days(found[-1].days.start, step.days.end), step.why)
        else:
            found.append(step)
    return found


def _span(days: Days) -> str:
    last = days.end - timedelta(days=1)
    return str(last) if len(days) == 1 else f"{days.start} to {last}"
